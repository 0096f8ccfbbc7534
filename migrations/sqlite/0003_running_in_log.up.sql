-- The log has everything about a running job. Its row is written when it stops, and sometimes before. A heartbeat without news
-- changes only a record.
ALTER TABLE job_event ADD COLUMN image TEXT;                            -- job after this event; hidden from readers
ALTER TABLE org_head ADD COLUMN base_seq INTEGER NOT NULL DEFAULT 0;    -- no row lacks an event up to this seq
ALTER TABLE org_head ADD COLUMN base_n INTEGER NOT NULL DEFAULT 0;      -- nor an extension in a record up to this n
UPDATE org_head SET base_seq = seq, base_n = n;
ALTER TABLE org_record ADD COLUMN extensions TEXT;                      -- lease extensions, JSON: store/extension.rs
-- job, jobs, unchanged, list, early_rows.
CREATE INDEX idx_org_record_extensions ON org_record (org_id, seq, n, octet_length(extensions)) WHERE octet_length(extensions) > 0;
