-- The ledger: per org a log of events, the jobs that are its fold, and counters over them.
--
-- Ids are the 16 bytes of a UUID, times are microseconds since 1970 (UTC). Every key starts with org_id.

CREATE TABLE org_head (
    org_id      BLOB    NOT NULL PRIMARY KEY CHECK (length(org_id) = 16),
    seq         INTEGER NOT NULL,               -- of the last event
    floor_seq   INTEGER NOT NULL DEFAULT 1,     -- from here on the log is whole
    recorded_at INTEGER,                        -- of the last event
    types       INTEGER NOT NULL                -- rows of org_counter
) STRICT, WITHOUT ROWID;

CREATE TABLE job (
    org_id             BLOB    NOT NULL CHECK (length(org_id) = 16),
    id                 BLOB    NOT NULL CHECK (length(id) = 16),
    type               TEXT    NOT NULL CHECK (length(type) BETWEEN 1 AND 100),
    status             TEXT    NOT NULL DEFAULT 'queued',
    attempt            INTEGER NOT NULL DEFAULT 0,
    max_attempts       INTEGER NOT NULL DEFAULT 1,
    failures           INTEGER NOT NULL DEFAULT 0,
    priority           INTEGER NOT NULL DEFAULT 0,
    idempotency_key    TEXT,
    request_digest     BLOB,                    -- of the create that came with the key
    requested_by       TEXT,
    labels             TEXT,                    -- a JSON object, null when empty
    retry_initial      INTEGER NOT NULL,        -- microseconds
    retry_multiplier   REAL    NOT NULL,
    retry_max          INTEGER NOT NULL,        -- microseconds
    created_at         INTEGER NOT NULL,
    updated_at         INTEGER NOT NULL,
    started_at         INTEGER,
    attempt_started_at INTEGER,
    finished_at        INTEGER,
    scheduled_at       INTEGER,
    ready_at           INTEGER NOT NULL,
    cancel_requested   INTEGER NOT NULL DEFAULT 0,
    outcome_digest     BLOB,                    -- of the report that ended the last attempt
    last_error_code    TEXT,
    last_error_message TEXT,
    result_seq         INTEGER,                 -- the event that brought the result
    last_job_seq       INTEGER NOT NULL,
    last_seq           INTEGER NOT NULL,        -- the last event, which has stage and progress
    PRIMARY KEY (org_id, id),
    CONSTRAINT ck_job_status CHECK (
        status IN ('queued', 'running', 'succeeded', 'failed', 'canceled', 'dead_letter')
    )
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX uq_job_org_idempotency ON job (org_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX idx_job_queued ON job (org_id, type, ready_at) WHERE status = 'queued';

-- Apart from job, whose rows are written anew with every event.
CREATE TABLE job_payload (
    org_id  BLOB NOT NULL,
    job_id  BLOB NOT NULL,
    payload TEXT NOT NULL,                      -- JSON
    PRIMARY KEY (org_id, job_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE job_event (
    org_id      BLOB    NOT NULL,
    seq         INTEGER NOT NULL,
    job_id      BLOB    NOT NULL,
    job_seq     INTEGER NOT NULL,
    ts          INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL,
    kind        TEXT    NOT NULL,
    prev_status TEXT,                           -- null for a job's first event
    next_status TEXT    NOT NULL,
    attempt     INTEGER NOT NULL,
    actor       TEXT,
    job_type    TEXT    NOT NULL,
    detail_json TEXT,                           -- stage, progress, message, result, error_code, error_message, scheduled_at
    PRIMARY KEY (org_id, seq)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX idx_job_event_job ON job_event (org_id, job_id, seq);

-- Jobs by type and status, kept by the batches that change them.
CREATE TABLE org_counter (
    org_id      BLOB    NOT NULL,
    type        TEXT    NOT NULL,
    queued      INTEGER NOT NULL,
    running     INTEGER NOT NULL,
    succeeded   INTEGER NOT NULL,
    failed      INTEGER NOT NULL,
    canceled    INTEGER NOT NULL,
    dead_letter INTEGER NOT NULL,
    PRIMARY KEY (org_id, type)
) STRICT, WITHOUT ROWID;
