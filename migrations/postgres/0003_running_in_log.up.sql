-- The log has everything about a running job. Its row is written when it stops, and sometimes before. A heartbeat without news
-- changes only a record. A base is as of its batch.
ALTER TABLE jobledger.job_event ADD COLUMN image TEXT;                              -- job after this event; hidden from readers
ALTER TABLE jobledger.org_head ADD COLUMN base_seq BIGINT NOT NULL DEFAULT 0,       -- of the last folded record: see org_record
    ADD COLUMN base_n BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobledger.org_record ADD COLUMN base_seq BIGINT NOT NULL DEFAULT 0,     -- no row lacks an event up to this seq
    ADD COLUMN base_n BIGINT NOT NULL DEFAULT 0,                                    -- nor an extension in a record up to this n
    ADD COLUMN quiet UUID[],                                                        -- rows that this batch wrote without an event
    ADD COLUMN extensions TEXT;                                                     -- lease extensions, JSON: store/extension.rs
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
