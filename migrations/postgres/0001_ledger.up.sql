-- The ledger: for each org a log of events, the jobs that are its fold, and counters. Functions are in functions.sql.
--
-- Every primary and unique key starts with org_id, and every table of an org has row-level security by it. What every batch
-- writes is only inserted: an update would leave row versions behind for as long as an old snapshot sees them. Each index names
-- the reads that need it. An index without such a read has to go.

-- One row for the whole database.
CREATE TABLE jobledger.ledger (
    id                     SMALLINT    NOT NULL PRIMARY KEY CHECK (id = 1),
    log_id                 UUID        NOT NULL,                        -- a restore changes it; older cursors are refused then
    retention_paused_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity',    -- during a verification, or after the clock was set
    credentials            BIGINT      NOT NULL DEFAULT 0,              -- raised when a token is made or revoked; 0: never raised
    clock_seen_at          TIMESTAMPTZ,                                 -- when a server last saw the clock
    functions              INTEGER     NOT NULL DEFAULT 0,              -- version of functions.sql; 0: the functions are missing
    functions_digest       BYTEA                                        -- SHA-256 of that file
);
INSERT INTO jobledger.ledger (id, log_id) VALUES (1, gen_random_uuid());

-- A batch locks the head row of its org. The log goes on in org_record: the values here are as of the last folded record.
-- Records are folded rarely, since a row that every batch updates piles up versions.
CREATE TABLE jobledger.org_head (
    org_id      UUID        NOT NULL PRIMARY KEY,
    n           BIGINT      NOT NULL DEFAULT 0,     -- number of the last folded record
    record      BIGINT      NOT NULL DEFAULT 0,     -- id of that record
    kept_n      BIGINT      NOT NULL DEFAULT 1,     -- records below this number were removed
    seq         BIGINT      NOT NULL DEFAULT 0,     -- seq of the last event as of that record
    recorded_at TIMESTAMPTZ,                        -- of that event
    floor_seq   BIGINT      NOT NULL DEFAULT 1,     -- the log is whole from this seq on
    types       BIGINT      NOT NULL DEFAULT 0,     -- how many types the jobs have: rows of org_counter
    ready_gen   BIGINT      NOT NULL DEFAULT 0,     -- how many batches made a job ready
    removals    BIGINT      NOT NULL DEFAULT 0      -- how many batches removed jobs
) WITH (fillfactor = 50);

-- A record for each batch that changed anything: how far it brought the log, and how it changed the statistics of each type. A
-- record shows that its batch happened. It is kept for ten minutes, and until it is folded.
CREATE TABLE jobledger.org_record (
    org_id      UUID        NOT NULL,
    n           BIGINT      NOT NULL,               -- 1, 2, 3, …
    id          BIGINT      NOT NULL,               -- random: records of two different histories never share both n and id
    prev        BIGINT      NOT NULL,               -- id of the record before; 0 for the first
    seq         BIGINT      NOT NULL,               -- seq of the log's last event as of this batch
    ready_gen   BIGINT      NOT NULL,               -- as of this batch
    recorded_at TIMESTAMPTZ NOT NULL,               -- of that event
    written_at  TIMESTAMPTZ NOT NULL,               -- when the batch ran, by the clock
    format      SMALLINT    NOT NULL,               -- version of the record's format: 1
    -- {type: [queued, running, succeeded, failed, canceled, dead_letter, scheduled, created, started, succeeded, failed,
    -- retried, canceled, lost, [waits], [runs]]}: changes of job counts, then what happened. Zeros at the end are left out.
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
    scheduled   BIGINT NOT NULL,                    -- queued jobs whose time is still to come
    PRIMARY KEY (org_id, type)
) WITH (fillfactor = 50);

-- What happened in each minute and each hour, by type. A row with removed = true has the part that retention removed from the
-- log. The log still has the rest of the row beside it.
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
    waits     BIGINT[]    NOT NULL,                                 -- histogram: how many durations of each size
    runs      BIGINT[]    NOT NULL,
    PRIMARY KEY (org_id, width, start, type, removed)
) WITH (fillfactor = 50);

