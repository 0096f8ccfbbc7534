-- The value of ledger.credentials as of which a token was revoked: servers read those that were revoked since they last looked.
ALTER TABLE jobledger.api_token ADD COLUMN revoked_revision BIGINT;
CREATE INDEX idx_api_token_revoked ON jobledger.api_token (revoked_revision) WHERE revoked_revision IS NOT NULL;   -- revoked_tokens
