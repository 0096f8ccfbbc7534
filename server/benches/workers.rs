//! What workers see: how soon a waiting claim gets a new job, whether claims slow down with history or with many types,
//! and how soon due jobs are ready.
//!
//! ```sh
//! make bench-workers
//! ```
//!
//! Everything runs on this machine: this program with its workers, the server in a process of its own, and PostgreSQL
//! in a throw-away cluster with `fsync` and `synchronous_commit` on.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use jobledger_client::{
    Claim, Client, NewJob,
    proto::{BatchCreateJobsRequest, CreateJobRequest},
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinSet};

use crate::common::{
    Result, Server,
    cluster::{self, Cluster, Durability},
    last_of, median, rate,
};

mod common;

/// Waiting claims, and jobs that are created for them one after the other.
const WAITING: usize = 1_000;
const CREATED: usize = 1_000;
/// Bound of the 99th percentile, from CreateJob's answer to the claim's.
const HANDOVER_BAR: Duration = Duration::from_millis(20);

/// Finished and queued jobs of the large org. The small org has five times `FEW` queued jobs, the one-type org `FEW`.
const FINISHED: usize = 1_000_000;
const QUEUED: usize = 100_000;
const FEW: usize = 20_000;
const CLAIMERS: usize = 16;
const CLAIMED_AT_ONCE: i32 = 10;
const CLAIM_ROUND: Duration = Duration::from_secs(1);
const ROUNDS: usize = 5;
/// Calls per measurement with many types, how much more a claim may take than with one type, and statistics' bound.
const TYPE_CALLS: usize = 200;
const TYPES_BAR: Duration = Duration::from_millis(10);
const STATISTICS_BAR: Duration = Duration::from_millis(500);
/// Bound of the time until the last of many jobs that are due at once is ready.
const DUE_BAR: Duration = Duration::from_secs(2);
/// Minimum rate of claims in the large org, as a part of the rate in the small org.
const HISTORY_BAR: f64 = 0.8;

/// How soon one of many waiting workers gets a new job.
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
        // The first jobs are not counted, because the workers are still starting.
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

/// SQL for an org with finished and then queued jobs of `types` types.
fn rows(is_postgres: bool, org: u8, (finished, queued): (usize, usize), types: usize) -> Vec<String> {
    let n = finished + queued;
    let job_type = if types == 1 { "'bench'".to_owned() } else { format!("'bench' || (n % {types})") };
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
             SELECT {org}, {id}, {job_type}, {status}, 0, 1000000, 2, 600000000, {now}, {now}, n,
                CASE WHEN n <= {finished} THEN {now} END, {now}, 1, n, {now} FROM {series}"
        ),
        format!(
            "INSERT INTO {schema}job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type{})
             SELECT {org}, n, {id}, 1, {now}, {now}, 'created', 'queued', 0, {job_type}{} FROM {series}",
            if is_postgres { ", bytes" } else { "" },
            if is_postgres { ", 256" } else { "" }
        ),
        format!("INSERT INTO {schema}org_head (org_id, seq, recorded_at, types) VALUES ({org}, {n}, {now}, {types})"),
        format!(
            "INSERT INTO {schema}org_counter SELECT org_id, type, sum(CASE WHEN status = 'queued' THEN 1 ELSE 0 END), 0,
                sum(CASE WHEN status = 'succeeded' THEN 1 ELSE 0 END), 0, 0, 0, 0 FROM {schema}job WHERE org_id = {org} GROUP BY 1, 2"
        ),
        format!("INSERT INTO {schema}org_due (org_id, next_due_at) VALUES ({org}, {now})"),
    ];
    if is_postgres {
        sql.push(format!("INSERT INTO jobledger.org_month VALUES ({org}, date_trunc('month', now(), 'UTC'), 1)"));
    }
    sql
}

/// Jobs claimed per second in an org.
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

/// Whether claims are as fast with a million finished jobs as without.
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

/// Median duration of a call.
async fn took(calls: usize, mut call: impl AsyncFnMut() -> Result<()>) -> Result<Duration> {
    let mut took = Vec::with_capacity(calls);
    for _ in 0..calls {
        let began = Instant::now();
        call().await?;
        took.push(began.elapsed());
    }
    took.sort_unstable();
    Ok(took[calls / 2])
}