-- The seq at which each month begins in an org's log. A read by seq finds the partitions to visit here.
CREATE TABLE jobledger.org_month (
    org_id    UUID        NOT NULL,
    month     TIMESTAMPTZ NOT NULL,                 -- its first instant, UTC
    first_seq BIGINT      NOT NULL,                 -- seq of its first event
    PRIMARY KEY (org_id, month)
);

-- A row for each org: when its background work is due. Every server finds the orgs here, so the table has no row-level
-- security, and shows nothing of an org except that it exists.
CREATE TABLE jobledger.org_due (
    org_id      UUID        NOT NULL PRIMARY KEY,
    next_due_at TIMESTAMPTZ NOT NULL,               -- when retention is due
    work_due_at TIMESTAMPTZ                         -- when leases, run time-outs or schedules are due; null: there are none
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
    lost_attempts      INTEGER      NOT NULL DEFAULT 0,         -- lost attempts that did not count as failures
    priority           INTEGER      NOT NULL DEFAULT 0,
    payload_bytes      INTEGER      NOT NULL DEFAULT 0,         -- size on the wire
    idempotency_key    VARCHAR(255) COLLATE "C",
    request_digest     BYTEA,                                   -- digest of the create that had the key
    requested_by       VARCHAR(255),
    labels             JSONB,                                   -- JSON object; null when empty
    retry_initial      BIGINT       NOT NULL,                   -- microseconds
    retry_multiplier   DOUBLE PRECISION NOT NULL,
    retry_max          BIGINT       NOT NULL,                   -- microseconds
    run_timeout        BIGINT,                                  -- microseconds
    created_at         TIMESTAMPTZ  NOT NULL DEFAULT now(),
    created_seq        BIGINT       NOT NULL,                   -- seq of the first event
    updated_at         TIMESTAMPTZ  NOT NULL DEFAULT now(),
    started_at         TIMESTAMPTZ,
    attempt_started_at TIMESTAMPTZ,
    finished_at        TIMESTAMPTZ,
    scheduled_at       TIMESTAMPTZ,
    ready_at           TIMESTAMPTZ  NOT NULL,
    due_at             TIMESTAMPTZ,                             -- when a wait, lease or attempt ends, or earlier; null: none does
    cancel_requested   BOOLEAN      NOT NULL DEFAULT false,
    outcome_digest     BYTEA,                                   -- digest of the report that ended the last attempt
    outcome_nonce      BIGINT,                                  -- nonce of the lease of that report
    lease_worker       VARCHAR(255),                            -- null: the job is not leased
    lease_granted      BIGINT,                                  -- microseconds
    lease_expires_at   TIMESTAMPTZ,
    lease_request      VARCHAR(255) COLLATE "C",                -- request_id of the claim
    lease_confirmed    BOOLEAN      NOT NULL DEFAULT false,     -- the worker was heard from since the claim
    lease_nonce        BIGINT       NOT NULL DEFAULT 0,         -- nonce of the last lease; no two leases share one
    retry_request      VARCHAR(255),                            -- request_id of the last RetryJob
    last_error_code    VARCHAR(100),
    last_error_message TEXT,
    result_seq         BIGINT,                                  -- seq of the event with the result
    result_recorded_at TIMESTAMPTZ,
    last_job_seq       BIGINT       NOT NULL,
    last_seq           BIGINT       NOT NULL,                   -- seq of the last event, which has stage and progress
    last_recorded_at   TIMESTAMPTZ  NOT NULL,
    CONSTRAINT ck_job_status CHECK (
        status IN ('queued', 'running', 'succeeded', 'failed', 'canceled', 'dead_letter')
    )
) WITH (fillfactor = 80);

