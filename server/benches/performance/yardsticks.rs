//! Yardsticks: the same work by pgbench, prepared, on the same tables and indexes, without row-level security.

use std::time::Duration;

use sqlx::Executor as _;

use crate::common::{BARE_LANE, Result, cluster::Cluster, pgbench};

/// Rows that the single updates choose from.
const UPDATED: usize = 10_000;

/// A job and its event in one statement. A sequence numbers the log, so there is no head or counter to wait for.
const SINGLE_JOB: &str = "
WITH job AS (
    INSERT INTO jobledger.job (org_id, id, type, retry_initial, retry_multiplier, retry_max, ready_at, last_job_seq, last_seq,
        created_seq, last_recorded_at)
    SELECT '00000000-0000-0000-0000-00000000000b', gen_random_uuid(), 'bench', 1000000, 2, 600000000, now(), 1, seq, seq, now()
    FROM (SELECT nextval('bench_seq') AS seq) next
    RETURNING id, last_seq
)
INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type, bytes)
SELECT '00000000-0000-0000-0000-00000000000b', last_seq, id, 1, now(), now(), 'created', 'queued', 0, 'bench', 256 FROM job;
";

/// The progress of one job and its event in one statement, numbered by the same sequence.
const SINGLE_UPDATE: &str = "
\\set n random(1, 10000)
WITH job AS (
    UPDATE jobledger.job SET updated_at = now(), last_job_seq = last_job_seq + 1, last_seq = nextval('bench_seq'),
        last_recorded_at = now()
    WHERE org_id = '00000000-0000-0000-0000-00000000000d'
        AND id = ('00000000-0000-0000-0000-' || lpad((:n)::text, 12, '0'))::uuid
    RETURNING id, last_job_seq, last_seq
)
INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status, attempt,
    job_type, detail_json, bytes)
SELECT '00000000-0000-0000-0000-00000000000d', last_seq, id, last_job_seq, now(), now(), 'progress', 'running', 'running', 1,
    'bench', '{\"progress\": 50}', 256 FROM job;
";

/// Batches of 256 jobs that are created, claimed and completed, in an org of their own.
const BARE_LIVES: &str = "
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('{00000000-0000-0000-0000-00000000000c}', '{NULL}', '{NULL}') \\gset
WITH made AS MATERIALIZED (SELECT gen_random_uuid() AS id, :head + n AS seq FROM generate_series(1, 256) n),
job AS (
    INSERT INTO jobledger.job (org_id, id, type, retry_initial, retry_multiplier, retry_max, ready_at, created_seq,
        idempotency_key, request_digest, last_job_seq, last_seq, last_recorded_at)
    SELECT '00000000-0000-0000-0000-00000000000c', id, 'bench', 1000000, 2, 600000000, now(), seq, id::text,
        sha256(id::text::bytea), 1, seq, now() FROM made
), event AS (
    INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type, bytes)
    SELECT '00000000-0000-0000-0000-00000000000c', seq, id, 1, now(), now(), 'created', 'queued', 0, 'bench', 256 FROM made
)
INSERT INTO jobledger.org_record (org_id, n, id, prev, seq, ready_gen, recorded_at, written_at, format, base_seq, base_n, jobs, bytes, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, 1, 1, :head + 256, 1, now(), now(), 1, :head + 256, :head + 256, :head + 256, (:head + 256) * 1024, '{\"bench\": [256, 0, 0, 0, 0, 0]}');
COMMIT;
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('{00000000-0000-0000-0000-00000000000c}', '{NULL}', '{NULL}') \\gset
WITH ready AS MATERIALIZED (
    SELECT id FROM jobledger.job
    WHERE org_id = '00000000-0000-0000-0000-00000000000c' AND type = 'bench' AND status = 'queued' AND due_at IS NULL
    ORDER BY priority DESC, ready_at, created_seq LIMIT 256
), taken AS MATERIALIZED (SELECT id, :head + row_number() OVER () AS seq FROM ready),
job AS (
    UPDATE jobledger.job j SET status = 'running', attempt = 1, updated_at = now(), started_at = now(),
        attempt_started_at = now(), lease_worker = 'w', lease_granted = 30000000, lease_request = 'r',
        lease_expires_at = now() + interval '30 s', lease_nonce = 1, due_at = now() + interval '30 s', last_job_seq = 2,
        last_seq = t.seq, last_recorded_at = now()
    FROM taken t WHERE j.org_id = '00000000-0000-0000-0000-00000000000c' AND j.id = t.id
), event AS (
    INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status, attempt,
        actor, job_type, bytes)
    SELECT '00000000-0000-0000-0000-00000000000c', seq, id, 2, now(), now(), 'claimed', 'queued', 'running', 1, 'w', 'bench', 256
    FROM taken
)
INSERT INTO jobledger.org_record (org_id, n, id, prev, seq, ready_gen, recorded_at, written_at, format, base_seq, base_n, jobs, bytes, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, 1, 1, :head + 256, 1, now(), now(), 1, :head + 256, :head + 256, :head + 256, (:head + 256) * 1024, '{\"bench\": [-256, 256, 0, 0, 0, 0]}');
COMMIT;
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('{00000000-0000-0000-0000-00000000000c}', '{NULL}', '{NULL}') \\gset
WITH held AS MATERIALIZED (
    SELECT id FROM jobledger.job
    WHERE org_id = '00000000-0000-0000-0000-00000000000c' AND type = 'bench' AND status = 'running' LIMIT 256
), done AS MATERIALIZED (SELECT id, :head + row_number() OVER () AS seq FROM held),
job AS (
    UPDATE jobledger.job j SET status = 'succeeded', updated_at = now(), finished_at = now(), lease_worker = NULL,
        lease_granted = NULL, lease_request = NULL, lease_expires_at = NULL, due_at = NULL,
        outcome_digest = sha256('done'), outcome_nonce = 1, last_job_seq = 3, last_seq = d.seq, last_recorded_at = now()
    FROM done d WHERE j.org_id = '00000000-0000-0000-0000-00000000000c' AND j.id = d.id
), event AS (
    INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status, attempt,
        actor, job_type, bytes)
    SELECT '00000000-0000-0000-0000-00000000000c', seq, id, 3, now(), now(), 'succeeded', 'running', 'succeeded', 1, 'w', 'bench', 256
    FROM done
)
INSERT INTO jobledger.org_record (org_id, n, id, prev, seq, ready_gen, recorded_at, written_at, format, base_seq, base_n, jobs, bytes, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, 1, 1, :head + 256, 1, now(), now(), 1, :head + 256, :head + 256, :head + 256, (:head + 256) * 1024, '{\"bench\": [0, -256, 256, 0, 0, 0]}');
COMMIT;
";

