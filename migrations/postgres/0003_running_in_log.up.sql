-- The log tells all of a running job: its row is written when it stops, and now and then while it runs.
ALTER TABLE jobledger.job_event ADD COLUMN image TEXT;                              -- what a running job is after it; no reader is shown it
ALTER TABLE jobledger.org_head ADD COLUMN base_seq BIGINT NOT NULL DEFAULT 0;       -- as of the last record that is folded: see org_record
ALTER TABLE jobledger.org_record ADD COLUMN base_seq BIGINT NOT NULL DEFAULT 0,     -- no job's row lacks an event up to here then
    ADD COLUMN quiet UUID[];                                                        -- jobs that this batch has changed without an event
ALTER TABLE jobledger.org_record ALTER COLUMN base_seq DROP DEFAULT;
DO $$
DECLARE
    org UUID;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        UPDATE jobledger.org_head SET base_seq = seq WHERE org_id = org;
        UPDATE jobledger.org_record SET base_seq = seq WHERE org_id = org;
    END LOOP;
END $$;
