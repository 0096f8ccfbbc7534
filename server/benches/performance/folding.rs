//! What folding costs other calls, and whether folding keeps up with the load.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jobledger_client::{RawClient, proto::UpdateJobStatusRequest};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _, PgConnection, Row as _,
    sqlite::SqliteConnectOptions,
};
use tempfile::TempDir;
use tokio::time::sleep;

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
        median,
    },
    figures::{Figure, Figures},
    lives,
    load::{self, Load},
};

/// Jobs that run meanwhile, and their progress reports per second. Each report makes a folded row behind again.
const RUNNING: usize = 500;
const TELLS_A_SECOND: u32 = 1_000;
const HIGHEST: Duration = Duration::from_secs(3);
const OFFERED: Duration = Duration::from_secs(6);
const ROUNDS: usize = 5;
/// With 1h no row gets old enough to be folded. With 1s the server folds all the time.
const FOLD_AFTER: [&str; 2] = ["1h", "1s"];
/// Duration of the load at the highest rate.
const GOES_ON: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_secs(5);
const LIVES: usize = 50_000;
/// The server's default of `--fold-after`.
const DEFAULT: Duration = Duration::from_secs(10);

/// p99.9 of CreateJob in milliseconds at this rate, while jobs run and report progress.
async fn p999(load: &Load, jobs: &Arc<[String]>, rate: u32) -> Result<f64> {
    let jobs = Arc::clone(jobs);
    let tell = move |mut client: RawClient, _, n: u64| {
        let job_id = jobs[n as usize % jobs.len()].clone();
        let progress = Some((n % 100) as i32);
        async move {
            client.update_job_status(UpdateJobStatusRequest { job_id, progress, ..Default::default() }).await?;
            Ok(())
        }
    };
    let telling = load.offered(TELLS_A_SECOND, OFFERED, tell);
    let (created, told) = tokio::join!(load.offered(rate, OFFERED, load::create_one), telling);
    told?;
    Ok(created?.at(0.999))
}

async fn latencies(figures: &mut Figures, name: &str, urls: [String; 2]) -> Result<()> {
    let mut subjects = Vec::new();
    for (url, fold_after) in urls.iter().zip(FOLD_AFTER) {
        let server = Server::start_folding(url, fold_after).await?;
        let load = Load::on(&server)?;
        let jobs = load::running_jobs(&load, RUNNING).await?;
        subjects.push((server, load, jobs));
    }
    let highest = load::create(&subjects[0].1, 256, HIGHEST).await?.rate;
    let rate = (highest / 2.0) as u32;
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let mut of_round = [0.0; 2];
        for (n, (_, load, jobs)) in subjects.iter().enumerate() {
            of_round[n] = p999(load, jobs, rate).await?;
            took[n].push(of_round[n]);
        }
        eprintln!("  {name}: p99.9 at {rate}/s: {:.2} ms held, {:.2} ms folding", of_round[0], of_round[1]);
    }
    let [held, folding] = took.map(median);
    let figure = Figure::new(format!("{name}: CreateJob at {rate}/s while jobs run, p99.9"), "ms", folding);
    figures.add(figure.of("the same with folding held", held).at_most(1.3));
    Ok(())
}

/// The database, read beside the server to find out how long rows have been behind.
enum Beside {
    Postgres(PgConnection),
    Sqlite(Box<SqliteConnectOptions>),
}

impl Beside {
    /// How long the oldest row that is behind has been so.
    async fn behind(&mut self) -> Result<Duration> {
        let seconds: f64 = match self {
            Self::Postgres(connection) => {
                let sql = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - e.recorded_at)), 0)::float8
                    FROM jobledger.org_head h CROSS JOIN LATERAL (
                        SELECT r.base_seq, r.seq FROM jobledger.org_record r WHERE r.org_id = h.org_id ORDER BY r.n DESC LIMIT 1) r
                    CROSS JOIN LATERAL (SELECT e.recorded_at FROM jobledger.job_event e
                        WHERE e.org_id = h.org_id AND e.seq = r.base_seq + 1 AND e.seq <= r.seq) e";
                connection.fetch_one(sql).await?.get(0)
            }
            Self::Sqlite(file) => {
                // The query starts at the heads. A walk through all events would keep SQLite's WAL growing for as long.
                let sql = "SELECT coalesce(max(unixepoch('subsec') - e.recorded_at / 1e6), 0.0)
                    FROM org_head h CROSS JOIN job_event e ON e.org_id = h.org_id AND e.seq = h.base_seq + 1";
                let mut connection = file.connect().await?;
                let seconds = connection.fetch_one(AssertSqlSafe(sql)).await?.get(0);
                connection.close().await?;
                seconds
            }
        };
        Ok(Duration::from_secs_f64(seconds.max(0.0)))
    }
}

/// Runs load at the highest rate for ten minutes: how late folding is, and how memory grows.
async fn goes_on(figures: &mut Figures, name: &str, url: &str, mut beside: Beside) -> Result<()> {
    let server = Server::start(url, 512).await?;
    let began = Instant::now();
    let looking = async {
        let (mut lag, mut memory) = (Duration::ZERO, Vec::new());
        while began.elapsed() < GOES_ON {
            sleep(LOOK).await;
            lag = lag.max(beside.behind().await?.saturating_sub(DEFAULT));
            memory.push(server.resident()? as f64 / f64::from(1 << 20));
        }
        Result::Ok((lag, memory))
    };
    let working = async {
        let mut jobs = 0;
        while began.elapsed() < GOES_ON {
            lives::lives(&server, LIVES, 0).await?;
            jobs += LIVES;
        }
        Result::Ok(jobs as f64 / began.elapsed().as_secs_f64())
    };
    let (looked, rate) = tokio::join!(looking, working);
    let ((lag, memory), rate) = (looked?, rate?);
    let minutes = GOES_ON.as_secs() / 60;
    figures.add(Figure::new(format!("{name}: whole lives for {minutes} minutes"), "/s", rate));
    let lag = Figure::new(format!("{name}: folding late in these, at most"), "s", lag.as_secs_f64());
    figures.add(lag.at_most(3.0));
    let (first, second) = memory.split_at(memory.len() / 2);
    let most = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
    let figure = Figure::new(format!("{name}: resident memory in the second half, at most"), "MiB", most(second));
    figures.add(figure.of("that in the first half", most(first)).at_most(1.1));
    Ok(())
}

pub(crate) async fn folding(figures: &mut Figures, cluster: &Cluster) -> Result<()> {
    let folder = TempDir::new()?;
    let file = |name: &str| folder.path().join(name);
    let url = |name: &str| format!("sqlite://{}", file(name).display());
    latencies(figures, "SQLite", [url("held.db"), url("folding.db")]).await?;
    let databases = [cluster.create_database().await, cluster.create_database().await];
    latencies(figures, "PostgreSQL", databases.map(|database| cluster.url(&database, cluster::SERVER))).await?;
    let file = SqliteConnectOptions::new().filename(file("long.db")).read_only(true);
    let beside = Beside::Sqlite(Box::new(file));
    goes_on(figures, "SQLite", &url("long.db"), beside).await?;
    let database = cluster.create_database().await;
    let beside = Beside::Postgres(cluster.connect(&database, "postgres").await);
    goes_on(figures, "PostgreSQL", &cluster.url(&database, cluster::SERVER), beside).await
}
