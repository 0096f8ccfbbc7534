DROP INDEX idx_api_token_revoked;
ALTER TABLE api_token DROP COLUMN revoked_revision;
