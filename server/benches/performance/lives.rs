//! Whole lives of jobs, run by a worker of the client crate.

use std::time::{Duration, Instant};

use jobledger_client::{
    Client, NewJob,
    worker::{Context, Worker},
};
use sqlx::Executor as _;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
    },
    figures::{Figure, Figures},
    load::{self, Load},
    rounds::{Measure, take},
    spent::Meter,
    yardsticks::Yardsticks,
};

/// Jobs per round.
const LIVES: usize = 20_000;
const BARE: Duration = Duration::from_secs(3);
const CREATED_AT_ONCE: usize = 500;
const SLOTS: usize = 400;
/// Pause between two progress reports of a job, long enough that each is sent.
const PACE: Duration = Duration::from_millis(5);
/// Calls in flight for small batches.
const SMALL: usize = 4;
/// How long the foreign snapshot stays open before the second measurement.
const SNAPSHOT: Duration = Duration::from_secs(300);

/// Jobs per second from create to completion.
pub(crate) async fn lives(server: &Server, jobs: usize, reports: u8) -> Result<f64> {
    let creating = create(Client::new(&server.endpoint)?, jobs);
    Ok(jobs as f64 / work(server, jobs, reports, creating).await?.as_secs_f64())
}

/// Creates jobs for [`work`], many per call.
pub(crate) async fn create(client: Client, jobs: usize) -> Result<()> {
    create_of("life", client, jobs).await
}

/// [`create`] for another job type.
pub(crate) async fn create_of(job_type: &str, client: Client, jobs: usize) -> Result<()> {
    for _ in 0..jobs / CREATED_AT_ONCE {
        for created in client.create_all((0..CREATED_AT_ONCE).map(|_| NewJob::new(job_type))).await? {
            created?;
        }
    }
    Ok(())
}

/// Time that a worker takes for `jobs` jobs, which exist or which `creating` creates meanwhile.
pub(crate) async fn work(
    server: &Server,
    jobs: usize,
    reports: u8,
    creating: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<Duration> {
    let client = Client::new(&server.endpoint)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (ended, mut ends) = mpsc::unbounded_channel();
    let handler = move |context: Context, (): ()| {
        let ended = ended.clone();
        async move {
            for n in 1..=reports {
                context.progress(100 / reports * n);
                tokio::time::sleep(PACE).await;
            }
            let _ = ended.send(());
            Ok(())
        }
    };
    let worker = Worker::builder(client.clone()).handle("life", handler).concurrency(SLOTS).progress_interval(PACE / 5);
    let since = Instant::now();
    let working = tokio::spawn(worker.build().expect("it has a handler").run(async {
        let _ = stopped.await;
    }));
    let creating = tokio::spawn(creating);
    for _ in 0..jobs {
        ends.recv().await.ok_or("the worker is gone")?;
    }
    creating.await??;
    // Wait for the last reports.
    loop {
        let counts = client.statistics(&["life"]).await?.counts.ok_or("no counts")?;
        if counts.queued + counts.running == 0 {
            break;
        }
    }
    let took = since.elapsed();
    drop(stop);
    working.await??;
    Ok(took)
}

pub(crate) async fn whole(figures: &mut Figures, cluster: &Cluster, rounds: usize) -> Result<()> {
    let database = cluster.create_database().await;
    let yardsticks = Yardsticks::on(cluster, &database).await?;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    let meter = Meter::of(&server, Some(cluster));
    // Warms up: the first statements are planned without statistics.
    yardsticks.bare_lives(Duration::from_secs(1))?;
    let [plain, told, bare] = take(
        rounds,
        [
            Measure::rate("lives", meter, async || lives(&server, LIVES, 0).await),
            Measure::rate("with 5 reports", meter, async || lives(&server, LIVES / 2, 5).await),
            Measure::new("bare lives", async || {
                yardsticks.vacuum().await?;
                yardsticks.bare_lives(BARE)
            }),
        ],
    )
    .await?;
    figures.add(
        Figure::taken("PostgreSQL: whole lives by an SDK worker", "/s", &plain)
            .of_taken("bare life lane", &plain, &bare)
            .at_least(0.6),
    );
    figures.add(Figure::taken("PostgreSQL: the same with 5 progress reports", "/s", &told).of_taken(
        "those without",
        &told,
        &plain,
    ));
    drop(server);

    let folder = TempDir::new()?;
    let server = Server::start(&format!("sqlite://{}", folder.path().join("lives.db").display()), 512).await?;
    let meter = Meter::of(&server, None);
    let [plain, told] = take(
        rounds,
        [
            Measure::rate("lives", meter, async || lives(&server, LIVES, 0).await),
            Measure::rate("with 5 reports", meter, async || lives(&server, LIVES / 2, 5).await),
        ],
    )
    .await?;
    figures.add(Figure::taken("SQLite: whole lives by an SDK worker", "/s", &plain));
    figures.add(Figure::taken("SQLite: the same with 5 progress reports", "/s", &told).of_taken(
        "those without",
        &told,
        &plain,
    ));
    Ok(())
}

/// Speed after five minutes under a foreign snapshot, for whole lives and for small batches. The snapshot keeps
/// PostgreSQL from removing row versions that were overwritten since.
pub(crate) async fn snapshot(figures: &mut Figures, cluster: &Cluster) -> Result<()> {
    let database = cluster.create_database().await;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    let meter = Meter::of(&server, Some(cluster));
    let load = Load::on(&server)?;
    lives(&server, LIVES, 0).await?;
    let [lived, created] = take(
        3,
        [
            Measure::rate("lives", meter, async || lives(&server, LIVES, 0).await),
            Measure::rate("creates, 4 in flight", meter, async || Ok(load::create(&load, SMALL, BARE).await?.rate)),
        ],
    )
    .await?;
    let mut other = cluster.connect(&database, "postgres").await;
    other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    other.execute("SELECT count(*) FROM jobledger.org_head").await?;
    let since = Instant::now();
    while since.elapsed() < SNAPSHOT {
        let rate = lives(&server, LIVES, 0).await?;
        load::create(&load, SMALL, BARE).await?;
        eprintln!("  after {:.0?}: {rate:.0}", since.elapsed());
    }
    let [lived_since, created_since] = take(
        3,
        [
            Measure::rate("lives", meter, async || lives(&server, LIVES, 0).await),
            Measure::rate("creates, 4 in flight", meter, async || Ok(load::create(&load, SMALL, BARE).await?.rate)),
        ],
    )
    .await?;
    let name = "PostgreSQL: whole lives after 5 minutes under a snapshot";
    figures.add(Figure::taken(name, "/s", &lived_since).of_taken("before", &lived_since, &lived).at_least(0.6));
    let name = "PostgreSQL: CreateJob, 4 in flight, the same";
    figures.add(Figure::taken(name, "/s", &created_since).of_taken("before", &created_since, &created).at_least(0.6));
    Ok(())
}
