-- The ledger: per org a log of events, the jobs that are its fold, and counters over them. Functions are in functions.sql.
--
-- Every primary and unique key starts with org_id, and every table of an org has row-level security by it. What is written
-- with every batch is only ever inserted: a version that an old snapshot still sees then stands in nobody's way.
-- An index names the reads that need it; one that names none has no place here.

-- One row, of the whole database.
CREATE TABLE jobledger.ledger (
    id                     SMALLINT    NOT NULL PRIMARY KEY CHECK (id = 1),
    log_id                 UUID        NOT NULL,                        -- another after a restore: cursors of before are void
    retention_paused_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity',    -- while a verification runs, or after the clock was set
    credentials            BIGINT      NOT NULL DEFAULT 0,              -- raised when a token is made or revoked; 0: none ever was
    clock_seen_at          TIMESTAMPTZ,                                 -- when a server last saw the clock
    functions              INTEGER     NOT NULL DEFAULT 0,              -- version of functions.sql; 0: they are not there
    functions_digest       BYTEA                                        -- SHA-256 of that file
);
INSERT INTO jobledger.ledger (id, log_id) VALUES (1, gen_random_uuid());

-- An org's head row is what a batch locks. The log itself reaches on through org_record: what stands here is as of the
-- last time that records were folded, and that is rarely, since versions of a row that is updated with every batch pile up.
CREATE TABLE jobledger.org_head (
    org_id      UUID        NOT NULL PRIMARY KEY,
    n           BIGINT      NOT NULL DEFAULT 0,     -- of the last record that is folded
    record      BIGINT      NOT NULL DEFAULT 0,     -- its id
    kept_n      BIGINT      NOT NULL DEFAULT 1,     -- before this one no record is kept
    seq         BIGINT      NOT NULL DEFAULT 0,     -- of the last event as of that record
    recorded_at TIMESTAMPTZ,                        -- of that event
    floor_seq   BIGINT      NOT NULL DEFAULT 1,     -- from here on the log is whole
    types       BIGINT      NOT NULL DEFAULT 0,     -- rows of org_counter
    ready_gen   BIGINT      NOT NULL DEFAULT 0,     -- batches that made a job ready
    removals    BIGINT      NOT NULL DEFAULT 0      -- batches that removed jobs
) WITH (fillfactor = 50);

-- A record for each batch that changed anything: how far it brought the log, and what it changed in the statistics of each type.
-- Kept for ten minutes, and until it is folded: by its records it is known which batches happened.
CREATE TABLE jobledger.org_record (
    org_id      UUID        NOT NULL,
    n           BIGINT      NOT NULL,               -- 1, 2, 3, …
    id          BIGINT      NOT NULL,               -- random: of two histories that differ no record has the same n and id
    prev        BIGINT      NOT NULL,               -- id of the record before; 0 of the first
    seq         BIGINT      NOT NULL,               -- of the log's last event then
    ready_gen   BIGINT      NOT NULL,               -- as of this batch
    recorded_at TIMESTAMPTZ NOT NULL,               -- of that event
    written_at  TIMESTAMPTZ NOT NULL,               -- by the clock
    format      SMALLINT    NOT NULL,               -- of this record; a server that does not know it can't go on
    -- {type: [queued, running, succeeded, failed, canceled, dead_letter, scheduled, created, started, succeeded, failed, retried,
    -- canceled, lost, [waits], [runs]]}: jobs by status, then what happened. Zeros at the end are left out.
    counts      JSONB       NOT NULL,
    PRIMARY KEY (org_id, n)
);

-- Jobs by type and status, as of org_head.seq.
CREATE TABLE jobledger.org_counter (
    org_id      UUID   NOT NULL,
    type        VARCHAR(100) COLLATE "C" NOT NULL,
    queued      BIGINT NOT NULL,
    running     BIGINT NOT NULL,
    succeeded   BIGINT NOT NULL,
    failed      BIGINT NOT NULL,
    canceled    BIGINT NOT NULL,
    dead_letter BIGINT NOT NULL,
    scheduled   BIGINT NOT NULL,                    -- of those that are queued, whose time is still to come
    PRIMARY KEY (org_id, type)
) WITH (fillfactor = 50);

