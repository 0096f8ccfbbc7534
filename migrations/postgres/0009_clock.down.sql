-- loses: when a server last saw the clock
ALTER TABLE jobledger.job_event NO FORCE ROW LEVEL SECURITY;
UPDATE jobledger.job_event SET detail_json = nullif(detail_json - 'past', '{}') WHERE detail_json ? 'past';
ALTER TABLE jobledger.job_event FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.ledger DROP COLUMN clock_seen_at;
