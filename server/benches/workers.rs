//! What workers see: how soon a waiting claim has a new job, whether claims slow down with history, and the whole life of jobs.
//!
//! ```sh
//! make bench-workers
//! ```
//!
//! Everything runs on this machine: the server in a process of its own, PostgreSQL in a throw-away cluster with `fsync` and
//! `synchronous_commit` on, the workers and this program.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use jobledger_client::{
    Claim, Client, NewJob,
    worker::{Context, Worker},
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use crate::common::{
    Result, Server,
    cluster::{self, Cluster, Durability},
    last_of, median, pgbench, rate,
};

mod common;

/// Claims that wait, and jobs that are created for them one after the other.
const WAITING: usize = 1_000;
const CREATED: usize = 1_000;
/// From the answer of CreateJob to the claim's, at the 99th percentile.
const HANDOVER_BAR: Duration = Duration::from_millis(20);

/// Jobs that have ended, and jobs that wait, in the large table; jobs that wait in the small one.
const FINISHED: usize = 1_000_000;
const QUEUED: usize = 100_000;
const FEW: usize = 20_000;
const CLAIMERS: usize = 16;
const CLAIMED_AT_ONCE: i32 = 10;
const CLAIM_ROUND: Duration = Duration::from_secs(1);
const ROUNDS: usize = 5;
/// How much of the small table's rate has to be left in the large one.
const HISTORY_BAR: f64 = 0.8;

/// Jobs that live from create to completion.
const LIVES: usize = 30_000;
const CREATED_AT_ONCE: usize = 500;
const SLOTS: usize = 400;
/// How much of the bare lane's rate has to be left.
const LIFE_BAR: f64 = 0.35;

/// How soon a job that is created is in the hands of one of many workers that wait.
async fn handover(name: &str, url: &str) -> Result<()> {
    let server = Server::start(url, 512).await?;
    let clients = (0..4).map(|_| Client::new(&server.endpoint)).collect::<std::result::Result<Vec<_>, _>>()?;
    let (claimed, mut claims) = mpsc::unbounded_channel();
    let mut workers = JoinSet::new();
    for n in 0..WAITING {
        let (client, claimed) = (clients[n % 4].clone(), claimed.clone());
        workers.spawn(async move {
            loop {
                let claim = Claim::new(format!("w{n}")).types(["bench"]).wait(Duration::from_secs(60));
                for lease in client.claim(claim).await? {
                    let job = lease.job.ok_or("a lease without a job")?.id;
                    if claimed.send((job, Instant::now())).is_err() {
                        return Result::Ok(());
                    }
                }
            }
        });
    }
    let mut late = Vec::with_capacity(CREATED);
    let mut arrived = HashMap::new();
    for n in 0..CREATED + CREATED / 10 {
        let job = clients[0].create(NewJob::new("bench")).await?.job.id;
        let answered = Instant::now();
        while !arrived.contains_key(&job) {
            let (job, at) = claims.recv().await.ok_or("the workers are gone")?;
            arrived.insert(job, at);
        }
        // The first ones find the workers still arriving.
        if n >= CREATED / 10 {
            late.push(arrived[&job].saturating_duration_since(answered));
        }
    }
    workers.abort_all();
    late.sort_unstable();
    let at = |part: f64| late[(late.len() as f64 * part) as usize];
    let (p50, p99) = (at(0.50), at(0.99));
    println!(
        "{name}: with {WAITING} claims waiting, a new job is claimed {p50:.2?} (p50), {p99:.2?} (p99) after its create was answered"
    );
    if p99 > HANDOVER_BAR {
        return Err(format!("{name}: the bar is {HANDOVER_BAR:?}").into());
    }
    Ok(())
}

/// Rows of jobs in one org: some that have ended, then some that wait.
fn rows(is_postgres: bool, org: u8, finished: usize, queued: usize) -> Vec<String> {
    let n = finished + queued;
    let (schema, series, org, id, now) = if is_postgres {
        let id = "('01980000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid";
        let org = format!("'00000000-0000-0000-0000-0000000000{org:02x}'::uuid");
        ("jobledger.", format!("generate_series(1, {n}) n"), org, id, "now()")
    } else {
        let series =
            format!("(WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {n}) SELECT n FROM s)");
        let org = format!("unhex('000000000000000000000000000000{org:02x}')");
        ("", series, org, "unhex('01980000000070008000' || printf('%012x', n))", "1700000000000000")
    };
    let status = format!("CASE WHEN n <= {finished} THEN 'succeeded' ELSE 'queued' END");
    let mut sql = vec![
        format!(
            "INSERT INTO {schema}job (org_id, id, type, status, attempt, retry_initial, retry_multiplier, retry_max, created_at,
                updated_at, created_seq, finished_at, ready_at, last_job_seq, last_seq, last_recorded_at)
             SELECT {org}, {id}, 'bench', {status}, 0, 1000000, 2, 600000000, {now}, {now}, n,
                CASE WHEN n <= {finished} THEN {now} END, {now}, 1, n, {now} FROM {series}"
        ),
        format!(
            "INSERT INTO {schema}job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type{})
             SELECT {org}, n, {id}, 1, {now}, {now}, 'created', 'queued', 0, 'bench'{} FROM {series}",
            if is_postgres { ", bytes" } else { "" },
            if is_postgres { ", 256" } else { "" }
        ),
        format!("INSERT INTO {schema}org_head (org_id, seq, recorded_at, types) VALUES ({org}, {n}, {now}, 1)"),
        format!("INSERT INTO {schema}org_counter VALUES ({org}, 'bench', {queued}, 0, {finished}, 0, 0, 0)"),
        format!("INSERT INTO {schema}org_due (org_id, next_due_at) VALUES ({org}, {now})"),
    ];
    if is_postgres {
        sql.push(format!("INSERT INTO jobledger.org_month VALUES ({org}, date_trunc('month', now(), 'UTC'), 1)"));
    }
    sql
}

