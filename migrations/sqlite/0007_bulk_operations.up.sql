-- Bulk operations: one action on all jobs that match a filter, in bounded steps.
CREATE TABLE bulk_operation (
    org_id      BLOB    NOT NULL,
    id          BLOB    NOT NULL CHECK (length(id) = 16),
    created_at  INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL,
    finished_at INTEGER,                        -- null: it is under way
    status      TEXT    NOT NULL,
    request     TEXT    NOT NULL,               -- JSON: what was asked for, and by whom
    through_seq INTEGER NOT NULL,               -- head of the log when it began
    cursor      INTEGER NOT NULL,               -- created_seq up to which the current phase has come
    matched     INTEGER NOT NULL,
    reached     INTEGER NOT NULL,
    changed     INTEGER NOT NULL,
    unchanged   INTEGER NOT NULL,
    failed      TEXT    NOT NULL,               -- JSON: how many, by reason
    PRIMARY KEY (org_id, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX idx_bulk_operation_begun ON bulk_operation (org_id, created_at, id);                                   -- bulk_operations
CREATE INDEX idx_bulk_operation_open ON bulk_operation (org_id, created_at, id) WHERE finished_at IS NULL;          -- open_bulk
