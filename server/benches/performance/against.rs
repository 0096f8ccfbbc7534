//! Compares the build of this tree with another build of the server, which may be of an earlier commit: processor time
//! and bytes written per unit of work. The two builds are measured in turn.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use jobledger_client::{
    Client,
    proto::StatusCounts,
    worker::{Context, Worker},
};
use sqlx::{AssertSqlSafe, Executor as _, PgConnection, Row as _};
use tempfile::TempDir;
use tokio::{
    sync::{Semaphore, oneshot},
    task::JoinHandle,
    time::sleep,
};

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
    },
    figures::{Figure, Figures},
    lives,
    load::{self, Load},
    rounds::{Round, Rounds, a_call},
    spent::{Meter, Spent},
    unary::Scale,
};

const MANY: usize = 256;
const SOME: usize = 64;
const BATCHES: usize = 4;
const BATCH: usize = 500;
/// Jobs for the reads and updates.
const JOBS: usize = 1_000;
/// Jobs per round of lives.
const LIVES: usize = 20_000;
/// Jobs per round of lives with stages, which all run at the same time, and their stages.
const STAGED: usize = 2_000;
const STAGES: [&str; 3] = ["fetch", "convert", "store"];
const STAGE: Duration = Duration::from_secs(5);
/// Leases that one worker keeps with three heartbeats per lease, and how many of their jobs report progress how often.
const LEASES: usize = 10_000;
const LEASE: Duration = Duration::from_secs(30);
const TELLING: usize = 1_000;
const TELLS: Duration = Duration::from_millis(250);
const KEPT_FOR: Duration = Duration::from_secs(20);
/// Bound of the processor time per unit, as a part of the other build's.
const BAR: f64 = 1.05;

/// A shape of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Create,
    BatchCreate,
    Get,
    Statistics,
    Update,
    UpdateOne,
    Lives,
    Backlog,
    Stages,
    Leases,
}

impl Shape {
    const ALL: [Self; 10] = [
        Self::Create,
        Self::BatchCreate,
        Self::Get,
        Self::Statistics,
        Self::Update,
        Self::UpdateOne,
        Self::Lives,
        Self::Backlog,
        Self::Stages,
        Self::Leases,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Create => "CreateJob, 256 in flight",
            Self::BatchCreate => "BatchCreateJobs of 500, a job",
            Self::Get => "GetJob, 64 in flight",
            Self::Statistics => "GetStatistics, 64 in flight",
            Self::Update => "UpdateJobStatus of 256 jobs",
            Self::UpdateOne => "UpdateJobStatus of one job",
            Self::Lives => "whole lives by an SDK worker",
            Self::Backlog => "a backlog run by an SDK worker",
            Self::Stages => "lives with stages of 5 s",
            Self::Leases => "a second of 10,000 leases, 1,000 of which report four times",
        }
    }

    /// True if the shape sets the rate, not the server.
    const fn is_paced(self) -> bool {
        matches!(self, Self::Stages | Self::Leases)
    }
}

/// A running build with a database of its own.
struct Subject<'a> {
    server: Server,
    load: Load,
    cluster: Option<&'a Cluster>,
    /// Connection that reads PostgreSQL's log position; `None` for SQLite.
    position: Option<PgConnection>,
    _folder: Option<TempDir>,
}

/// Totals so far: processor time, and bytes written to PostgreSQL's log or by the SQLite server to disk.
struct Looked {
    spent: Spent,
    written: f64,
}

impl<'a> Subject<'a> {
    async fn start(program: &Path, cluster: Option<&'a Cluster>) -> Result<Self> {
        let (url, position, folder) = match cluster {
            Some(cluster) => {
                let (database, position) = migrated(program, cluster).await?;
                (cluster.url(&database, cluster::SERVER), Some(position), None)
            }
            None => {
                let folder = TempDir::new()?;
                (format!("sqlite://{}", folder.path().join("against.db").display()), None, Some(folder))
            }
        };
        let server = Server::start_program(program, &url, 512).await?;
        let load = Load::on(&server)?;
        Ok(Self { server, load, cluster, position, _folder: folder })
    }

