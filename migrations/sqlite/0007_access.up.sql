-- API tokens.

-- Who may call: the SHA-256 of each token's secret. A token carries its org's id.
CREATE TABLE api_token (
    org_id     BLOB    NOT NULL CHECK (length(org_id) = 16),   -- 16 bytes 0xff: of no org, for operators
    id         BLOB    NOT NULL CHECK (length(id) = 16),
    digest     BLOB    NOT NULL CHECK (length(digest) = 32),
    name       TEXT    NOT NULL,
    roles      TEXT    NOT NULL,                               -- separated by commas
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER,
    PRIMARY KEY (org_id, id),
    UNIQUE (org_id, digest)
) STRICT;

-- Raised whenever a token is made or revoked, so that a server knows when to look again. 0: there has never been one.
ALTER TABLE ledger ADD COLUMN credentials INTEGER NOT NULL DEFAULT 0;
