-- The ledger: for each org a log of events, the jobs that are its fold, and counters.
--
-- Ids are the 16 bytes of a UUID, times are microseconds since 1970 (UTC). Every key of an org's table starts with org_id.
-- Each index names the statements that need it. An index without such a statement has to go.

-- One row for the whole database.
CREATE TABLE ledger (
    id                     INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    log_id                 BLOB    NOT NULL CHECK (length(log_id) = 16),    -- a restore changes it; older cursors are refused
    retention_paused_until INTEGER NOT NULL DEFAULT 0,                      -- during a verification, or after the clock was set
    credentials            INTEGER NOT NULL DEFAULT 0,                      -- raised when a token is made or revoked; 0: never
    clock_seen_at          INTEGER                                          -- when a server last saw the clock
) STRICT;
INSERT INTO ledger (id, log_id) VALUES (1, randomblob(16));

CREATE TABLE org_head (
    org_id      BLOB    NOT NULL PRIMARY KEY CHECK (length(org_id) = 16),
    seq         INTEGER NOT NULL,               -- seq of the last event
    floor_seq   INTEGER NOT NULL DEFAULT 1,     -- the log is whole from this seq on
    recorded_at INTEGER,                        -- of the last event
    types       INTEGER NOT NULL,               -- how many types the jobs have: rows of org_counter
    ready_gen   INTEGER NOT NULL DEFAULT 0,     -- how many batches made a job ready
    removals    INTEGER NOT NULL DEFAULT 0,     -- how many batches removed jobs
    n           INTEGER NOT NULL DEFAULT 0,     -- number of the last record
    record      INTEGER NOT NULL DEFAULT 0      -- id of that record
) STRICT, WITHOUT ROWID;

-- A record for each batch that changed anything: how far it brought the log. A record shows that its batch happened. It is kept
-- for ten minutes.
CREATE TABLE org_record (
    org_id      BLOB    NOT NULL,
    n           INTEGER NOT NULL,               -- 1, 2, 3, …
    id          INTEGER NOT NULL,               -- random: records of two different histories never share both n and id
    prev        INTEGER NOT NULL,               -- id of the record before; 0 for the first
    seq         INTEGER NOT NULL,               -- seq of the log's last event as of this batch
    ready_gen   INTEGER NOT NULL,               -- as of this batch
    recorded_at INTEGER NOT NULL,               -- of that event
    written_at  INTEGER NOT NULL,               -- when the batch ran, by the clock
    format      INTEGER NOT NULL,               -- version of the record's format; a server that does not know it can't go on
    PRIMARY KEY (org_id, n)
) STRICT;

-- Jobs by type and status, maintained by the batches that change them.
CREATE TABLE org_counter (
    org_id      BLOB    NOT NULL,
    type        TEXT    NOT NULL,
    queued      INTEGER NOT NULL,
    running     INTEGER NOT NULL,
    succeeded   INTEGER NOT NULL,
    failed      INTEGER NOT NULL,
    canceled    INTEGER NOT NULL,
    dead_letter INTEGER NOT NULL,
    scheduled   INTEGER NOT NULL,               -- queued jobs whose time is still to come
    PRIMARY KEY (org_id, type)
) STRICT, WITHOUT ROWID;

-- What happened in each minute and each hour, by type. A row with removed = 1 has the part that retention removed from the log.
-- The log still has the rest of the row beside it.
CREATE TABLE org_series (
    org_id    BLOB    NOT NULL,
    width     INTEGER NOT NULL CHECK (width IN (60, 3600)), -- seconds
    start     INTEGER NOT NULL,
    type      TEXT    NOT NULL,
    removed   INTEGER NOT NULL,
    created   INTEGER NOT NULL,
    started   INTEGER NOT NULL,
    succeeded INTEGER NOT NULL,
    failed    INTEGER NOT NULL,
    retried   INTEGER NOT NULL,
    canceled  INTEGER NOT NULL,
    lost      INTEGER NOT NULL,
    waits     TEXT    NOT NULL,                             -- histogram, a JSON array: how many durations of each size
    runs      TEXT    NOT NULL,
    PRIMARY KEY (org_id, width, start, type, removed)
) STRICT, WITHOUT ROWID;

