//! What subscribers and dashboards see: the delay of an event with 1,000 subscribers, the maximum of deliveries per
//! second, the cost of an idle subscriber, and whether statistics slow down with the number of jobs.
//!
//! ```sh
//! make bench-streams
//! ```
//!
//! Everything runs on this machine: this program with its subscribers, the server in a process of its own, and
//! PostgreSQL in a throw-away cluster with `fsync` and `synchronous_commit` on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::{
    Client, NewJob,
    proto::{GetStatisticsRequest, StreamJobEventsRequest, StreamJobEventsResponse, stream_job_events_response::Item},
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use sqlx::{Connection as _, Executor as _, Row as _};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};
use tonic::Streaming;
use uuid::Uuid;

use crate::common::{
    Result, Server,
    cluster::{self, Cluster, Durability},
    median,
};

mod common;

const SUBSCRIBERS: usize = 1_000;
/// Connections that the subscribers share.
const SUBSCRIBER_CONNECTIONS: usize = 10;
const EVENTS_A_SECOND: u32 = 50;
const FOLLOWED: Duration = Duration::from_secs(30);
/// Bound of the 99th percentile, from before the commit to the receipt.
const DELAY_BAR: Duration = Duration::from_millis(50);

const SATURATED: Duration = Duration::from_secs(10);
const WRITERS: usize = 16;
/// Writers pause once more events than this have not been delivered to every subscriber.
const OUTSTANDING: u64 = 500;
const DELIVERIES_BAR: f64 = 100_000.0;

const IDLE: usize = 10_000;
const IDLE_CONNECTIONS: usize = 100;
/// Bytes that an idle subscriber may take.
const IDLE_BAR: f64 = 20.0 * 1024.0;

const FEW_JOBS: usize = 1_000;
const MANY_JOBS: usize = 1_000_000;
const CREATED_AT_ONCE: usize = 1_000;
const ASKED: usize = 400;
/// Bound of the time for many jobs divided by the time for few.
const STATISTICS_BAR: f64 = 1.3;

fn clients(server: &Server, n: usize, org: Uuid) -> Result<Vec<Client>> {
    let client = |_| Ok(Client::builder(&server.endpoint).org(org).build()?);
    (0..n).map(client).collect()
}

async fn open(client: &Client) -> Result<Streaming<StreamJobEventsResponse>> {
    let mut stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await?.into_inner();
    // The first message is the bookmark at the head. From here on the stream is live.
    stream.message().await?;
    Ok(stream)
}

/// Delay of events with 1,000 subscribers of one org and a steady rate of creates.
async fn follow(name: &str, server: &Server, reads: &mut Reads) -> Result<()> {
    let org = Uuid::new_v4();
    let clients = clients(server, SUBSCRIBER_CONNECTIONS, org)?;
    let expected = u64::from(EVENTS_A_SECOND) * FOLLOWED.as_secs();
    let mut subscribers = JoinSet::new();
    for n in 0..SUBSCRIBERS {
        let mut stream = open(&clients[n % clients.len()]).await?;
        subscribers.spawn(async move {
            let mut delays = Vec::with_capacity(expected as usize);
            while (delays.len() as u64) < expected {
                let Some(Item::Event(event)) = stream.message().await?.ok_or("the stream ended")?.item else {
                    continue;
                };
                if event.seq != delays.len() as i64 + 1 {
                    return Err(format!("event {} came as number {}", event.seq, delays.len() + 1).into());
                }
                let recorded_at = event.recorded_at.unwrap_or_default();
                let recorded_at = recorded_at.seconds * 1_000_000 + i64::from(recorded_at.nanos) / 1_000;
                let late = SystemClock.now().timestamp_micros() - recorded_at;
                delays.push(Duration::from_micros(late.max(0).unsigned_abs()));
            }
            Result::Ok(delays)
        });
    }
    let before = reads.count().await?;
    let mut tick = interval(Duration::from_secs(1) / EVENTS_A_SECOND);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for _ in 0..expected {
        tick.tick().await;
        clients[0].create(NewJob::new("bench")).await?;
    }
    let mut delays = Vec::new();
    while let Some(ended) = subscribers.join_next().await {
        delays.extend(ended??);
    }
    delays.sort_unstable();
    let at = |part: f64| delays[(delays.len() as f64 * part) as usize];
    let (p50, p99) = (at(0.50), at(0.99));
    let read =
        reads.count().await?.zip(before).map_or_else(String::new, |(after, before)| {
            format!("; the log was read {} times meanwhile", after - before)
        });
    println!(
        "{name}: {SUBSCRIBERS} subscribers of {EVENTS_A_SECOND} events/s saw all {expected}, in order: {p50:.2?} (p50), {p99:.2?} (p99) from before the commit{read}"
    );
    if p99 > DELAY_BAR {
        return Err(format!("{name}: the bar is {DELAY_BAR:?}").into());
    }
    Ok(())
}

