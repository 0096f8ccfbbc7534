-- Workers that the server has heard of lately.
CREATE TABLE worker (
    org_id   BLOB    NOT NULL,
    id       TEXT    NOT NULL,
    about    TEXT    NOT NULL,                  -- JSON: what it asks for, and what it says of itself
    heard_at INTEGER NOT NULL,
    PRIMARY KEY (org_id, id)                    -- workers
) STRICT, WITHOUT ROWID;
