-- loses: which labels find which jobs (the jobs keep their labels), and when background work is due
DROP FUNCTION jobledger.drop_empty_partitions();
DROP FUNCTION jobledger.make_partitions(INTEGER);
DROP FUNCTION jobledger.read_heads(UUID[]);
DROP FUNCTION jobledger.read_statistics(UUID, TEXT[]);
DROP FUNCTION jobledger.read_job_events(UUID, UUID, BIGINT, TEXT[], TEXT[], BIGINT, BIGINT);
DROP FUNCTION jobledger.read_org_events(UUID, BIGINT, BIGINT, TEXT[], TEXT[], BIGINT, BIGINT);
DROP FUNCTION jobledger.read_job(UUID, UUID);
DROP FUNCTION jobledger.open_batch(UUID);
DROP TABLE jobledger.org_due;
DROP TABLE jobledger.job_label;
DROP INDEX jobledger.idx_job_finished;
DROP INDEX jobledger.idx_job_type;
DROP INDEX jobledger.idx_job_status;
