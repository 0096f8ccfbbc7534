//! Whether calls slow down as the ledger grows: the same calls on an empty database and on one with a million finished
//! jobs and their ten million events. Also the same creates through one server and through three.

use std::time::Duration;

use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
    },
    figures::{Figure, Figures},
    lives::lives,
    load::{self, Load},
    rounds::{Measure, take},
    spent::Meter,
    unary::Scale,
};

const FINISHED: usize = 1_000_000;
const EVENTS_EACH: usize = 10;
/// Jobs that wait to be claimed, in both databases.
const WAITING: usize = 200_000;
const MANY: usize = 256;
const SOME: usize = 64;
const CLAIMERS: usize = 16;
const CLAIM_ROUND: Duration = Duration::from_secs(1);
const LIVES: usize = 10_000;
/// Minimum rate on the large database, as a part of the rate on the small one.
const BAR: f64 = 0.8;
/// Minimum rate with three servers, as a part of the rate with one.
const REPLICAS_BAR: f64 = 0.8;

/// SQL that differs between the two databases.
struct Dialect {
    schema: &'static str,
    org: &'static str,
    id: &'static str,
    now: &'static str,
    bytes: [&'static str; 2],
}

const POSTGRES: Dialect = Dialect {
    schema: "jobledger.",
    org: "'00000000-0000-0000-0000-000000000000'::uuid",
    id: "('01980000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid",
    now: "now()",
    bytes: [", bytes", ", 256"],
};

const SQLITE: Dialect = Dialect {
    schema: "",
    org: "unhex('00000000000000000000000000000000')",
    id: "unhex('01980000000070008000' || printf('%012x', n))",
    now: "(SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER))",
    bytes: ["", ""],
};

impl Dialect {
    fn series(&self, first: usize, last: usize) -> String {
        if self.schema.is_empty() {
            format!(
                "(WITH RECURSIVE s (n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM s WHERE n < {last}) SELECT n FROM s)"
            )
        } else {
            format!("generate_series({first}, {last}) n")
        }
    }

    /// SQL that fills a log with finished jobs, each with `EVENTS_EACH` events, and with waiting jobs.
    fn fill(&self, finished: usize) -> Vec<String> {
        let Self { schema, org, id, now, bytes: [bytes, weight] } = self;
        let last = finished + WAITING;
        let of_finished = finished * EVENTS_EACH;
        let (jobs, events) = (self.series(1, last), self.series(1, finished));
        let is_finished = format!("n <= {finished}");
        let seq = format!("CASE WHEN {is_finished} THEN n * {EVENTS_EACH} ELSE {of_finished} + n - {finished} END");
        let created_seq =
            format!("CASE WHEN {is_finished} THEN (n - 1) * {EVENTS_EACH} + 1 ELSE {of_finished} + n - {finished} END");
        let job_type = format!("CASE WHEN {is_finished} THEN 'bench' ELSE 'waiting' END");
        let event = |seq: &str, job_seq: usize, kind: &str, prev: &str, next: &str, of: &str, rows: &str| {
            format!(
                "INSERT INTO {schema}job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status,
                    attempt, job_type{bytes})
                 SELECT {org}, {seq}, {id}, {job_seq}, {now}, {now}, {kind}, {prev}, {next}, 1, '{of}'{weight} FROM {rows}"
            )
        };
        let mut sql = vec![format!(
            "INSERT INTO {schema}job (org_id, id, type, status, attempt, retry_initial, retry_multiplier, retry_max, created_at,
                updated_at, created_seq, finished_at, ready_at, last_job_seq, last_seq, last_recorded_at)
             SELECT {org}, {id}, {job_type}, CASE WHEN {is_finished} THEN 'succeeded' ELSE 'queued' END, 0, 1000000, 2,
                600000000, {now}, {now}, {created_seq}, CASE WHEN {is_finished} THEN {now} END, {now},
                CASE WHEN {is_finished} THEN {EVENTS_EACH} ELSE 1 END, {seq}, {now} FROM {jobs}"
        )];
        if finished > 0 {
            for nth in 1..=EVENTS_EACH {
                let (kind, prev, next) = match nth {
                    1 => ("'created'", "NULL", "'queued'"),
                    2 => ("'started'", "'queued'", "'running'"),
                    EVENTS_EACH => ("'succeeded'", "'running'", "'succeeded'"),
                    _ => ("'progress'", "'running'", "'running'"),
                };
                let seq = format!("(n - 1) * {EVENTS_EACH} + {nth}");
                sql.push(event(&seq, nth, kind, prev, next, "bench", &events));
            }
        }
        let waiting = self.series(finished + 1, last);
        let seq = format!("{of_finished} + n - {finished}");
        sql.push(event(&seq, 1, "'created'", "NULL", "'queued'", "waiting", &waiting));
        let head = of_finished + WAITING;
        sql.push(format!(
            "INSERT INTO {schema}org_head (org_id, seq, recorded_at, types) VALUES ({org}, {head}, {now}, 2)"
        ));
        sql.push(format!(
            "INSERT INTO {schema}org_counter (org_id, type, queued, running, succeeded, failed, canceled, dead_letter)
             VALUES ({org}, 'bench', 0, 0, {finished}, 0, 0, 0), ({org}, 'waiting', {WAITING}, 0, 0, 0, 0, 0)"
        ));
        sql.push(format!("INSERT INTO {schema}org_due (org_id, next_due_at) VALUES ({org}, {now})"));
        if !schema.is_empty() {
            sql.push(format!("INSERT INTO jobledger.org_month VALUES ({org}, date_trunc('month', now(), 'UTC'), 1)"));
            sql.push("VACUUM ANALYZE".to_owned());
            // Writes the new data to disk first, so that the measurements don't pay for it.
            sql.push("CHECKPOINT".to_owned());
        }
        sql
    }
}