/// Jobs claimed a second in an org.
async fn claim_rate(server: &Server, org: u8) -> Result<f64> {
    let org = format!("00000000-0000-0000-0000-0000000000{org:02x}").parse()?;
    let clients = (0..4)
        .map(|_| Client::builder(&server.endpoint).org(org).build())
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let calls = rate(CLAIMERS, CLAIM_ROUND, move |caller| {
        let client = clients[caller % 4].clone();
        async move {
            let claim = Claim::new("w").types(["bench"]).max_jobs(CLAIMED_AT_ONCE).lease(Duration::from_secs(3_600));
            match client.claim(claim).await?.len() {
                10 => Ok(()),
                _ => Err("the jobs are used up".into()),
            }
        }
    });
    Ok(calls.await? * f64::from(CLAIMED_AT_ONCE))
}

/// Whether claims are as quick with a million jobs that have ended as without.
async fn history(name: &str, url: &str) -> Result<()> {
    let server = Server::start(url, 512).await?;
    let (mut small, mut large) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        small.push(claim_rate(&server, 1).await?);
        large.push(claim_rate(&server, 2).await?);
        println!("  round: {}", last_of([&small, &large]));
    }
    let (small, large) = (median(small), median(large));
    println!(
        "{name}: {small:.0} jobs claimed/s on a small table, {large:.0} with {FINISHED} finished and {QUEUED} queued jobs"
    );
    println!("  {:.2} of it (bar: {HISTORY_BAR})", large / small);
    if large < small * HISTORY_BAR {
        return Err(format!("{name}: claims slow down with history").into());
    }
    Ok(())
}

/// Jobs a second from create to completion, by a worker of the client crate.
async fn lives(server: &Server) -> Result<f64> {
    let client = Client::new(&server.endpoint)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (ended, mut ends) = mpsc::unbounded_channel();
    let handler = move |_: Context, (): ()| {
        let _ = ended.send(());
        async { Ok(()) }
    };
    let worker = Worker::builder(client.clone()).handle("bench", handler).concurrency(SLOTS).build();
    let since = Instant::now();
    let working = tokio::spawn(worker.run(async {
        let _ = stopped.await;
    }));
    let creating = tokio::spawn(async move {
        for _ in 0..LIVES / CREATED_AT_ONCE {
            for created in client.create_all((0..CREATED_AT_ONCE).map(|_| NewJob::new("bench"))).await? {
                created?;
            }
        }
        Result::Ok(())
    });
    for _ in 0..LIVES {
        ends.recv().await.ok_or("the worker is gone")?;
    }
    creating.await??;
    // It ends once the last report is taken.
    drop(stop);
    working.await??;
    Ok(LIVES as f64 / since.elapsed().as_secs_f64())
}