    async fn look(&mut self) -> Result<Looked> {
        let written = match &mut self.position {
            Some(connection) => {
                let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
                connection.fetch_one(sql).await?.get(0)
            }
            None => self.server.written()? as f64,
        };
        Ok(Looked { spent: Meter::of(&self.server, self.cluster).look()?, written })
    }

    /// Runs one round. Returns its rate, with processor time per unit, and the bytes written per unit.
    async fn round(&mut self, shape: Shape, time: Duration) -> Result<(Round, f64)> {
        let jobs = match shape {
            Shape::Get | Shape::Update => load::running_jobs(&self.load, JOBS).await?,
            Shape::UpdateOne => load::running_jobs(&self.load, 1).await?,
            _ => [].into(),
        };
        match shape {
            Shape::Backlog => lives::create(Client::new(&self.server.endpoint)?, LIVES).await?,
            Shape::Stages => lives::create(Client::new(&self.server.endpoint)?, STAGED).await?,
            _ => {}
        }
        let kept = if shape == Shape::Leases { Some(Kept::start(&self.server).await?) } else { None };
        let (before, since) = (self.look().await?, Instant::now());
        let units = match shape {
            Shape::Create => load::create(&self.load, MANY, time).await?.calls(),
            Shape::BatchCreate => {
                let rate = load::batch_create(&self.load, BATCHES, BATCH, time).await?;
                rate * since.elapsed().as_secs_f64()
            }
            Shape::Get => load::get(&self.load, &jobs, SOME, time).await?.calls(),
            Shape::Statistics => load::statistics(&self.load, SOME, time).await?.calls(),
            Shape::Update | Shape::UpdateOne => load::update(&self.load, &jobs, MANY, time).await?.calls(),
            Shape::Lives => {
                lives::lives(&self.server, LIVES, 0).await?;
                LIVES as f64
            }
            Shape::Backlog => {
                lives::work(&self.server, LIVES, 0, async { Ok(()) }).await?;
                LIVES as f64
            }
            Shape::Stages => {
                stages(&self.server).await?;
                STAGED as f64
            }
            Shape::Leases => {
                sleep(KEPT_FOR).await;
                KEPT_FOR.as_secs_f64()
            }
        };
        let (took, after) = (since.elapsed(), self.look().await?);
        if let Some(kept) = kept {
            kept.stop().await?;
        }
        let round = Round { value: units / took.as_secs_f64(), cpu: Some(a_call(before.spent, after.spent, units)) };
        Ok((round, (after.written - before.written) / units))
    }
}

/// Creates a database that this build of the program migrates. Returns its name and a superuser's connection to it.
async fn migrated(program: &Path, cluster: &Cluster) -> Result<(String, PgConnection)> {
    let run = |arguments: &[&str]| -> Result<Vec<u8>> {
        let output = Command::new(program).arg("migrate").args(arguments).stderr(Stdio::inherit()).output()?;
        if output.status.success() { Ok(output.stdout) } else { Err(format!("{arguments:?} failed").into()) }
    };
    let database = cluster.create_empty_database("").await;
    run(&["up", "--database-url", &cluster.url(&database, cluster::OWNER)])?;
    let mut connection = cluster.connect(&database, "postgres").await;
    let grants = String::from_utf8(run(&["role-sql", "--role", cluster::SERVER])?)?;
    connection.execute(AssertSqlSafe(grants)).await?;
    Ok((database, connection))
}

/// Runs all waiting jobs at the same time, each through all stages.
async fn stages(server: &Server) -> Result<()> {
    let client = Client::new(&server.endpoint)?;
    let handler = |context: Context, (): ()| async move {
        for stage in STAGES {
            context.stage(stage);
            sleep(STAGE).await;
        }
        Ok(())
    };
    let worker = Worker::builder(client.clone()).handle("life", handler).concurrency(STAGED).build()?;
    let ended = async move {
        while let Ok(statistics) = client.statistics(&["life"]).await {
            let counts = statistics.counts.unwrap_or_default();
            if counts.queued + counts.running == 0 {
                break;
            }
            sleep(Duration::from_millis(250)).await;
        }
    };
    Ok(worker.run(ended).await?)
}