-- No index has a column that a progress report changes, so such updates are heap-only.
-- Half of each page stays free for the entries of the same rows when their jobs end, under the same keys. Keys that are made
-- one after another, as an SDK's are, share pages, which then need not be split: load_jobs.
CREATE UNIQUE INDEX uq_job_org_idempotency ON jobledger.job (org_id, idempotency_key) WITH (fillfactor = 50) WHERE idempotency_key IS NOT NULL;
-- Ready jobs in claim order: load_ready; read_statistics, for the jobs that have waited longest.
CREATE INDEX idx_job_ready ON jobledger.job (org_id, type, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
-- The same for all types together: load_all_ready.
CREATE INDEX idx_job_ready_all ON jobledger.job (org_id, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
CREATE INDEX idx_job_due ON jobledger.job (org_id, due_at) WHERE due_at IS NOT NULL; -- load_due, load_misdated, miscounted
-- load_jobs, load_all_held.
CREATE INDEX idx_job_lease_request ON jobledger.job (org_id, lease_request, lease_worker) WHERE lease_request IS NOT NULL;
CREATE INDEX idx_job_status ON jobledger.job (org_id, status, created_seq);                                        -- list_jobs
-- Finished jobs only: others are few or soon claimed, and are found among all types.
CREATE INDEX idx_job_type ON jobledger.job (org_id, type, status, created_seq) WHERE finished_at IS NOT NULL;      -- list_jobs
CREATE INDEX idx_job_finished ON jobledger.job (org_id, status, finished_at) WHERE finished_at IS NOT NULL;        -- load_expired
-- Without statistics PostgreSQL assumes that an org has one row. Among indexes of equal cost it then uses the one created last.
-- That has to be the primary key, since the first plans are kept for a while.
ALTER TABLE jobledger.job ADD PRIMARY KEY (org_id, id);

-- Apart from job, whose rows are written again as the job changes. Text, as it was given: jsonb prints 1e308 with 309 digits.
CREATE TABLE jobledger.job_payload (
    org_id  UUID NOT NULL,
    job_id  UUID NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (org_id, job_id)
);

-- Removed jobs whose events are still to be removed: they are more than one batch may remove.
CREATE TABLE jobledger.job_remains (
    org_id   UUID        NOT NULL,
    job_id   UUID        NOT NULL,
    last_seq BIGINT      NOT NULL,                  -- seq of the last of these events
    since    TIMESTAMPTZ NOT NULL,                  -- bounds of their recorded_at
    until    TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (org_id, job_id)
);

-- Labels by which list_jobs finds jobs.
CREATE TABLE jobledger.job_label (
    org_id      UUID   NOT NULL,
    key         TEXT   COLLATE "C" NOT NULL,
    value       TEXT   COLLATE "C" NOT NULL,
    job_id      UUID   NOT NULL,
    created_seq BIGINT NOT NULL,
    PRIMARY KEY (org_id, key, value, created_seq)
);

-- Partitioned by month. A key of a partitioned table has to include the partition key; the head's lock makes seq unique.
CREATE TABLE jobledger.job_event (
    org_id      UUID         NOT NULL,
    seq         BIGINT       NOT NULL,
    job_id      UUID         NOT NULL,
    job_seq     BIGINT       NOT NULL,
    ts          TIMESTAMPTZ  NOT NULL DEFAULT now(),
    recorded_at TIMESTAMPTZ  NOT NULL,
    attempt     INTEGER      NOT NULL,
    bytes       INTEGER      NOT NULL,              -- approximate size in memory, by which pages are cut
    kind        VARCHAR(50)  COLLATE "C" NOT NULL,
    prev_status VARCHAR(50)  COLLATE "C",           -- null for a job's first event
    next_status VARCHAR(50)  COLLATE "C" NOT NULL,
    actor       VARCHAR(255),
    job_type    VARCHAR(100) COLLATE "C" NOT NULL,
    -- stage, progress, message, error_code, error_message, scheduled_at, origin (of an import), past (it happened in another
    -- system), and for people who read the table a result of up to 64 KiB
    detail_json JSONB,
    labels      JSONB,                              -- labels of the job: JSON object; null when empty
    result      TEXT,                               -- as it was given
    PRIMARY KEY (org_id, seq, recorded_at)
) PARTITION BY RANGE (recorded_at);

-- last_event, read_job_log, read_histories, load_histories.
CREATE INDEX idx_job_event_job ON jobledger.job_event (org_id, job_id, seq);

-- API tokens, by the SHA-256 of their secrets. A token contains the id of its org, so that a server looks it up in that org.
CREATE TABLE jobledger.api_token (
    org_id     UUID         NOT NULL,               -- ffffffff-ffff-ffff-ffff-ffffffffffff: no org, for operators
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

-- Row-level security: a transaction names one org, or several that share it (separated by commas), and sees only their rows. A
-- setting that was never set, or that a transaction left behind as '', matches no row. The subqueries run once a statement, not
-- once a row. With a single condition on a list, PostgreSQL would search indexes by that.
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
