ALTER TABLE org_head DROP COLUMN bytes;
ALTER TABLE org_head DROP COLUMN jobs;
ALTER TABLE job_event DROP COLUMN bytes;
