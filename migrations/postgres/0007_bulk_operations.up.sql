-- Bulk operations: one action on all jobs that match a filter, in bounded steps.
CREATE TABLE jobledger.bulk_operation (
    org_id      UUID         NOT NULL,
    id          UUID         NOT NULL,
    created_at  TIMESTAMPTZ  NOT NULL,
    updated_at  TIMESTAMPTZ  NOT NULL,
    finished_at TIMESTAMPTZ,                        -- null: it is under way
    status      VARCHAR(50)  COLLATE "C" NOT NULL,
    request     TEXT         NOT NULL,              -- JSON: what was asked for, and by whom
    through_seq BIGINT       NOT NULL,              -- head of the log when it began
    cursor      BIGINT       NOT NULL,              -- created_seq up to which the current phase has come
    matched     BIGINT       NOT NULL,
    reached     BIGINT       NOT NULL,
    changed     BIGINT       NOT NULL,
    unchanged   BIGINT       NOT NULL,
    failed      TEXT         NOT NULL,              -- JSON: how many, by reason
    PRIMARY KEY (org_id, id)
);
CREATE INDEX idx_bulk_operation_begun ON jobledger.bulk_operation (org_id, created_at, id);                         -- bulk_operations
CREATE INDEX idx_bulk_operation_open ON jobledger.bulk_operation (org_id, created_at, id) WHERE finished_at IS NULL; -- open_bulk
ALTER TABLE jobledger.bulk_operation ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.bulk_operation FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.bulk_operation USING (
    org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid)
    OR org_id = ANY ((SELECT string_to_array(nullif(current_setting('app.current_org_ids', true), ''), ',')::uuid[])::uuid[]));
