-- loses: nothing
DROP FUNCTION jobledger.read_jobs(UUID[], INTEGER[], UUID[], INTEGER);
DROP FUNCTION jobledger.resume_batch(UUID, BIGINT, BIGINT);
