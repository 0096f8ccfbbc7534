-- The ledger: per org a log of events, the jobs that are its fold, and counters over them.
--
-- Every primary and unique key starts with org_id, and every tenant table has row-level security by it. What is written
-- with every batch is only ever inserted: a version that an old snapshot still sees then stands in nobody's way.

-- An org's head row is what a batch locks. The log itself reaches on through org_batch: what stands here is as of the
-- last time that batches were folded, and that is rarely, since versions of a row that is updated with every batch pile up.
CREATE TABLE jobledger.org_head (
    org_id      UUID        NOT NULL PRIMARY KEY,
    seq         BIGINT      NOT NULL DEFAULT 0,     -- of the last event that is folded
    recorded_at TIMESTAMPTZ,                        -- of that event
    floor_seq   BIGINT      NOT NULL DEFAULT 1,     -- from here on the log is whole
    types       BIGINT      NOT NULL DEFAULT 0      -- rows of org_counter
) WITH (fillfactor = 50);

-- The batches since then: how far each brought the log, and by how much the counters of each type changed.
CREATE TABLE jobledger.org_batch (
    org_id      UUID        NOT NULL,
    seq         BIGINT      NOT NULL,               -- of the batch's last event
    recorded_at TIMESTAMPTZ NOT NULL,
    counts      JSONB       NOT NULL,               -- {type: [queued, running, succeeded, failed, canceled, dead_letter]}
    PRIMARY KEY (org_id, seq)
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
    PRIMARY KEY (org_id, type)
) WITH (fillfactor = 50);

-- Where in an org's log each month begins, so that a read by seq knows which partitions to visit.
CREATE TABLE jobledger.org_month (
    org_id    UUID        NOT NULL,
    month     TIMESTAMPTZ NOT NULL,                 -- its first instant, UTC
    first_seq BIGINT      NOT NULL,                 -- of its first event
    PRIMARY KEY (org_id, month)
);

CREATE TABLE jobledger.job (
    org_id             UUID         NOT NULL,
    id                 UUID         NOT NULL,
    type               VARCHAR(100) COLLATE "C" NOT NULL,
    status             VARCHAR(50)  COLLATE "C" NOT NULL DEFAULT 'queued',
    attempt            INTEGER      NOT NULL DEFAULT 0,
    max_attempts       INTEGER      NOT NULL DEFAULT 1,
    failures           INTEGER      NOT NULL DEFAULT 0,
    priority           INTEGER      NOT NULL DEFAULT 0,
    idempotency_key    VARCHAR(255) COLLATE "C",
    request_digest     BYTEA,                       -- of the create that came with the key
    requested_by       VARCHAR(255),
    labels             JSONB,                       -- an object, null when empty
    retry_initial      BIGINT       NOT NULL,       -- microseconds
    retry_multiplier   DOUBLE PRECISION NOT NULL,
    retry_max          BIGINT       NOT NULL,       -- microseconds
    created_at         TIMESTAMPTZ  NOT NULL DEFAULT now(),
    updated_at         TIMESTAMPTZ  NOT NULL DEFAULT now(),
    started_at         TIMESTAMPTZ,
    attempt_started_at TIMESTAMPTZ,
    finished_at        TIMESTAMPTZ,
    scheduled_at       TIMESTAMPTZ,
    ready_at           TIMESTAMPTZ  NOT NULL,
    cancel_requested   BOOLEAN      NOT NULL DEFAULT false,
    outcome_digest     BYTEA,                       -- of the report that ended the last attempt
    last_error_code    VARCHAR(100),
    last_error_message TEXT,
    result_seq         BIGINT,                      -- the event that brought the result
    result_recorded_at TIMESTAMPTZ,
    last_job_seq       BIGINT       NOT NULL,
    last_seq           BIGINT       NOT NULL,       -- the last event, which has stage and progress
    last_recorded_at   TIMESTAMPTZ  NOT NULL,
    PRIMARY KEY (org_id, id),
    CONSTRAINT ck_job_status CHECK (
        status IN ('queued', 'running', 'succeeded', 'failed', 'canceled', 'dead_letter')
    )
) WITH (fillfactor = 80);

-- No index names a column that a progress report changes, so that those updates are heap-only.
CREATE UNIQUE INDEX uq_job_org_idempotency ON jobledger.job (org_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX idx_job_queued ON jobledger.job (org_id, type, ready_at) WHERE status = 'queued';

-- Apart from job, whose rows are written anew with every event.
CREATE TABLE jobledger.job_payload (
    org_id  UUID  NOT NULL,
    job_id  UUID  NOT NULL,
    payload JSONB NOT NULL,
    PRIMARY KEY (org_id, job_id)
);

-- Partitioned by month. A key of a partitioned table has to hold what parts it; the head's lock makes seq unique.
CREATE TABLE jobledger.job_event (
    org_id      UUID         NOT NULL,
    seq         BIGINT       NOT NULL,
    job_id      UUID         NOT NULL,
    job_seq     BIGINT       NOT NULL,
    ts          TIMESTAMPTZ  NOT NULL DEFAULT now(),
    recorded_at TIMESTAMPTZ  NOT NULL,
    kind        VARCHAR(50)  COLLATE "C" NOT NULL,
    prev_status VARCHAR(50)  COLLATE "C",           -- null for a job's first event
    next_status VARCHAR(50)  COLLATE "C" NOT NULL,
    attempt     INTEGER      NOT NULL,
    actor       VARCHAR(255),
    job_type    VARCHAR(100) COLLATE "C" NOT NULL,
    detail_json JSONB,                              -- stage, progress, message, result, error_code, error_message, scheduled_at
    bytes       INTEGER      NOT NULL,              -- about what it takes in memory, to cut pages by
    PRIMARY KEY (org_id, seq, recorded_at)
) PARTITION BY RANGE (recorded_at);

CREATE INDEX idx_job_event_job ON jobledger.job_event (org_id, job_id, seq);

-- Row-level security. A setting that was never made, or was left behind by a transaction as '', matches no row. The
-- subquery is asked once a statement, not once a row.
DO $$
DECLARE
    tenant_table TEXT;
BEGIN
    FOREACH tenant_table IN ARRAY ARRAY['org_head', 'org_batch', 'org_counter', 'org_month', 'job', 'job_payload', 'job_event'] LOOP
        EXECUTE format('ALTER TABLE jobledger.%I ENABLE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('ALTER TABLE jobledger.%I FORCE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('CREATE POLICY org ON jobledger.%I USING (org_id = (SELECT nullif(current_setting(''app.current_org_id'', true), '''')::uuid))', tenant_table);
    END LOOP;
END $$;
