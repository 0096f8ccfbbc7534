ALTER TABLE jobledger.job_event DROP COLUMN image;
