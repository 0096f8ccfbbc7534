-- When a server last saw the clock, and which events happened elsewhere: their `ts` alone no longer says it.
ALTER TABLE ledger ADD COLUMN clock_seen_at INTEGER;
UPDATE job_event SET detail_json = json_set(coalesce(detail_json, '{}'), '$.past', json('true'))
WHERE ts <> recorded_at AND kind <> 'imported';
