//! Unary calls, alone and many in flight, compared with the limits of the transport and the database.

use std::time::Duration;

use jobledger_client::proto::{self as pb, stream_job_events_response::Item};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use sqlx::{Executor as _, PgConnection, Row as _};
use tempfile::TempDir;
use uuid::Uuid;

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

/// Calls in flight.
const MANY: usize = 256;
const SOME: usize = 64;
/// Duration of the measurement of the server's cost.
const ALONE: Duration = Duration::from_secs(3);
const BATCH: usize = 500;
/// Batches in flight: one commits, one gathers, two are on the way.
const BATCHES: usize = 4;
/// Jobs for the reads.
const JOBS: usize = 1_000;
/// Creates per second while events are timed.
const STEADY: u32 = 500;
const STEADY_TIME: Duration = Duration::from_secs(8);

/// Number of rounds, and the duration of each measure in a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) rounds: usize,
    pub(crate) round: Duration,
}

/// A server, its load, and its name in the figures.
struct Subject<'a> {
    name: &'static str,
    server: &'a Server,
    load: Load,
    meter: Meter<'a>,
    scale: Scale,
}

impl Subject<'_> {
    fn named(&self, what: &str) -> String {
        format!("{}: {what}", self.name)
    }

    async fn empty(&self, callers: usize) -> Result<f64> {
        Ok(load::empty(self.server, callers, self.scale.round).await?.rate)
    }

    async fn create(&self) -> Result<f64> {
        Ok(load::create(&self.load, MANY, self.scale.round).await?.rate)
    }

    async fn batches(&self) -> Result<f64> {
        load::batch_create(&self.load, BATCHES, BATCH, self.scale.round).await
    }

    /// GetJob and GetStatistics, compared with the empty RPC. `bar` is the minimum ratio for GetJob.
    async fn reads(&self, figures: &mut Figures, bar: f64) -> Result<()> {
        let jobs = load::running_jobs(&self.load, JOBS).await?;
        let [read, empty, asked] = take(
            self.scale.rounds,
            [
                Measure::rate("GetJob", self.meter, async || {
                    Ok(load::get(&self.load, &jobs, SOME, self.scale.round).await?.rate)
                }),
                Measure::rate("empty RPC", self.meter, async || self.empty(SOME).await),
                Measure::rate("GetStatistics", self.meter, async || {
                    Ok(load::statistics(&self.load, SOME, self.scale.round).await?.rate)
                }),
            ],
        )
        .await?;
        figures.add(
            Figure::taken(self.named("GetJob, 64 in flight"), "/s", &read)
                .of_taken("empty RPC, 64 in flight", &read, &empty)
                .at_least(bar),
        );
        figures.add(
            Figure::taken(self.named("GetStatistics, 64 in flight"), "/s", &asked).of_taken("the same", &asked, &empty),
        );
        Ok(())
    }

    /// Delay of events from before the commit to the receipt, at a steady rate, compared with the creates' latency.
    async fn events(&self, figures: &mut Figures) -> Result<()> {
        let org = Uuid::new_v4();
        let load = Load::new(&self.server.endpoint, org)?;
        // Creates the org's log, so that the stream starts at its head.
        load::create(&load, 1, Duration::from_millis(100)).await?;
        let mut stream = load.client(1).stream_job_events(pb::StreamJobEventsRequest::default()).await?.into_inner();
        let receiving = tokio::spawn(async move {
            let mut took = Vec::new();
            while let Ok(Some(message)) = stream.message().await {
                let Some(Item::Event(event)) = message.item else { continue };
                let recorded_at = event.recorded_at.unwrap_or_default();
                let recorded_at = recorded_at.seconds * 1_000_000 + i64::from(recorded_at.nanos) / 1_000;
                took.push((SystemClock.now().timestamp_micros() - recorded_at) as f64 / 1e3);
                if took.len() == (STEADY_TIME.as_secs() * u64::from(STEADY)) as usize {
                    break;
                }
            }
            took
        });
        let creates = load.offered(STEADY, STEADY_TIME, load::create_one).await?;
        let mut took = receiving.await?;
        took.sort_by(f64::total_cmp);
        let at = |part: f64| took[((took.len() as f64 * part) as usize).min(took.len() - 1)];
        figures.add(
            Figure::new(self.named("event, from before the commit to its receipt, p50"), "ms", at(0.5))
                .of("CreateJob's p50 at 500/s", creates.at(0.5))
                .at_most(1.0),
        );
        figures.add(Figure::new(self.named("the same, p99"), "ms", at(0.99)).of("its p99", creates.at(0.99)));
        Ok(())
    }

    /// Processor time, write-ahead log and memory of the server during creates.
    async fn cost(&self, figures: &mut Figures, wal: Option<&mut PgConnection>) -> Result<()> {
        let mut position = Position(wal);
        let (cpu, before) = (self.server.cpu()?, position.look().await?);
        let measured = load::create(&self.load, MANY, ALONE).await?;
        let jobs = measured.rate * ALONE.as_secs_f64();
        let cpu = (self.server.cpu()? - cpu).as_secs_f64() / jobs * 1e6;
        figures.add(Figure::new(self.named("CreateJob, processor time of the server"), "µs/job", cpu));
        if let (Some(before), Some(after)) = (before, position.look().await?) {
            let wal = (after.0 - before.0) / jobs;
            figures.add(Figure::new(self.named("the same, write-ahead log"), "B/job", wal));
            let commits = (after.1 - before.1) / jobs;
            // One transaction per batch, plus those that fold.
            figures.add(Figure::new(self.named("the same, transactions, announcements too"), "/job", commits));
        }
        let resident = self.server.resident()? as f64 / f64::from(1 << 20);
        figures.add(Figure::new(self.named("the same, resident memory"), "MiB", resident));
        Ok(())
    }
}

