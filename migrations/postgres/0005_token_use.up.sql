-- When each API token was last used, within a minute. A table of its own, since servers may not write to api_token.
CREATE TABLE jobledger.api_token_use (
    org_id  UUID        NOT NULL,
    digest  BYTEA       NOT NULL,
    used_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (org_id, digest)
);
ALTER TABLE jobledger.api_token_use ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.api_token_use FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.api_token_use USING (
    org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid)
    OR org_id = ANY ((SELECT string_to_array(nullif(current_setting('app.current_org_ids', true), ''), ',')::uuid[])::uuid[]));
CREATE POLICY owner ON jobledger.api_token_use TO CURRENT_USER USING (true);