/// Duration of a claim with many types, or with many leases under one `request_id`, compared with a claim of the only
/// type; and the duration of statistics of many types.
async fn types(name: &str, url: &str) -> Result<()> {
    let server = Server::start(url, 512).await?;
    let client = |org: u8| {
        let org = format!("00000000-0000-0000-0000-0000000000{org:02x}").parse()?;
        Result::Ok(Client::builder(&server.endpoint).org(org).build()?)
    };
    let claim = async |org: u8, types: Vec<String>, request: Option<&str>| {
        let client = client(org)?;
        took(TYPE_CALLS, async || {
            let mut claim = Claim::new("w").types(types.clone());
            if let Some(request) = request {
                claim = claim.request_id(request);
            }
            if client.claim(claim).await?.is_empty() { Err("the jobs are used up".into()) } else { Ok(()) }
        })
        .await
    };
    let one = claim(1, vec!["bench".to_owned()], None).await?;
    println!("{name}: a claim of the only type takes {one:.2?}");
    let named: Vec<_> = (0..100).map(|n| format!("bench{n}")).collect();
    let mut missed = false;
    for (what, org, types, request) in [
        ("of all types, 10,000 of which have one that is ready,", 2, Vec::new(), None),
        ("of 100 types with 100 each", 3, named, None),
        ("that came before, under an id that has 14,500 leases,", 4, Vec::new(), Some("r")),
    ] {
        let took = claim(org, types, request).await?;
        println!("  one {what} {took:.2?} (bar: {TYPES_BAR:?} more)");
        missed |= took > one + TYPES_BAR;
    }
    let many = client(2)?;
    let statistics = took(9, async || {
        many.statistics(&[]).await?;
        Ok(())
    });
    let statistics = statistics.await?;
    println!("  GetStatistics of 10,000 types {statistics:.2?} (bar: {STATISTICS_BAR:?})");
    missed |= statistics > STATISTICS_BAR;
    if missed { Err(format!("{name}: many types cost too much").into()) } else { Ok(()) }
}

