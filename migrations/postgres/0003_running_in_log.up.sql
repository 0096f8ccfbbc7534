-- The log tells all of a running job: its row is written when it stops, and now and then while it runs. What heartbeats change is in records.
ALTER TABLE jobledger.job_event ADD COLUMN image TEXT;                              -- what a running job is after it; no reader is shown it
ALTER TABLE jobledger.org_head ADD COLUMN base_seq BIGINT NOT NULL DEFAULT 0,       -- as of the last record that is folded: see org_record
    ADD COLUMN base_n BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobledger.org_record ADD COLUMN base_seq BIGINT NOT NULL DEFAULT 0,     -- no job's row lacks an event up to here then
    ADD COLUMN base_n BIGINT NOT NULL DEFAULT 0,                                    -- nor an extension of a lease of a record up to here
    ADD COLUMN quiet UUID[],                                                        -- jobs whose rows this batch has written without an event
    ADD COLUMN extensions TEXT;                                                     -- of leases, a JSON object: see store/extension.rs
ALTER TABLE jobledger.org_record ALTER COLUMN base_seq DROP DEFAULT, ALTER COLUMN base_n DROP DEFAULT,
    ALTER COLUMN extensions SET STORAGE EXTERNAL;
CREATE INDEX idx_org_record_extensions ON jobledger.org_record (org_id, seq, n) WHERE extensions IS NOT NULL; -- last_event
DO $$
DECLARE
    org UUID;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        UPDATE jobledger.org_head SET base_seq = seq, base_n = n WHERE org_id = org;
        UPDATE jobledger.org_record SET base_seq = seq, base_n = n WHERE org_id = org;
    END LOOP;
END $$;
