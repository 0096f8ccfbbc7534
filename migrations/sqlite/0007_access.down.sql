-- loses: every API token
ALTER TABLE ledger DROP COLUMN credentials;
DROP TABLE api_token;
