-- The log tells all of a running job.
ALTER TABLE jobledger.job_event ADD COLUMN image TEXT;                  -- what a running job is after it; no reader is shown it
