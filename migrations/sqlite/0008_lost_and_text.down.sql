-- loses: which attempts were lost (the log then says that they were given back), and how many may be
UPDATE job_event SET kind = 'released' WHERE kind = 'lost';
ALTER TABLE org_series DROP COLUMN lost;
ALTER TABLE job DROP COLUMN lost_attempts;
ALTER TABLE job DROP COLUMN max_lost_attempts;
