-- When each API token was last called with, give or take a minute. Apart from the tokens, to which servers may not write.
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