/// Batches of 256 jobs that are created, claimed and completed, on a log of its own.
const BARE_LIVES: &str = "
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('00000000-0000-0000-0000-00000000000c') \\gset
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
INSERT INTO jobledger.org_batch (org_id, seq, recorded_at, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, now(), '{\"bench\": [256, 0, 0, 0, 0, 0]}');
COMMIT;
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('00000000-0000-0000-0000-00000000000c') \\gset
WITH ready AS MATERIALIZED (
    SELECT id FROM jobledger.job
    WHERE org_id = '00000000-0000-0000-0000-00000000000c' AND type = 'bench' AND status = 'queued' AND due_at IS NULL
    ORDER BY priority DESC, ready_at, created_seq LIMIT 256
), taken AS MATERIALIZED (SELECT id, :head + row_number() OVER () AS seq FROM ready),
job AS (
    UPDATE jobledger.job j SET status = 'running', attempt = 1, updated_at = now(), started_at = now(),
        attempt_started_at = now(), lease_worker = 'w', lease_granted = 30000000, lease_request = 'r',
        lease_expires_at = now() + interval '30 s', lease_epoch = 1, due_at = now() + interval '30 s', last_job_seq = 2,
        last_seq = t.seq, last_recorded_at = now()
    FROM taken t WHERE j.org_id = '00000000-0000-0000-0000-00000000000c' AND j.id = t.id
), event AS (
    INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status, attempt,
        actor, job_type, bytes)
    SELECT '00000000-0000-0000-0000-00000000000c', seq, id, 2, now(), now(), 'claimed', 'queued', 'running', 1, 'w', 'bench', 256
    FROM taken
)
INSERT INTO jobledger.org_batch (org_id, seq, recorded_at, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, now(), '{\"bench\": [-256, 256, 0, 0, 0, 0]}');
COMMIT;
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('00000000-0000-0000-0000-00000000000c') \\gset
WITH held AS MATERIALIZED (
    SELECT id FROM jobledger.job
    WHERE org_id = '00000000-0000-0000-0000-00000000000c' AND type = 'bench' AND status = 'running' LIMIT 256
), done AS MATERIALIZED (SELECT id, :head + row_number() OVER () AS seq FROM held),
job AS (
    UPDATE jobledger.job j SET status = 'succeeded', updated_at = now(), finished_at = now(), lease_worker = NULL,
        lease_granted = NULL, lease_request = NULL, lease_expires_at = NULL, due_at = NULL,
        outcome_digest = sha256('done'), outcome_epoch = 1, last_job_seq = 3, last_seq = d.seq, last_recorded_at = now()
    FROM done d WHERE j.org_id = '00000000-0000-0000-0000-00000000000c' AND j.id = d.id
), event AS (
    INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status, attempt,
        actor, job_type, bytes)
    SELECT '00000000-0000-0000-0000-00000000000c', seq, id, 3, now(), now(), 'succeeded', 'running', 'succeeded', 1, 'w', 'bench', 256
    FROM done
)
INSERT INTO jobledger.org_batch (org_id, seq, recorded_at, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, now(), '{\"bench\": [0, -256, 256, 0, 0, 0]}');
COMMIT;
";

async fn whole_life(cluster: &Cluster, database: &str) -> Result<()> {
    let server = Server::start(&cluster.url(database, cluster::SERVER), 512).await?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    let mut connection = cluster.connect(database, "postgres").await;
    // The lane's first batches are planned without statistics.
    pgbench(cluster, database, BARE_LIVES, 1, Duration::from_secs(1))?;
    for _ in 0..ROUNDS {
        ours.push(lives(&server).await?);
        // Neither shall pay for what the other left behind.
        connection.execute("VACUUM ANALYZE").await?;
        bare.push(pgbench(cluster, database, BARE_LIVES, 1, Duration::from_secs(3))? * 256.0);
        println!("  round: {}", last_of([&ours, &bare]));
    }
    let (ours, bare) = (median(ours), median(bare));
    println!("PostgreSQL: {ours:.0} jobs/s from create to completion; {bare:.0} jobs/s as bare lanes");
    println!("  {:.2} of the bare lanes (bar: {LIFE_BAR})", ours / bare);
    if ours < bare * LIFE_BAR {
        return Err("the whole life of jobs is below its bar".into());
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    // `cargo bench --bench workers -- life` measures that alone.
    let only: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name| only.is_empty() || only.iter().any(|wanted| wanted == name);
    let folder = TempDir::new()?;
    let file = |name: &str| folder.path().join(format!("{name}.db"));
    let sqlite = |name| format!("sqlite://{}", file(name).display());
    let cluster = Cluster::alone(Durability::Full).await;
    if is_wanted("life") {
        whole_life(&cluster, &cluster.create_database().await).await?;
        let server = Server::start(&sqlite("life"), 512).await?;
        println!("SQLite: {:.0} jobs/s from create to completion", lives(&server).await?);
    }
    if is_wanted("handover") {
        handover("SQLite", &sqlite("handover")).await?;
        let database = cluster.create_database().await;
        handover("PostgreSQL", &cluster.url(&database, cluster::SERVER)).await?;
    }
    if is_wanted("history") {
        drop(Server::start(&sqlite("history"), 512).await?);
        let mut connection = sqlx::sqlite::SqliteConnectOptions::new().filename(file("history")).connect().await?;
        for sql in rows(false, 1, 0, FEW * 5).into_iter().chain(rows(false, 2, FINISHED, QUEUED)) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        history("SQLite", &sqlite("history")).await?;
        let database = cluster.create_database().await;
        let mut connection = cluster.connect(&database, "postgres").await;
        for sql in rows(true, 1, 0, FEW * 5).into_iter().chain(rows(true, 2, FINISHED, QUEUED)) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        connection.execute("VACUUM ANALYZE").await?;
        history("PostgreSQL", &cluster.url(&database, cluster::SERVER)).await?;
    }
    Ok(())
}
