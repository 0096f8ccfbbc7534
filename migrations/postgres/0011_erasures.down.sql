-- Refused once a job was erased, since no version before can read that.
-- Org by org: row-level security shows even the owner only the org that is named.
DO $$
DECLARE
    org UUID;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        IF EXISTS (SELECT FROM jobledger.job_event e WHERE e.org_id = org AND e.kind = 'erased')
            OR EXISTS (SELECT FROM jobledger.bulk_operation b
                WHERE b.org_id = org AND b.request::json ->> 'action' IN ('erase', 'cancel_and_erase'))
            OR EXISTS (SELECT FROM jobledger.org_event e WHERE e.org_id = org AND e.kind = 'bulk_started'
                AND e.detail_json ->> 'action' IN ('erase', 'cancel_and_erase')) THEN
            RAISE EXCEPTION 'jobs of org % were erased, which no version before can read', org;
        END IF;
    END LOOP;
END $$;
DROP TABLE jobledger.job_unblanked;
ALTER TABLE jobledger.job DROP COLUMN erased_at;
