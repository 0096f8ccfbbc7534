-- loses: what happened over time (rates and durations), and the log's identity
DROP TABLE org_series;
ALTER TABLE org_head DROP COLUMN removals;
ALTER TABLE org_counter DROP COLUMN scheduled;
ALTER TABLE job_event DROP COLUMN labels;
DROP TABLE ledger;
