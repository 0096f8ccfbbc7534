-- When a server last saw the clock, and which events happened elsewhere: their `ts` alone no longer says it.
ALTER TABLE jobledger.ledger ADD COLUMN clock_seen_at TIMESTAMPTZ;
ALTER TABLE jobledger.job_event NO FORCE ROW LEVEL SECURITY;
UPDATE jobledger.job_event SET detail_json = coalesce(detail_json, '{}') || '{"past": true}'
WHERE ts <> recorded_at AND kind <> 'imported';
ALTER TABLE jobledger.job_event FORCE ROW LEVEL SECURITY;