/// A running worker that holds many jobs, some of which report progress.
struct Kept {
    stop: oneshot::Sender<()>,
    working: JoinHandle<std::result::Result<(), jobledger_client::Error>>,
}

impl Kept {
    async fn start(server: &Server) -> Result<Self> {
        let client = Client::new(&server.endpoint)?;
        // The round before gave its jobs back, so they are still queued.
        let there = counts(&client).await?;
        lives::create_of("held", client.clone(), LEASES.saturating_sub(there.queued as usize)).await?;
        let telling = Arc::new(Semaphore::new(TELLING));
        let handler = move |context: Context, (): ()| {
            let telling = Arc::clone(&telling);
            async move {
                // The permit is never returned: this job reports for the rest of the round.
                if let Ok(tells) = telling.try_acquire_owned() {
                    tells.forget();
                    for n in 0.. {
                        context.progress(n % 100);
                        sleep(TELLS).await;
                    }
                }
                context.canceled().await;
                Ok(())
            }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let worker = Worker::builder(client.clone())
            .handle("held", handler)
            .concurrency(LEASES)
            .lease(LEASE)
            .progress_interval(TELLS / 2)
            .shutdown_grace(Duration::ZERO)
            .build()?;
        let working = tokio::spawn(worker.run(async {
            let _ = stopped.await;
        }));
        while counts(&client).await?.running < LEASES as i64 {
            sleep(Duration::from_millis(100)).await;
        }
        Ok(Self { stop, working })
    }

    async fn stop(self) -> Result<()> {
        drop(self.stop);
        Ok(self.working.await??)
    }
}

async fn counts(client: &Client) -> Result<StatusCounts> {
    Ok(client.statistics(&["held"]).await?.counts.unwrap_or_default())
}

/// Measures on both builds every shape whose name contains `wanted`.
pub(crate) async fn against(
    figures: &mut Figures,
    cluster: &Cluster,
    other: &Path,
    wanted: &str,
    scale: Scale,
) -> Result<()> {
    if fs::metadata(other).is_err() {
        return Err(format!("there is no {}: --against takes a build of the server", other.display()).into());
    }
    let own = Path::new(env!("CARGO_BIN_EXE_jobledger"));
    for (name, cluster) in [("SQLite", None), ("PostgreSQL", Some(cluster))] {
        let is_wanted = |shape: &Shape| format!("{name}: {}", shape.name()).contains(wanted);
        let shapes: Vec<_> = Shape::ALL.into_iter().filter(is_wanted).collect();
        if shapes.is_empty() {
            continue;
        }
        let mut subjects = [Subject::start(other, cluster).await?, Subject::start(own, cluster).await?];
        for shape in shapes {
            let mut taken = [(); 2].map(|()| (Rounds::default(), Rounds::default(), Rounds::default()));
            for _ in 0..scale.rounds {
                for (subject, (rate, cpu, written)) in subjects.iter_mut().zip(&mut taken) {
                    let (round, bytes) = subject.round(shape, scale.round).await?;
                    let [server, database, _] = round.cpu.unwrap_or_default();
                    eprint!("  {:.0}/s {server:.1} + {database:.1} µs {bytes:.0} B", round.value);
                    rate.add(round);
                    cpu.add(Round { value: server + database, cpu: None });
                    written.add(Round { value: bytes, cpu: None });
                }
                eprintln!();
            }
            let [other, own] = &taken;
            let named = |what: &str| format!("{name}: {}{what}", shape.name());
            if !shape.is_paced() {
                figures.add(Figure::taken(named(""), "/s", &own.0).of_taken("the other build", &own.0, &other.0));
            }
            let cpu = Figure::taken(named(", processor time"), "µs", &own.1);
            figures.add(cpu.of_taken("the other build", &own.1, &other.1).at_most(BAR));
            let written = Figure::taken(named(", written"), "B", &own.2);
            if own.2.value() > 0.0 {
                figures.add(written.of_taken("the other build", &own.2, &other.2));
            }
        }
    }
    Ok(())
}