/// Reads PostgreSQL's log position and its number of commits; `None` for SQLite.
struct Position<'a>(Option<&'a mut PgConnection>);

impl Position<'_> {
    async fn look(&mut self) -> Result<Option<(f64, f64)>> {
        let Some(connection) = &mut self.0 else { return Ok(None) };
        // Sessions publish their statistics after a second.
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let sql = "SELECT (pg_current_wal_lsn() - '0/0')::float8, xact_commit::float8 FROM pg_stat_database
                   WHERE datname = current_database()";
        let row = connection.fetch_one(sql).await?;
        Ok(Some((row.get(0), row.get(1))))
    }
}

/// Memory of a server without load.
async fn idle(figures: &mut Figures, name: &str, server: &Server) -> Result<()> {
    // Lets the server start up and run its first maintenance.
    load::empty(server, 1, Duration::from_secs(2)).await?;
    let resident = server.resident()? as f64 / f64::from(1 << 20);
    figures.add(Figure::new(format!("{name}: idle server, resident memory"), "MiB", resident).at_most(30.0));
    Ok(())
}

pub(crate) async fn postgres(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    let database = cluster.create_database().await;
    let yardsticks = Yardsticks::on(cluster, &database).await?;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    let meter = Meter::of(&server, Some(cluster));
    let subject = Subject { name: "PostgreSQL", server: &server, load: Load::on(&server)?, meter, scale };
    idle(figures, subject.name, &server).await?;

    let [create, by_8, by_32, empty, lane, batches] = take(
        scale.rounds,
        [
            Measure::rate("CreateJob", meter, async || subject.create().await),
            Measure::new("statement by 8", async || yardsticks.single_jobs(8, scale.round)),
            Measure::new("by 32", async || yardsticks.single_jobs(32, scale.round)),
            Measure::rate("empty RPC", meter, async || subject.empty(MANY).await),
            Measure::new("bare lane", async || yardsticks.bare_lane(scale.round)),
            Measure::rate("BatchCreateJobs", meter, async || subject.batches().await),
        ],
    )
    .await?;
    let statement = by_8.value().max(by_32.value());
    let name = |what: &str| subject.named(what);
    figures.add(
        Figure::taken(name("CreateJob, 256 in flight"), "/s", &create)
            .of("3.5 × single-job statement or 0.40 × empty RPC", (statement * 3.5).min(empty.value() * 0.40))
            .at_least(1.0),
    );
    figures.add(Figure::new(name("the same"), "/s", create.value()).of("single-job statement by pgbench", statement));
    figures.add(Figure::new(name("the same"), "/s", create.value()).of_taken(
        "empty RPC, 256 in flight",
        &create,
        &empty,
    ));
    figures.add(Figure::new(name("the same"), "/s", create.value()).of_taken("bare lane", &create, &lane));
    figures.add(
        Figure::taken(name("BatchCreateJobs of 500, jobs"), "/s", &batches)
            .of_taken("bare lane", &batches, &lane)
            .at_least(0.7),
    );

    let [create, statement] = take(
        scale.rounds,
        [
            Measure::new("CreateJob, 1 in flight, ms", async || {
                Ok(load::create(&subject.load, 1, scale.round).await?.at(0.5))
            }),
            Measure::new("statement by 1, ms", async || Ok(1e3 / yardsticks.single_jobs(1, scale.round)?)),
        ],
    )
    .await?;
    figures.add(
        Figure::taken(name("CreateJob, 1 in flight, p50"), "ms", &create)
            .of_taken("single-job statement, 1 client", &create, &statement)
            .at_most(2.5),
    );

    subject.reads(figures, 0.45).await?;

    let jobs = load::running_jobs(&subject.load, MANY).await?;
    let hot = load::running_jobs(&subject.load, 1).await?;
    yardsticks.vacuum().await?;
    let [update, on_one, by_8, by_32, empty] = take(
        scale.rounds,
        [
            Measure::rate("UpdateJobStatus", meter, async || {
                Ok(load::update(&subject.load, &jobs, MANY, scale.round).await?.rate)
            }),
            Measure::rate("on one job", meter, async || {
                Ok(load::update(&subject.load, &hot, MANY, scale.round).await?.rate)
            }),
            Measure::new("statement by 8", async || yardsticks.single_updates(8, scale.round)),
            Measure::new("by 32", async || yardsticks.single_updates(32, scale.round)),
            Measure::rate("empty RPC", meter, async || subject.empty(MANY).await),
        ],
    )
    .await?;
    let statement = by_8.value().max(by_32.value());
    figures.add(
        Figure::taken(name("UpdateJobStatus on 256 jobs, 256 in flight"), "/s", &update)
            .of("3.0 × single update and event or 0.35 × empty RPC", (statement * 3.0).min(empty.value() * 0.35))
            .at_least(1.0),
    );
    figures
        .add(Figure::new(name("the same"), "/s", update.value()).of("single update and event by pgbench", statement));
    figures.add(Figure::new(name("the same"), "/s", update.value()).of_taken(
        "empty RPC, 256 in flight",
        &update,
        &empty,
    ));
    figures.add(
        Figure::taken(name("UpdateJobStatus on one job, 256 in flight"), "/s", &on_one)
            .of_taken("256 jobs", &on_one, &update),
    );

    subject.events(figures).await?;
    let mut connection = cluster.connect(&database, "postgres").await;
    subject.cost(figures, Some(&mut connection)).await
}

