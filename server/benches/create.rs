//! Unary CreateJob with 256 calls in flight, on both databases, and what to hold it against.
//!
//! ```sh
//! make bench
//! ```
//!
//! Servers run in processes of their own, on this machine, beside this load generator; PostgreSQL is a throw-away cluster
//! with `fsync` and `synchronous_commit` on. Rounds are interleaved and medians compared with
//!
//! - batches forced to one command (SQLite);
//! - the empty RPC, a health check of the same server: the ceiling of the transport;
//! - pgbench, prepared, with the equivalent statement for a single job, by 8 and by 32 clients, on the same tables and
//!   indexes, without row-level security, and with neither head nor counters to wait for;
//! - the bare lane: the statements of a batch of 256 jobs by one pgbench connection, their rows made in the database.

use std::time::Duration;

use jobledger_client::proto::{CreateJobRequest, job_service_client::JobServiceClient};
use sqlx::Executor as _;
use tempfile::TempDir;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::common::{
    BARE_LANE, CONNECTIONS, Result, Server,
    cluster::{self, Cluster, Durability},
    last_of, median, pgbench, rate,
};

mod common;

const IN_FLIGHT: usize = 256;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
/// How many times faster batching has to be on SQLite.
const BATCHING_BAR: f64 = 4.0;
/// On PostgreSQL, the smaller of these is the bar: so many times pgbench's rate, so much of the empty RPC's.
const STATEMENT_BAR: f64 = 2.5;
const TRANSPORT_BAR: f64 = 0.35;

/// Calls in flight that make small batches, and how long they are measured.
const SMALL: usize = 4;
const SAMPLE: Duration = Duration::from_secs(15);
/// How old the other's snapshot gets, and how much of the rate has to be left.
const SNAPSHOT: Duration = Duration::from_secs(300);
const SNAPSHOT_BAR: f64 = 0.5;

async fn create(server: &Server) -> Result<f64> {
    create_by(server, IN_FLIGHT, ROUND).await
}

async fn create_by(server: &Server, callers: usize, time: Duration) -> Result<f64> {
    let channels = server.channels.clone();
    rate(callers, time, move |caller| {
        let mut service = JobServiceClient::new(channels[caller % CONNECTIONS].clone());
        async move {
            service.create_job(CreateJobRequest { r#type: "bench".to_owned(), ..Default::default() }).await?;
            Ok(())
        }
    })
    .await
}

async fn empty(server: &Server) -> Result<f64> {
    let channels: Vec<_> = (0..CONNECTIONS).map(|n| server.channel(n)).collect();
    rate(IN_FLIGHT, ROUND, move |caller| {
        let mut health = HealthClient::new(channels[caller % CONNECTIONS].clone());
        async move {
            health.check(HealthCheckRequest { service: String::new() }).await?;
            Ok(())
        }
    })
    .await
}

/// A job and its event by one statement, for a log whose numbers a sequence gives.
const SINGLE_JOB: &str = "
WITH job AS (
    INSERT INTO jobledger.job (org_id, id, type, retry_initial, retry_multiplier, retry_max, ready_at, last_job_seq, last_seq,
        last_recorded_at)
    VALUES ('00000000-0000-0000-0000-00000000000b', gen_random_uuid(), 'bench', 1000000, 2, 600000000, now(), 1,
        nextval('bench_seq'), now())
    RETURNING id, last_seq
)
INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type, bytes)
SELECT '00000000-0000-0000-0000-00000000000b', last_seq, id, 1, now(), now(), 'created', 'queued', 0, 'bench', 256 FROM job;
";

/// Jobs a second on SQLite: batched, one by one, and the empty RPC.
async fn sqlite() -> Result<()> {
    let (batched_in, single_in) = (TempDir::new()?, TempDir::new()?);
    let url = |folder: &TempDir| format!("sqlite://{}", folder.path().join("bench.db").display());
    let batched = Server::start(&url(&batched_in), 512).await?;
    let single = Server::start(&url(&single_in), 1).await?;
    let (mut with, mut without, mut ceiling) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        with.push(create(&batched).await?);
        without.push(create(&single).await?);
        ceiling.push(empty(&batched).await?);
        println!("  round: {}", last_of([&with, &without, &ceiling]));
    }
    let (with, without, ceiling) = (median(with), median(without), median(ceiling));
    println!("SQLite: {with:.0} jobs/s batched, {without:.0} jobs/s one by one, {ceiling:.0} empty RPC/s");
    println!("  batching is {:.1} times as fast (bar: {BATCHING_BAR})", with / without);
    println!("  {:.2} of the empty RPC", with / ceiling);
    if with / without < BATCHING_BAR {
        return Err(format!("batching is less than {BATCHING_BAR} times as fast").into());
    }
    Ok(())
}