/// Maximum rate of deliveries.
async fn saturate(name: &str, server: &Server) -> Result<()> {
    let clients = clients(server, SUBSCRIBER_CONNECTIONS, Uuid::new_v4())?;
    let delivered = Arc::new(AtomicU64::new(0));
    let written = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for n in 0..SUBSCRIBERS {
        let mut stream = open(&clients[n % clients.len()]).await?;
        let delivered = Arc::clone(&delivered);
        tasks.spawn(async move {
            while let Some(message) = stream.message().await? {
                delivered.fetch_add(u64::from(matches!(message.item, Some(Item::Event(_)))), Ordering::Relaxed);
            }
            Result::Ok(())
        });
    }
    for writer in 0..WRITERS {
        let client = clients[writer % clients.len()].clone();
        let (delivered, written) = (Arc::clone(&delivered), Arc::clone(&written));
        tasks.spawn(async move {
            loop {
                if written.load(Ordering::Relaxed)
                    > delivered.load(Ordering::Relaxed) / SUBSCRIBERS as u64 + OUTSTANDING
                {
                    sleep(Duration::from_millis(1)).await;
                    continue;
                }
                client.create(NewJob::new("bench")).await?;
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    sleep(Duration::from_secs(2)).await;
    let (before, started) = (delivered.load(Ordering::Relaxed), Instant::now());
    let cpu = server.cpu()?;
    sleep(SATURATED).await;
    let rate = (delivered.load(Ordering::Relaxed) - before) as f64 / started.elapsed().as_secs_f64();
    let cpu = (server.cpu()? - cpu).as_secs_f64() / started.elapsed().as_secs_f64();
    tasks.abort_all();
    println!("{name}: {rate:.0} deliveries/s to {SUBSCRIBERS} subscribers, the server taking {cpu:.2} cores");
    if rate < DELIVERIES_BAR {
        return Err(format!("{name}: the bar is {DELIVERIES_BAR}/s").into());
    }
    Ok(())
}

/// Memory of idle subscribers.
async fn idle(name: &str, server: &Server) -> Result<()> {
    let clients = clients(server, IDLE_CONNECTIONS, Uuid::new_v4())?;
    for client in &clients {
        client.statistics(&[]).await?;
    }
    let before = server.resident()?;
    let mut streams = Vec::with_capacity(IDLE);
    for n in 0..IDLE {
        streams.push(open(&clients[n % clients.len()]).await?);
    }
    let each = (server.resident()? as f64 - before as f64) / IDLE as f64;
    println!(
        "{name}: {IDLE} idle subscribers over {IDLE_CONNECTIONS} connections take {:.1} KiB each ({} MiB before)",
        each / 1024.0,
        before >> 20
    );
    if each > IDLE_BAR {
        return Err(format!("{name}: the bar is {IDLE_BAR} bytes").into());
    }
    Ok(())
}

/// GetStatistics of few and of many jobs, in turn.
async fn statistics(name: &str, server: &Server) -> Result<()> {
    let few = &clients(server, 1, Uuid::new_v4())?[0];
    let many = &clients(server, 1, Uuid::new_v4())?[0];
    for (client, jobs) in [(few, FEW_JOBS), (many, MANY_JOBS)] {
        let types = ["a", "b", "c", "d", "e"];
        for batch in 0..jobs / CREATED_AT_ONCE {
            let jobs = (0..CREATED_AT_ONCE).map(|n| NewJob::new(types[(batch + n) % types.len()]));
            client.create_all(jobs).await?.into_iter().collect::<std::result::Result<Vec<_>, _>>()?;
        }
    }
    let mut took = [Vec::new(), Vec::new()];
    for n in 0..2 * ASKED {
        let client = [few, many][n % 2];
        let started = Instant::now();
        let request = GetStatisticsRequest { series: true, ..Default::default() };
        client.raw().get_statistics(request).await?;
        took[n % 2].push(started.elapsed().as_secs_f64() * 1e3);
    }
    let [few, many] = took.map(median);
    let ratio = many / few;
    println!(
        "{name}: statistics of {MANY_JOBS} jobs take {many:.2} ms, of {FEW_JOBS} {few:.2} ms: {ratio:.2} times as long"
    );
    if ratio > STATISTICS_BAR {
        return Err(format!("{name}: the bar is {STATISTICS_BAR}").into());
    }
    Ok(())
}

/// Counts how often the log is read. SQLite has no such counter.
struct Reads(Option<sqlx::PgConnection>);

impl Reads {
    async fn count(&mut self) -> Result<Option<i64>> {
        let Some(connection) = &mut self.0 else { return Ok(None) };
        // A session publishes its function counts once it has been idle for ten seconds.
        sleep(Duration::from_secs(11)).await;
        let sql = "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_user_functions WHERE funcname LIKE 'page_of_%'";
        Ok(Some(connection.fetch_one(sql).await?.get(0)))
    }
}

async fn all(name: &str, url: &str, reads: &mut Reads, wanted: &[String]) -> Result<()> {
    let is_wanted = |part: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == part);
    let server = Server::start(url, 512).await?;
    if is_wanted("idle") {
        idle(name, &server).await?;
    }
    if is_wanted("follow") {
        follow(name, &server, reads).await?;
    }
    if is_wanted("saturate") {
        saturate(name, &server).await?;
    }
    if is_wanted("statistics") {
        statistics(name, &server).await?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let cluster = Cluster::alone(Durability::Full).await;
    let database = cluster.create_database().await;
    let mut connection = cluster.connect(&database, "postgres").await;
    connection.execute("ALTER ROLE ALL SET track_functions = 'pl'").await?;
    let mut reads = Reads(Some(connection));
    let postgres = all("PostgreSQL", &cluster.url(&database, cluster::SERVER), &mut reads, &wanted).await;
    if let Some(connection) = reads.0.take() {
        connection.close().await?;
    }
    let folder = TempDir::new()?;
    let url = format!("sqlite://{}", folder.path().join("ledger.db").display());
    let sqlite = all("SQLite", &url, &mut Reads(None), &wanted).await;
    drop(cluster);
    postgres.and(sqlite)
}
