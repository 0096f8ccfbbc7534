-- loses: what happened over time (rates and durations), and the log's identity
DROP FUNCTION jobledger.page_of_job(UUID, UUID, BIGINT, TEXT[], TEXT[], BOOLEAN, JSONB, BIGINT, BIGINT);
DROP FUNCTION jobledger.page_of_log(UUID, BIGINT, BIGINT, TEXT[], TEXT[], BOOLEAN, JSONB, BIGINT, BIGINT);
DROP FUNCTION jobledger.read_histories(UUID, UUID[], BIGINT, BIGINT, BIGINT);
DROP FUNCTION jobledger.count_events(UUID, BIGINT, BIGINT);
DROP FUNCTION jobledger.count_scheduled(UUID, TEXT);
DROP FUNCTION jobledger.read_series(UUID);
DROP FUNCTION jobledger.summarize(UUID, TEXT[], INTERVAL, SMALLINT, BOOLEAN);
DROP FUNCTION jobledger.to_counts(JSONB);
DROP AGGREGATE jobledger.sum_counts(BIGINT[]);
DROP FUNCTION jobledger.add_counts(BIGINT[], BIGINT[]);
DROP TABLE jobledger.org_series;
-- What is not folded yet has more than the older schema knows; it reads the first six.
ALTER TABLE jobledger.org_counter DROP COLUMN scheduled;
ALTER TABLE jobledger.job_event DROP COLUMN labels;
DROP TABLE jobledger.ledger;