/// Jobs a second on PostgreSQL, and what it is held against.
async fn postgres() -> Result<()> {
    let cluster = Cluster::alone(Durability::Full).await;
    let database = cluster.create_database().await;
    cluster.connect(&database, "postgres").await.execute("CREATE SEQUENCE bench_seq").await?;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    let (mut ours, mut ceiling, mut lane) = (Vec::new(), Vec::new(), Vec::new());
    let mut statement: [Vec<f64>; 2] = Default::default();
    for _ in 0..ROUNDS {
        ours.push(create(&server).await?);
        for (rates, clients) in statement.iter_mut().zip([8, 32]) {
            rates.push(pgbench(&cluster, &database, SINGLE_JOB, clients, ROUND)?);
        }
        ceiling.push(empty(&server).await?);
        lane.push(pgbench(&cluster, &database, BARE_LANE, 1, ROUND)? * 256.0);
        println!("  round: {}", last_of([&ours, &statement[0], &statement[1], &ceiling, &lane]));
    }
    let [by_8, by_32] = statement.map(median);
    let (ours, ceiling, lane, statement) = (median(ours), median(ceiling), median(lane), by_8.max(by_32));
    println!("PostgreSQL: {ours:.0} jobs/s, {ceiling:.0} empty RPC/s");
    println!("  single-job statement: {by_8:.0}/s by 8 clients, {by_32:.0}/s by 32; bare lane: {lane:.0} jobs/s");
    println!("  {:.2} times the statement (bar: {STATEMENT_BAR})", ours / statement);
    println!("  {:.2} of the empty RPC (bar: {TRANSPORT_BAR}, or the other)", ours / ceiling);
    println!("  {:.2} of the bare lane", ours / lane);
    if ours < (statement * STATEMENT_BAR).min(ceiling * TRANSPORT_BAR) {
        return Err("PostgreSQL: below both bars".into());
    }
    Ok(())
}

/// Small batches, without and under somebody else's old snapshot, which keeps PostgreSQL from clearing away what was
/// overwritten since.
async fn snapshot() -> Result<()> {
    let cluster = Cluster::alone(Durability::Full).await;
    let database = cluster.create_database().await;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    create_by(&server, SMALL, SAMPLE).await?;
    let without = create_by(&server, SMALL, SAMPLE).await?;
    let mut other = cluster.connect(&database, "postgres").await;
    other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    other.execute("SELECT count(*) FROM jobledger.org_head").await?;
    let meanwhile = create_by(&server, SMALL, SNAPSHOT).await?;
    let under = create_by(&server, SMALL, SAMPLE).await?;
    println!(
        "PostgreSQL, {SMALL} calls in flight: {without:.0} jobs/s; {meanwhile:.0} jobs/s during {SNAPSHOT:?} under an old snapshot"
    );
    println!("  {under:.0} jobs/s at its end: {:.2} of the rate without (bar: {SNAPSHOT_BAR})", under / without);
    if under < without * SNAPSHOT_BAR {
        return Err("an old snapshot slows small batches too much".into());
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    println!("unary CreateJob, {IN_FLIGHT} in flight, medians of {ROUNDS} rounds of {} s", ROUND.as_secs());
    // `cargo bench --bench create -- postgres` measures that alone.
    let only: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name| only.is_empty() || only.iter().any(|wanted| wanted == name);
    if is_wanted("sqlite") {
        sqlite().await?;
    }
    if is_wanted("postgres") {
        postgres().await?;
    }
    // It takes minutes.
    if only.iter().any(|wanted| wanted == "snapshot") {
        snapshot().await?;
    }
    Ok(())
}
