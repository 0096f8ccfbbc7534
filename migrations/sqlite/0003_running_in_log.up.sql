-- The log tells all of a running job: its row is written when it stops, and now and then while it runs.
ALTER TABLE job_event ADD COLUMN image TEXT;                            -- what a running job is after it; no reader is shown it
ALTER TABLE org_head ADD COLUMN base_seq INTEGER NOT NULL DEFAULT 0;    -- no row lacks an event up to here
UPDATE org_head SET base_seq = seq;