/// Makes a new cluster behave like one in use, whose log goes into existing files. A new cluster creates each log file
/// first, which stalls all commits for tens of milliseconds.
pub(crate) async fn settle(cluster: &Cluster) -> Result<()> {
    let mut connection = cluster.connect("postgres", "postgres").await;
    for sql in [
        "ALTER SYSTEM SET min_wal_size = '2GB'",
        "ALTER SYSTEM SET max_wal_size = '4GB'",
        "SELECT pg_reload_conf()",
        "SELECT count(pg_logical_emit_message(false, 'bench', repeat('x', 1 << 20))) FROM generate_series(1, 2048)",
        "CHECKPOINT",
    ] {
        connection.execute(sql).await?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
pub(crate) struct Yardsticks<'a> {
    cluster: &'a Cluster,
    database: &'a str,
}

impl<'a> Yardsticks<'a> {
    /// Adds the sequence and the rows that the scripts need.
    pub(crate) async fn on(cluster: &'a Cluster, database: &'a str) -> Result<Self> {
        let mut connection = cluster.connect(database, "postgres").await;
        connection.execute("CREATE SEQUENCE bench_seq").await?;
        let sql = format!(
            "INSERT INTO jobledger.job (org_id, id, type, status, retry_initial, retry_multiplier, retry_max, ready_at, last_job_seq,
                last_seq, created_seq, last_recorded_at)
             SELECT '00000000-0000-0000-0000-00000000000d', ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 'bench',
                'running', 1000000, 2, 600000000, now(), 1, n, n, now() FROM generate_series(1, {UPDATED}) n"
        );
        connection.execute(sqlx::AssertSqlSafe(sql)).await?;
        connection.execute("ANALYZE jobledger.job").await?;
        Ok(Self { cluster, database })
    }

    fn rate(self, script: &str, clients: usize, time: Duration) -> Result<f64> {
        pgbench(self.cluster, self.database, script, clients, time)
    }

    /// Jobs per second, one per statement.
    pub(crate) fn single_jobs(self, clients: usize, time: Duration) -> Result<f64> {
        self.rate(SINGLE_JOB, clients, time)
    }

    /// Updates per second, one per statement.
    pub(crate) fn single_updates(self, clients: usize, time: Duration) -> Result<f64> {
        self.rate(SINGLE_UPDATE, clients, time)
    }

    /// Jobs per second by the statements of a batch of 256, with one connection.
    pub(crate) fn bare_lane(self, time: Duration) -> Result<f64> {
        Ok(self.rate(BARE_LANE, 1, time)? * 256.0)
    }

    /// Jobs per second that are created, claimed and completed in such batches.
    pub(crate) fn bare_lives(self, time: Duration) -> Result<f64> {
        Ok(self.rate(BARE_LIVES, 1, time)? * 256.0)
    }

    /// Removes overwritten row versions, so that no measure pays for the one before.
    pub(crate) async fn vacuum(self) -> Result<()> {
        self.cluster.connect(self.database, "postgres").await.execute("VACUUM ANALYZE").await?;
        Ok(())
    }
}
