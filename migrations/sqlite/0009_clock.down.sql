-- loses: when a server last saw the clock
UPDATE job_event SET detail_json = nullif(json_remove(detail_json, '$.past'), '{}') WHERE json_type(detail_json, '$.past') IS NOT NULL;
ALTER TABLE ledger DROP COLUMN clock_seen_at;
