-- Org by org: row-level security shows even the owner only the org that the transaction names.
DO $$
DECLARE
    org UUID;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        INSERT INTO jobledger.job_payload (org_id, job_id, payload)
        SELECT j.org_id, j.id, e.payload
        FROM jobledger.job j
        JOIN jobledger.job_event e ON e.org_id = j.org_id AND e.seq = j.created_seq AND e.recorded_at = j.payload_recorded_at
        WHERE j.org_id = org AND j.payload_recorded_at IS NOT NULL AND e.payload IS NOT NULL;
    END LOOP;
END $$;
ALTER TABLE jobledger.job_event DROP COLUMN payload;
ALTER TABLE jobledger.job DROP COLUMN payload_recorded_at;