pub(crate) async fn sqlite(figures: &mut Figures, scale: Scale) -> Result<()> {
    let folder = TempDir::new()?;
    let url = |name: &str| format!("sqlite://{}", folder.path().join(name).display());
    let server = Server::start(&url("batched.db"), 512).await?;
    let single = Server::start(&url("single.db"), 1).await?;
    let meter = Meter::of(&server, None);
    let subject = Subject { name: "SQLite", server: &server, load: Load::on(&server)?, meter, scale };
    let one_by_one =
        Subject { name: "SQLite", server: &single, load: Load::on(&single)?, meter: Meter::of(&single, None), scale };
    idle(figures, subject.name, &server).await?;

    let [create, alone, empty, batches] = take(
        scale.rounds,
        [
            Measure::rate("CreateJob", meter, async || subject.create().await),
            Measure::rate("one by one", one_by_one.meter, async || one_by_one.create().await),
            Measure::rate("empty RPC", meter, async || subject.empty(MANY).await),
            Measure::rate("BatchCreateJobs", meter, async || subject.batches().await),
        ],
    )
    .await?;
    let name = |what: &str| subject.named(what);
    figures.add(
        Figure::taken(name("CreateJob, 256 in flight"), "/s", &create)
            .of_taken("empty RPC, 256 in flight", &create, &empty)
            .at_least(0.45),
    );
    figures.add(
        Figure::new(name("the same"), "/s", create.value()).of_taken("batches of one", &create, &alone).at_least(4.0),
    );
    figures.add(Figure::taken(name("BatchCreateJobs of 500, jobs"), "/s", &batches).of_taken(
        "CreateJob",
        &batches,
        &create,
    ));
    subject.reads(figures, 0.6).await?;

    let jobs = load::running_jobs(&subject.load, MANY).await?;
    let hot = load::running_jobs(&subject.load, 1).await?;
    let [update, on_one, empty] = take(
        scale.rounds,
        [
            Measure::rate("UpdateJobStatus", meter, async || {
                Ok(load::update(&subject.load, &jobs, MANY, scale.round).await?.rate)
            }),
            Measure::rate("on one job", meter, async || {
                Ok(load::update(&subject.load, &hot, MANY, scale.round).await?.rate)
            }),
            Measure::rate("empty RPC", meter, async || subject.empty(MANY).await),
        ],
    )
    .await?;
    figures.add(Figure::taken(name("UpdateJobStatus on 256 jobs, 256 in flight"), "/s", &update).of_taken(
        "empty RPC, 256 in flight",
        &update,
        &empty,
    ));
    figures.add(
        Figure::taken(name("UpdateJobStatus on one job, 256 in flight"), "/s", &on_one)
            .of_taken("256 jobs", &on_one, &update),
    );
    subject.events(figures).await?;
    subject.cost(figures, None).await
}