-- What happened in each minute and each hour, by type. A row that is removed has what retention took away of it: what is in
-- the log and what was removed make up the row beside it.
CREATE TABLE jobledger.org_series (
    org_id    UUID        NOT NULL,
    width     SMALLINT    NOT NULL CHECK (width IN (60, 3600)),     -- seconds
    start     TIMESTAMPTZ NOT NULL,
    type      VARCHAR(100) COLLATE "C" NOT NULL,
    removed   BOOLEAN     NOT NULL,
    created   BIGINT      NOT NULL,
    started   BIGINT      NOT NULL,
    succeeded BIGINT      NOT NULL,
    failed    BIGINT      NOT NULL,
    retried   BIGINT      NOT NULL,
    canceled  BIGINT      NOT NULL,
    lost      BIGINT      NOT NULL,
    waits     BIGINT[]    NOT NULL,                                 -- how many there were of each size
    runs      BIGINT[]    NOT NULL,
    PRIMARY KEY (org_id, width, start, type, removed)
) WITH (fillfactor = 50);

-- Where in an org's log each month begins, so that a read by seq knows which partitions to visit.
CREATE TABLE jobledger.org_month (
    org_id    UUID        NOT NULL,
    month     TIMESTAMPTZ NOT NULL,                 -- its first instant, UTC
    first_seq BIGINT      NOT NULL,                 -- of its first event
    PRIMARY KEY (org_id, month)
);

-- A row for each org: when its background work is to be looked at again. It leads every server from org to org, so it has no
-- row-level security, and says nothing of an org but that it is there.
CREATE TABLE jobledger.org_due (
    org_id      UUID        NOT NULL PRIMARY KEY,
    next_due_at TIMESTAMPTZ NOT NULL,               -- for retention
    work_due_at TIMESTAMPTZ                         -- for leases, run time-outs and schedules; null: there are none
);
CREATE INDEX idx_org_due ON jobledger.org_due (next_due_at);                                           -- take_due
CREATE INDEX idx_org_due_work ON jobledger.org_due (work_due_at) WHERE work_due_at IS NOT NULL;        -- take_due

CREATE TABLE jobledger.job (
    org_id             UUID         NOT NULL,
    id                 UUID         NOT NULL,
    type               VARCHAR(100) COLLATE "C" NOT NULL,
    status             VARCHAR(50)  COLLATE "C" NOT NULL DEFAULT 'queued',
    attempt            INTEGER      NOT NULL DEFAULT 0,
    max_attempts       INTEGER      NOT NULL DEFAULT 1,
    failures           INTEGER      NOT NULL DEFAULT 0,
    max_lost_attempts  INTEGER      NOT NULL DEFAULT 3,
    lost_attempts      INTEGER      NOT NULL DEFAULT 0,         -- expired leases that did not count as failures
    priority           INTEGER      NOT NULL DEFAULT 0,
    payload_bytes      INTEGER      NOT NULL DEFAULT 0,         -- on the wire
    idempotency_key    VARCHAR(255) COLLATE "C",
    request_digest     BYTEA,                                   -- of the create that came with the key
    requested_by       VARCHAR(255),
    labels             JSONB,                                   -- an object, null when empty
    retry_initial      BIGINT       NOT NULL,                   -- microseconds
    retry_multiplier   DOUBLE PRECISION NOT NULL,
    retry_max          BIGINT       NOT NULL,                   -- microseconds
    run_timeout        BIGINT,                                  -- microseconds
    created_at         TIMESTAMPTZ  NOT NULL DEFAULT now(),
    created_seq        BIGINT       NOT NULL,                   -- the first event
    updated_at         TIMESTAMPTZ  NOT NULL DEFAULT now(),
    started_at         TIMESTAMPTZ,
    attempt_started_at TIMESTAMPTZ,
    finished_at        TIMESTAMPTZ,
    scheduled_at       TIMESTAMPTZ,
    ready_at           TIMESTAMPTZ  NOT NULL,
    due_at             TIMESTAMPTZ,                             -- when time itself may change the job, or earlier
    cancel_requested   BOOLEAN      NOT NULL DEFAULT false,
    outcome_digest     BYTEA,                                   -- of the report that ended the last attempt
    outcome_nonce      BIGINT,                                  -- of the lease under which that ended
    lease_worker       VARCHAR(255),                            -- null where nobody holds the job
    lease_granted      BIGINT,                                  -- microseconds
    lease_expires_at   TIMESTAMPTZ,
    lease_request      VARCHAR(255) COLLATE "C",                -- request_id of the claim
    lease_confirmed    BOOLEAN      NOT NULL DEFAULT false,     -- the holder was heard of since
    lease_nonce        BIGINT       NOT NULL DEFAULT 0,         -- of the last lease: no two have the same
    retry_request      VARCHAR(255),                            -- request_id of the last RetryJob
    last_error_code    VARCHAR(100),
    last_error_message TEXT,
    result_seq         BIGINT,                                  -- the event that brought the result
    result_recorded_at TIMESTAMPTZ,
    last_job_seq       BIGINT       NOT NULL,
    last_seq           BIGINT       NOT NULL,                   -- the last event, which has stage and progress
    last_recorded_at   TIMESTAMPTZ  NOT NULL,
    CONSTRAINT ck_job_status CHECK (
        status IN ('queued', 'running', 'succeeded', 'failed', 'canceled', 'dead_letter')
    )
) WITH (fillfactor = 80);

