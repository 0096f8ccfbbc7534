//! The tables of the service that jobledger replaces, as its report shows them, with rows as years of use leave them.

/// The tables of the report, without the constraints that its oldest rows would break.
pub(crate) const TABLES: &str = "
    CREATE TABLE jobs (
        id UUID PRIMARY KEY, status VARCHAR, stage VARCHAR, progress INTEGER, result JSONB, error TEXT,
        created_at TIMESTAMPTZ, updated_at TIMESTAMPTZ
    );
    CREATE INDEX idx_jobs_status ON jobs(status);
    CREATE INDEX idx_jobs_created_at ON jobs(created_at);
    CREATE TABLE job (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), org_id UUID NOT NULL, type VARCHAR(100) NOT NULL,
        status VARCHAR(50) NOT NULL DEFAULT 'queued', attempt INTEGER NOT NULL DEFAULT 0, priority INTEGER NOT NULL DEFAULT 0,
        idempotency_key VARCHAR(255), requested_by VARCHAR(255),
        created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(), updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
        started_at TIMESTAMPTZ, finished_at TIMESTAMPTZ, last_error_code VARCHAR(100), last_error_message TEXT
    );
    CREATE INDEX idx_job_org_status ON job(org_id, status, created_at);
    CREATE INDEX idx_job_type_status ON job(type, status);
    CREATE TABLE job_event (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), job_id UUID NOT NULL REFERENCES job(id) ON DELETE CASCADE,
        ts TIMESTAMPTZ NOT NULL DEFAULT NOW(), prev_status VARCHAR(50), next_status VARCHAR(50) NOT NULL, detail_json JSONB
    );
    CREATE INDEX idx_job_event_job_ts ON job_event(job_id, ts DESC);
    CREATE INDEX idx_job_event_ts ON job_event(ts DESC);";

/// `n` rows of `jobs`: every status, and now and then a row with one of the oddities that the old service let in.
const JOBS: &str = r#"
    INSERT INTO jobs SELECT
        md5('jobs ' || n)::uuid,
        CASE WHEN n % 211 = 0 THEN 'archived' WHEN n % 223 = 0 THEN NULL
             ELSE (ARRAY['pending', 'processing', 'completed', 'completed', 'failed', 'canceled'])[1 + n % 6] END,
        CASE n % 5 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN 'extrahiere ü 🦀' ELSE 'extracting' END,
        CASE WHEN n % 101 = 0 THEN 250 WHEN n % 103 = 0 THEN -5 WHEN n % 7 = 0 THEN NULL ELSE n % 101 END,
        CASE WHEN n % 6 = 2 THEN (ARRAY['{"frames": 12, "big": 12345678901234567890}', '[1, 2.50, null]', '"text"', 'null',
            '{"path": "C:\\u0000\\x", "ü": "🦀"}'])[1 + n % 5]::jsonb END,
        CASE WHEN n % 6 = 4 THEN (ARRAY['', 'it''s broken \\u0000', repeat('traceback ', 1000)])[1 + n % 3] END,
        timestamptz '2024-01-01 00:00:00.000001+00' + n * interval '61.000007 s',
        CASE WHEN n % 107 = 0 THEN NULL WHEN n % 109 = 0 THEN timestamptz '2023-05-05 00:00:00+00'
             ELSE timestamptz '2024-01-01 00:00:00.000001+00' + n * interval '61.000007 s' + n % 50 * interval '1.5 s' END
    FROM generate_series(1, $N) n"#;

/// `n` rows of `job`, of four orgs.
const JOB: &str = r#"
    INSERT INTO job SELECT
        md5('job ' || n)::uuid, ('00000000-0000-0000-0000-00000000000' || n % 4)::uuid,
        (ARRAY['mock_process', 'scene.detect', 'thumbnail'])[1 + n % 3],
        CASE WHEN n % 211 = 0 THEN 'archived'
             ELSE (ARRAY['queued', 'running', 'succeeded', 'succeeded', 'failed', 'canceled', 'dead_letter'])[1 + n % 7] END,
        CASE WHEN n % 7 = 0 THEN 0 ELSE 1 + n % 3 END, CASE WHEN n % 113 = 0 THEN 100000 ELSE n % 10 END,
        CASE WHEN n % 199 = 0 THEN 'same' WHEN n % 2 = 0 THEN 'key-' || n END,
        CASE WHEN n % 3 = 0 THEN 'user-' || n % 17 END,
        timestamptz '2025-01-01 00:00:00+00' + n * interval '30.000003 s',
        timestamptz '2025-01-01 00:00:00+00' + n * interval '30.000003 s' + interval '20 s',
        CASE WHEN n % 7 > 0 THEN timestamptz '2025-01-01 00:00:00+00' + n * interval '30.000003 s' + interval '5 s' END,
        CASE WHEN n % 7 > 1 AND n % 11 > 0 THEN timestamptz '2025-01-01 00:00:00+00' + n * interval '30.000003 s' + interval '20 s' END,
        CASE WHEN n % 7 IN (4, 6) THEN 'TIMEOUT' END, CASE WHEN n % 7 IN (4, 6) THEN 'took too long: ü' END
    FROM generate_series(1, $N) n"#;

const EVENTS: &str = r#"
    INSERT INTO job_event (id, job_id, ts, prev_status, next_status, detail_json)
    SELECT md5('event ' || e.step || ' ' || n)::uuid, j.id, j.created_at + e.after, e.prev, e.next, e.detail
    FROM generate_series(1, $N) n JOIN job j ON j.id = md5('job ' || n)::uuid
    CROSS JOIN LATERAL (VALUES
        (1, interval '0', NULL, 'queued', NULL::jsonb, true),
        (2, interval '5 s', 'queued', 'running', '{"stage": "extracting", "progress": 0}', n % 7 > 0),
        -- Of one transaction, and so of one time.
        (3, interval '5 s', 'running', 'running', '{"stage": "analyzing", "progress": 50, "host": "w-1"}', n % 7 > 0),
        (4, interval '12 s', 'running', CASE WHEN n % 13 = 0 THEN 'resting' ELSE 'running' END,
            '{"stage": null, "progress": 250}', n % 7 > 0 AND n % 5 = 0),
        (5, interval '20 s', 'running', j.status,
            CASE j.status WHEN 'succeeded' THEN '{"stage": "done", "progress": 100, "result": {"scenes": [1, 2, 3]}}'::jsonb
                WHEN 'failed' THEN '{"error": "took too long"}' ELSE '["odd"]' END, n % 7 > 1)
    ) e (step, after, prev, next, detail, is_there)
    WHERE e.is_there AND n % 17 > 0 AND e.next <> 'archived'"#;

/// The SQL that fills both tables with `n` rows each.
pub(crate) fn rows(n: usize) -> [String; 4] {
    [JOBS, JOB, EVENTS, "ANALYZE"].map(|sql| sql.replace("$N", &n.to_string()))
}
