-- The log tells all of a running job: its row is written when it stops, and now and then while it runs. What heartbeats change is in records.
ALTER TABLE job_event ADD COLUMN image TEXT;                            -- what a running job is after it; no reader is shown it
ALTER TABLE org_head ADD COLUMN base_seq INTEGER NOT NULL DEFAULT 0;    -- no row lacks an event up to here
ALTER TABLE org_head ADD COLUMN base_n INTEGER NOT NULL DEFAULT 0;      -- nor an extension of a lease of a record up to here
UPDATE org_head SET base_seq = seq, base_n = n;
ALTER TABLE org_record ADD COLUMN extensions TEXT;                      -- of leases, a JSON object: see store/extension.rs
CREATE INDEX idx_org_record_extensions ON org_record (org_id, seq, n, octet_length(extensions)) WHERE octet_length(extensions) > 0; -- job, jobs, unchanged, list