-- A row for each org: when its background work is due.
CREATE TABLE org_due (
    org_id      BLOB    NOT NULL PRIMARY KEY CHECK (length(org_id) = 16),
    next_due_at INTEGER NOT NULL,               -- when retention is due
    work_due_at INTEGER                         -- when leases, run time-outs or schedules are due; null: there are none
) STRICT, WITHOUT ROWID;
CREATE INDEX idx_org_due ON org_due (next_due_at);                                      -- due_retention
CREATE INDEX idx_org_due_work ON org_due (work_due_at) WHERE work_due_at IS NOT NULL;   -- due_jobs

-- No CHECK of this table calls a function: SQLite would then keep a copy of each page that a statement changes, to undo that
-- statement alone.
CREATE TABLE job (
    org_id             BLOB    NOT NULL,
    id                 BLOB    NOT NULL,
    type               TEXT    NOT NULL,
    status             TEXT    NOT NULL DEFAULT 'queued',
    attempt            INTEGER NOT NULL DEFAULT 0,
    max_attempts       INTEGER NOT NULL DEFAULT 1,
    failures           INTEGER NOT NULL DEFAULT 0,
    max_lost_attempts  INTEGER NOT NULL DEFAULT 3,
    lost_attempts      INTEGER NOT NULL DEFAULT 0,          -- lost attempts that did not count as failures
    priority           INTEGER NOT NULL DEFAULT 0,
    payload_bytes      INTEGER NOT NULL DEFAULT 0,          -- size on the wire
    idempotency_key    TEXT,
    request_digest     BLOB,                                -- digest of the create that had the key
    requested_by       TEXT,
    labels             TEXT,                                -- JSON object; null when empty
    retry_initial      INTEGER NOT NULL,                    -- microseconds
    retry_multiplier   REAL    NOT NULL,
    retry_max          INTEGER NOT NULL,                    -- microseconds
    run_timeout        INTEGER,                             -- microseconds
    created_at         INTEGER NOT NULL,
    created_seq        INTEGER NOT NULL,                    -- seq of the first event
    updated_at         INTEGER NOT NULL,
    started_at         INTEGER,
    attempt_started_at INTEGER,
    finished_at        INTEGER,
    scheduled_at       INTEGER,
    ready_at           INTEGER NOT NULL,
    due_at             INTEGER,                             -- when a wait, lease or attempt ends, or earlier; null: none does
    cancel_requested   INTEGER NOT NULL DEFAULT 0,
    outcome_digest     BLOB,                                -- digest of the report that ended the last attempt
    outcome_nonce      INTEGER,                             -- nonce of the lease of that report
    lease_worker       TEXT,                                -- null: the job is not leased
    lease_granted      INTEGER,                             -- microseconds
    lease_expires_at   INTEGER,
    lease_request      TEXT,                                -- request_id of the claim
    lease_confirmed    INTEGER NOT NULL DEFAULT 0,          -- the worker was heard from since the claim
    lease_nonce        INTEGER NOT NULL DEFAULT 0,          -- nonce of the last lease; no two leases share one
    retry_request      TEXT,                                -- request_id of the last RetryJob
    last_error_code    TEXT,
    last_error_message TEXT,
    result_seq         INTEGER,                             -- seq of the event with the result
    result_recorded_at INTEGER,
    last_job_seq       INTEGER NOT NULL,
    last_seq           INTEGER NOT NULL,                    -- seq of the last event, which has stage and progress
    last_recorded_at   INTEGER NOT NULL,
    PRIMARY KEY (org_id, id),
    CONSTRAINT ck_job_status CHECK (
        status IN ('queued', 'running', 'succeeded', 'failed', 'canceled', 'dead_letter')
    )
) STRICT, WITHOUT ROWID;