/// How soon jobs that are due at one instant are all ready: 20,000 jobs of one org, and one job each of 2,000 orgs.
/// `waiting` counts the jobs that are not ready.
async fn due(name: &str, url: &str, mut waiting: impl AsyncFnMut() -> Result<i64>) -> Result<()> {
    let server = Server::start(url, 512).await?;
    let mut missed = false;
    for (orgs, jobs) in [(1_usize, 20_000_usize), (2_000, 1)] {
        let at = SystemTime::from(SystemClock.now()) + Duration::from_secs(20);
        let job = CreateJobRequest { r#type: "bench".to_owned(), scheduled_at: Some(at.into()), ..Default::default() };
        let mut creating = JoinSet::new();
        for org in 0..orgs {
            let org = format!("00000000-0000-0000-0001-{org:012x}").parse()?;
            let (mut client, job) = (Client::builder(&server.endpoint).org(org).build()?.raw(), job.clone());
            creating.spawn(async move {
                for _ in 0..jobs.div_ceil(500) {
                    let requests = vec![job.clone(); jobs.min(500)];
                    client.batch_create_jobs(BatchCreateJobsRequest { requests }).await?;
                }
                Result::Ok(())
            });
            if creating.len() >= 64 {
                creating.join_next().await.ok_or("nobody creates")???;
            }
        }
        while let Some(created) = creating.join_next().await {
            created??;
        }
        if SystemTime::from(SystemClock.now()) > at {
            return Err(format!("{name}: creating them took too long").into());
        }
        // The pause keeps the count from being the load.
        while waiting().await? > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let late = SystemTime::from(SystemClock.now()).duration_since(at)?;
        println!(
            "{name}: {jobs} jobs of each of {orgs} orgs, due at once: the last is ready after {late:.2?} (bar: {DUE_BAR:?})"
        );
        missed |= late > DUE_BAR;
    }
    if missed { Err(format!("{name}: what is due is late").into()) } else { Ok(()) }
}

/// SQL for an org whose `n` jobs are all held under leases of claims with one `request_id`.
fn held(is_postgres: bool, org: u8, n: usize) -> Vec<String> {
    let mut sql = rows(is_postgres, org, (0, n), 1);
    let schema = if is_postgres { "jobledger." } else { "" };
    let (whose, at) = if is_postgres {
        (format!("'00000000-0000-0000-0000-0000000000{org:02x}'"), "now() + interval '1 hour'".to_owned())
    } else {
        (format!("unhex('000000000000000000000000000000{org:02x}')"), "(unixepoch() + 3600) * 1000000".to_owned())
    };
    sql.push(format!(
        "UPDATE {schema}job SET status = 'running', attempt = 1, lease_nonce = 1, lease_worker = 'w', lease_request = 'r',
            lease_granted = 3600000000, lease_expires_at = {at}, due_at = {at}, lease_confirmed = true WHERE org_id = {whose}"
    ));
    sql
}

#[tokio::main]
async fn main() -> Result<()> {
    // `cargo bench --bench workers -- handover` runs that part alone.
    let only: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name| only.is_empty() || only.iter().any(|wanted| wanted == name);
    let folder = TempDir::new()?;
    let file = |name: &str| folder.path().join(format!("{name}.db"));
    let sqlite = |name| format!("sqlite://{}", file(name).display());
    let cluster = Cluster::alone(Durability::Full).await;
    if is_wanted("handover") {
        handover("SQLite", &sqlite("handover")).await?;
        let database = cluster.create_database().await;
        handover("PostgreSQL", &cluster.url(&database, cluster::SERVER)).await?;
    }
    if is_wanted("history") {
        drop(Server::start(&sqlite("history"), 512).await?);
        let mut connection = sqlx::sqlite::SqliteConnectOptions::new().filename(file("history")).connect().await?;
        for sql in rows(false, 1, (0, FEW * 5), 1).into_iter().chain(rows(false, 2, (FINISHED, QUEUED), 1)) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        history("SQLite", &sqlite("history")).await?;
        let database = cluster.create_database().await;
        let mut connection = cluster.connect(&database, "postgres").await;
        for sql in rows(true, 1, (0, FEW * 5), 1).into_iter().chain(rows(true, 2, (FINISHED, QUEUED), 1)) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        connection.execute("VACUUM ANALYZE").await?;
        history("PostgreSQL", &cluster.url(&database, cluster::SERVER)).await?;
    }
    if is_wanted("types") {
        let all = |is_postgres| {
            let one = rows(is_postgres, 1, (0, FEW), 1);
            let many = rows(is_postgres, 2, (0, 10_000), 10_000);
            let hundred = rows(is_postgres, 3, (0, 10_000), 100);
            one.into_iter().chain(many).chain(hundred).chain(held(is_postgres, 4, 14_500))
        };
        drop(Server::start(&sqlite("types"), 512).await?);
        let mut connection = sqlx::sqlite::SqliteConnectOptions::new().filename(file("types")).connect().await?;
        for sql in all(false) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        types("SQLite", &sqlite("types")).await?;
        let database = cluster.create_database().await;
        let mut connection = cluster.connect(&database, "postgres").await;
        for sql in all(true) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        types("PostgreSQL", &cluster.url(&database, cluster::SERVER)).await?;
    }
    if is_wanted("due") {
        const WAITING: &str = "SELECT count(*) FROM job WHERE due_at IS NOT NULL AND status = 'queued'";
        let options =
            sqlx::sqlite::SqliteConnectOptions::new().filename(file("due")).busy_timeout(Duration::from_secs(5));
        drop(Server::start(&sqlite("due"), 512).await?);
        let mut connection = options.connect().await?;
        due("SQLite", &sqlite("due"), async || Ok(sqlx::query_scalar(WAITING).fetch_one(&mut connection).await?))
            .await?;
        let database = cluster.create_database().await;
        let mut connection = cluster.connect(&database, "postgres").await;
        connection.execute("SET search_path = jobledger").await?;
        let waiting = async || Ok(sqlx::query_scalar(WAITING).fetch_one(&mut connection).await?);
        due("PostgreSQL", &cluster.url(&database, cluster::SERVER), waiting).await?;
    }
    Ok(())
}
