-- What an org has: its jobs, and the approximate bytes of them and their log (JobEvent::weight, Job::weight).
ALTER TABLE jobledger.org_head ADD COLUMN jobs BIGINT NOT NULL DEFAULT 0,       -- as of the last folded record: see org_record
    ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobledger.org_record ADD COLUMN jobs BIGINT NOT NULL DEFAULT 0,     -- as of this batch
    ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobledger.org_record ALTER COLUMN jobs DROP DEFAULT, ALTER COLUMN bytes DROP DEFAULT;
-- Org by org: row-level security shows even the owner only the org that is named. Only the last record's values count.
DO $$
DECLARE
    org UUID;
    found_jobs BIGINT;
    found_bytes BIGINT;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        SELECT count(*), coalesce(sum(1024 + j.payload_bytes), 0) INTO found_jobs, found_bytes FROM jobledger.job j WHERE j.org_id = org;
        found_bytes := found_bytes + (SELECT coalesce(sum(e.bytes), 0) FROM jobledger.job_event e WHERE e.org_id = org);
        UPDATE jobledger.org_head SET jobs = found_jobs, bytes = found_bytes WHERE org_id = org;
        UPDATE jobledger.org_record SET jobs = found_jobs, bytes = found_bytes WHERE org_id = org;
    END LOOP;
END $$;
