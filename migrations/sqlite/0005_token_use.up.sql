-- When each API token was last used, within a minute.
CREATE TABLE api_token_use (
    org_id  BLOB    NOT NULL,
    digest  BLOB    NOT NULL,
    used_at INTEGER NOT NULL,
    PRIMARY KEY (org_id, digest)
) STRICT, WITHOUT ROWID;