-- No index names a column that a progress report or a heartbeat changes, so that those updates are heap-only.
-- Beside each entry there is room for that of the row as it ends, whose key is the same: keys that were made one after the other,
-- as an SDK's are, stand together, and no page has to be parted then.
CREATE UNIQUE INDEX uq_job_org_idempotency ON jobledger.job (org_id, idempotency_key) WITH (fillfactor = 50) WHERE idempotency_key IS NOT NULL;   -- load_jobs
-- Jobs that may be claimed, in the order in which they are: load_ready; read_statistics, what has waited longest.
CREATE INDEX idx_job_ready ON jobledger.job (org_id, type, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
-- The same of all types together: load_all_ready.
CREATE INDEX idx_job_ready_all ON jobledger.job (org_id, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
CREATE INDEX idx_job_due ON jobledger.job (org_id, due_at) WHERE due_at IS NOT NULL;                               -- load_due, load_misdated, miscounted
CREATE INDEX idx_job_lease_request ON jobledger.job (org_id, lease_request, lease_worker) WHERE lease_request IS NOT NULL;       -- load_jobs
CREATE INDEX idx_job_status ON jobledger.job (org_id, status, created_seq);                                        -- list_jobs
-- Of those that have ended: others are few, or claimed soon, and found among all types.
CREATE INDEX idx_job_type ON jobledger.job (org_id, type, status, created_seq) WHERE finished_at IS NOT NULL;      -- list_jobs
CREATE INDEX idx_job_finished ON jobledger.job (org_id, status, finished_at) WHERE finished_at IS NOT NULL;        -- load_expired
-- While a table has no statistics, PostgreSQL takes an org's rows for one, and of the indexes that then cost the same the one
-- that was made last. That shall be the primary key: the plans that are made at first are kept for a while.
ALTER TABLE jobledger.job ADD PRIMARY KEY (org_id, id);

-- Apart from job, whose rows are written anew with every event. Text, as it was given: jsonb prints 1e308 with 309 digits.
CREATE TABLE jobledger.job_payload (
    org_id  UUID NOT NULL,
    job_id  UUID NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (org_id, job_id)
);

-- Jobs that are gone and whose events are still to go: more than one batch may remove.
CREATE TABLE jobledger.job_remains (
    org_id   UUID        NOT NULL,
    job_id   UUID        NOT NULL,
    last_seq BIGINT      NOT NULL,                  -- of the last of them
    since    TIMESTAMPTZ NOT NULL,                  -- when they were recorded
    until    TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (org_id, job_id)
);

-- Labels to find jobs by: list_jobs.
CREATE TABLE jobledger.job_label (
    org_id      UUID   NOT NULL,
    key         TEXT   COLLATE "C" NOT NULL,
    value       TEXT   COLLATE "C" NOT NULL,
    job_id      UUID   NOT NULL,
    created_seq BIGINT NOT NULL,
    PRIMARY KEY (org_id, key, value, created_seq)
);

-- Partitioned by month. A key of a partitioned table has to hold what parts it; the head's lock makes seq unique.
CREATE TABLE jobledger.job_event (
    org_id      UUID         NOT NULL,
    seq         BIGINT       NOT NULL,
    job_id      UUID         NOT NULL,
    job_seq     BIGINT       NOT NULL,
    ts          TIMESTAMPTZ  NOT NULL DEFAULT now(),
    recorded_at TIMESTAMPTZ  NOT NULL,
    attempt     INTEGER      NOT NULL,
    bytes       INTEGER      NOT NULL,              -- about what it takes in memory, to cut pages by
    kind        VARCHAR(50)  COLLATE "C" NOT NULL,
    prev_status VARCHAR(50)  COLLATE "C",           -- null for a job's first event
    next_status VARCHAR(50)  COLLATE "C" NOT NULL,
    actor       VARCHAR(255),
    job_type    VARCHAR(100) COLLATE "C" NOT NULL,
    -- stage, progress, message, error_code, error_message, scheduled_at, past (it happened elsewhere), and a result of up to 64 KiB for
    -- those who read the table
    detail_json JSONB,
    labels      JSONB,                              -- the job's, an object, null when empty
    result      TEXT,                               -- as it was given
    PRIMARY KEY (org_id, seq, recorded_at)
) PARTITION BY RANGE (recorded_at);

CREATE INDEX idx_job_event_job ON jobledger.job_event (org_id, job_id, seq);  -- read_job_log, read_histories, load_histories

-- Who may call: the SHA-256 of each token's secret. A token carries its org's id, so that it is looked up as of that org.
CREATE TABLE jobledger.api_token (
    org_id     UUID         NOT NULL,               -- ffffffff-ffff-ffff-ffff-ffffffffffff: of no org, for operators
    id         UUID         NOT NULL,
    digest     BYTEA        NOT NULL CHECK (length(digest) = 32),
    name       VARCHAR(255) NOT NULL,
    roles      TEXT         NOT NULL,               -- separated by commas
    created_at TIMESTAMPTZ  NOT NULL DEFAULT clock_timestamp(),
    expires_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ,
    PRIMARY KEY (org_id, id),
    UNIQUE (org_id, digest)                         -- read_token
);

-- Row-level security: a transaction names one org, or the several that share it, with commas between, and sees theirs alone. A setting
-- that was never made, or was left behind by a transaction as '', matches no row. The subqueries are asked once a statement, not once a
-- row; were both one condition on a list, PostgreSQL would look indexes through by that.
DO $$
DECLARE
    tenant_table TEXT;
BEGIN
    FOREACH tenant_table IN ARRAY ARRAY['org_head', 'org_record', 'org_counter', 'org_series', 'org_month', 'job', 'job_payload',
        'job_remains', 'job_label', 'job_event', 'api_token'] LOOP
        EXECUTE format('ALTER TABLE jobledger.%I ENABLE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('ALTER TABLE jobledger.%I FORCE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('CREATE POLICY org ON jobledger.%I USING (
            org_id = (SELECT nullif(current_setting(''app.current_org_id'', true), '''')::uuid)
            OR org_id = ANY ((SELECT string_to_array(nullif(current_setting(''app.current_org_ids'', true), ''''), '','')::uuid[])::uuid[]))',
            tenant_table);
    END LOOP;
END $$;
-- The owner of the tables makes, lists and revokes tokens; the serving role only looks them up.
CREATE POLICY owner ON jobledger.api_token TO CURRENT_USER USING (true);