-- No index has a column that a progress report changes.
CREATE UNIQUE INDEX uq_job_org_idempotency ON job (org_id, idempotency_key) WHERE idempotency_key IS NOT NULL;      -- load_jobs
-- Ready jobs in claim order: load_ready_of; statistics, for the jobs that have waited longest.
CREATE INDEX idx_job_ready ON job (org_id, type, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
-- The same for all types together: load_all_ready.
CREATE INDEX idx_job_ready_all ON job (org_id, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
CREATE INDEX idx_job_due ON job (org_id, due_at) WHERE due_at IS NOT NULL;      -- load_due, load_misdated, miscounted
-- load_held, load_all_held.
CREATE INDEX idx_job_lease_request ON job (org_id, lease_request, lease_worker) WHERE lease_request IS NOT NULL;
CREATE INDEX idx_job_status ON job (org_id, status, created_seq);                                       -- list
-- Finished jobs only: others are few or soon claimed, and are found among all types.
CREATE INDEX idx_job_type ON job (org_id, type, status, created_seq) WHERE finished_at IS NOT NULL;     -- list
CREATE INDEX idx_job_finished ON job (org_id, status, finished_at) WHERE finished_at IS NOT NULL;       -- load_expired

-- Apart from job, whose rows are written again as the job changes. With row ids: in a table without, a search compares whole
-- rows, and reads all of each row that it passes.
CREATE TABLE job_payload (
    org_id  BLOB NOT NULL,
    job_id  BLOB NOT NULL,
    payload TEXT NOT NULL,                      -- JSON, as it was given
    PRIMARY KEY (org_id, job_id)
) STRICT;

-- Larger results, apart from their events for the same reason.
CREATE TABLE job_result (
    org_id BLOB    NOT NULL,
    job_id BLOB    NOT NULL,
    seq    INTEGER NOT NULL,                    -- seq of the event
    result TEXT    NOT NULL,                    -- JSON, as it was given
    PRIMARY KEY (org_id, job_id, seq)
) STRICT;

-- Removed jobs whose events are still to be removed: they are more than one batch may remove.
CREATE TABLE job_remains (
    org_id   BLOB    NOT NULL,
    job_id   BLOB    NOT NULL,
    last_seq INTEGER NOT NULL,                  -- seq of the last of these events
    since    INTEGER NOT NULL,                  -- bounds of their recorded_at
    until    INTEGER NOT NULL,
    PRIMARY KEY (org_id, job_id)
) STRICT, WITHOUT ROWID;

-- Labels by which list finds jobs.
CREATE TABLE job_label (
    org_id      BLOB    NOT NULL,
    key         TEXT    NOT NULL,
    value       TEXT    NOT NULL,
    created_seq INTEGER NOT NULL,
    job_id      BLOB    NOT NULL,
    PRIMARY KEY (org_id, key, value, created_seq)
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
    -- stage, progress, message, a result of up to 512 bytes, error_code, error_message, scheduled_at, origin (of an import), past
    -- (it happened in another system)
    detail_json TEXT,
    labels      TEXT,                           -- labels of the job: JSON object; null when empty
    PRIMARY KEY (org_id, seq)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX idx_job_event_job ON job_event (org_id, job_id, seq);   -- job_events, histories, load_histories

-- API tokens, by the SHA-256 of their secrets. A token contains the id of its org.
CREATE TABLE api_token (
    org_id     BLOB    NOT NULL CHECK (length(org_id) = 16),   -- 16 bytes 0xff: no org, for operators
    id         BLOB    NOT NULL CHECK (length(id) = 16),
    digest     BLOB    NOT NULL CHECK (length(digest) = 32),
    name       TEXT    NOT NULL,
    roles      TEXT    NOT NULL,                               -- separated by commas
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER,
    PRIMARY KEY (org_id, id),
    UNIQUE (org_id, digest)                                    -- find
) STRICT;