/// Ids of 1,000 jobs to read: finished jobs of the large database, or new jobs in the small one.
async fn known(load: &Load, is_large: bool) -> Result<std::sync::Arc<[String]>> {
    if !is_large {
        return load::running_jobs(load, 1_000).await;
    }
    let id = |n: usize| format!("01980000-0000-7000-8000-{:012x}", n * (FINISHED / 1_000) + 1);
    Ok((0..1_000).map(id).collect())
}

/// Measures each call on the small and on the large database, in turn.
async fn compare(
    figures: &mut Figures,
    name: &str,
    servers: &[Server; 2],
    cluster: Option<&Cluster>,
    scale: Scale,
) -> Result<()> {
    let loads = [Load::on(&servers[0])?, Load::on(&servers[1])?];
    let read = [known(&loads[0], false).await?, known(&loads[1], true).await?];
    let updated = [load::running_jobs(&loads[0], MANY).await?, load::running_jobs(&loads[1], MANY).await?];
    let Scale { rounds, round } = scale;
    let create = async |n: usize| Ok(load::create(&loads[n], MANY, round).await?.rate);
    let batch = async |n: usize| load::batch_create(&loads[n], 4, 500, round).await;
    let get = async |n: usize| Ok(load::get(&loads[n], &read[n], SOME, round).await?.rate);
    let update = async |n: usize| Ok(load::update(&loads[n], &updated[n], MANY, round).await?.rate);
    let claim = async |n: usize| load::claim(&loads[n], CLAIMERS, CLAIM_ROUND).await;
    let count = async |n: usize| Ok(load::statistics(&loads[n], SOME, round).await?.rate);
    let live = async |n: usize| lives(&servers[n], LIVES, 0).await;
    macro_rules! both {
        ($what:literal, $call:ident) => {{
            let [small, large] = take(
                rounds,
                [
                    Measure::rate($what, Meter::of(&servers[0], cluster), async || $call(0).await),
                    Measure::rate("large", Meter::of(&servers[1], cluster), async || $call(1).await),
                ],
            )
            .await?;
            let what = format!("{name}: {} beside 1,000,000 jobs, 10,000,000 events", $what);
            figures.add(Figure::taken(what, "/s", &large).of_taken("an empty database", &large, &small).at_least(BAR));
        }};
    }
    both!("CreateJob", create);
    both!("BatchCreateJobs, jobs", batch);
    both!("GetJob", get);
    both!("UpdateJobStatus", update);
    both!("ClaimJobs, jobs", claim);
    both!("GetStatistics", count);
    both!("whole lives", live);
    Ok(())
}

/// Compares a small with a large database, on SQLite and on PostgreSQL.
pub(crate) async fn growth(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    let folder = TempDir::new()?;
    let files = ["small", "large"].map(|name| folder.path().join(format!("{name}.db")));
    let url = |n: usize| format!("sqlite://{}", files[n].display());
    for (n, finished) in [0, FINISHED].into_iter().enumerate() {
        drop(Server::start(&url(n), 512).await?);
        let options = SqliteConnectOptions::new().filename(&files[n]).pragma("cache_size", "-1048576");
        let mut connection = options.connect().await?;
        for sql in SQLITE.fill(finished) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        sqlx::Connection::close(connection).await?;
    }
    let servers = [Server::start(&url(0), 512).await?, Server::start(&url(1), 512).await?];
    compare(figures, "SQLite", &servers, None, scale).await?;
    drop(servers);

    let mut servers = Vec::new();
    for finished in [0, FINISHED] {
        let database = cluster.create_database().await;
        let mut connection = cluster.connect(&database, "postgres").await;
        for sql in POSTGRES.fill(finished) {
            connection.execute(AssertSqlSafe(sql)).await?;
        }
        servers.push(Server::start(&cluster.url(&database, cluster::SERVER), 512).await?);
    }
    let servers = <[Server; 2]>::try_from(servers).map_err(|_| "there are two")?;
    compare(figures, "PostgreSQL", &servers, Some(cluster), scale).await
}

/// Creates jobs of one org through one server, and through three servers on the same database.
pub(crate) async fn replicas(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    let database = cluster.create_database().await;
    let url = cluster.url(&database, cluster::SERVER);
    let servers = [Server::start(&url, 512).await?, Server::start(&url, 512).await?, Server::start(&url, 512).await?];
    let loads = [Load::on(&servers[0])?, Load::on(&servers[1])?, Load::on(&servers[2])?];
    let meter = Meter { servers: &servers, cluster: Some(cluster) };
    let [one, three] = take(
        scale.rounds,
        [
            Measure::rate("one", meter, async || Ok(load::create(&loads[0], MANY, scale.round).await?.rate)),
            Measure::rate("three", meter, async || {
                let (first, loads) = (&loads[0], loads.clone());
                let created = first.calls(MANY, scale.round, move |_, caller, n| {
                    load::create_one(loads[caller % 3].client(caller / 3), caller, n)
                });
                Ok(created.await?.rate)
            }),
        ],
    )
    .await?;
    let name = "PostgreSQL: CreateJob of one org by three replicas";
    figures.add(Figure::taken(name, "/s", &three).of_taken("one", &three, &one).at_least(REPLICAS_BAR));
    Ok(())
}
