DROP INDEX jobledger.idx_api_token_revoked;
ALTER TABLE jobledger.api_token DROP COLUMN revoked_revision;
