-- loses: every API token
DROP FUNCTION jobledger.unchanged_jobs(UUID[], INTEGER[], UUID[], BIGINT[], TIMESTAMPTZ[], TIMESTAMPTZ[], BOOLEAN[], TIMESTAMPTZ[]);
DROP FUNCTION jobledger.resume_batch(UUID, BIGINT, TIMESTAMPTZ, BIGINT, UUID[], TIMESTAMPTZ[], BOOLEAN[], TIMESTAMPTZ[]);
DROP FUNCTION jobledger.resume_batch(UUID, BIGINT, TIMESTAMPTZ, BIGINT);
DROP FUNCTION jobledger.read_token(UUID, BYTEA);
ALTER TABLE jobledger.ledger DROP COLUMN credentials;
DROP TABLE jobledger.api_token;
