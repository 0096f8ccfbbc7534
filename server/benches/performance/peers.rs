//! graphile-worker on the same cluster, in turn: a queue in PostgreSQL that workers reach by SQL, among the fastest of those. It keeps no
//! history and serves no streams; its jobs are gone once they are done.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use jobledger_client::{
    Client, NewJob,
    worker::{Context, Worker},
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
    },
    figures::{Figure, Figures},
    load::{self, Load},
    rounds::{Round, Rounds, a_call},
    spent::{Meter, Spent},
    unary::Scale,
};

/// Jobs of one round.
const JOBS: usize = 20_000;
const CREATED_AT_ONCE: usize = 500;
const SLOTS: usize = 400;
const MANY: usize = 256;

/// Where the Makefile has put it.
const MODULES: &str = "PEERS_MODULES";

/// graphile-worker's side: what took so long, of the wall's time and the processor's.
fn graphile(what: &str, url: &str, jobs: usize) -> Result<[Duration; 2]> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/graphile.mjs");
    let output = Command::new("node").args([script, what, url, &jobs.to_string()]).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8(output.stdout)?;
    let numbers = text.split_whitespace().map(str::parse).collect::<std::result::Result<Vec<u64>, _>>()?;
    let [took, cpu] = numbers[..] else { return Err("graphile-worker failed".into()) };
    Ok([took, cpu].map(Duration::from_micros))
}

/// A worker of the client crate runs the jobs that are there; how long that takes.
async fn run(server: &Server, jobs: usize) -> Result<Duration> {
    let client = Client::new(&server.endpoint)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (ended, mut ends) = mpsc::unbounded_channel();
    let handler = move |_: Context, (): ()| {
        let ended = ended.clone();
        async move {
            let _ = ended.send(());
            Ok(())
        }
    };
    let worker = Worker::builder(client.clone()).handle("peer", handler).concurrency(SLOTS);
    let since = Instant::now();
    let working = tokio::spawn(worker.build().expect("it has a handler").run(async {
        let _ = stopped.await;
    }));
    for _ in 0..jobs {
        ends.recv().await.ok_or("the worker is gone")?;
    }
    // The last reports are still on their way.
    loop {
        let counts = client.statistics(&["peer"]).await?.counts.ok_or("no counts")?;
        if counts.queued + counts.running == 0 {
            break;
        }
    }
    let took = since.elapsed();
    drop(stop);
    working.await??;
    Ok(took)
}

async fn backlog(server: &Server, jobs: usize) -> Result<()> {
    let client = Client::new(&server.endpoint)?;
    for _ in 0..jobs / CREATED_AT_ONCE {
        for created in client.create_all((0..CREATED_AT_ONCE).map(|_| NewJob::new("peer"))).await? {
            created?;
        }
    }
    Ok(())
}

fn round(jobs: f64, took: Duration, before: Spent, after: Spent) -> Round {
    Round { value: jobs / took.as_secs_f64(), cpu: Some(a_call(before, after, jobs)) }
}

/// Jobs added one by one, many at a time; and a backlog of jobs that do nothing.
pub(crate) async fn peers(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    if std::env::var_os(MODULES).is_none() {
        return Err(format!("{MODULES} does not say where graphile-worker is: `make bench BENCH=peers` does").into());
    }
    let database = cluster.create_database().await;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    let theirs = cluster.url(&cluster.create_empty_database("").await, cluster::OWNER);
    let load = Load::on(&server)?;
    let meter = Meter::of(&server, Some(cluster));
    let mut taken = [(); 4].map(|()| Rounds::default());
    for _ in 0..scale.rounds {
        let [added, ran, created, lived] = &mut taken;
        for (what, rounds) in [("add", &mut *added), ("run", &mut *ran)] {
            let before = meter.look()?;
            let [took, cpu] = graphile(what, &theirs, JOBS)?;
            let after = Spent { server: before.server, generator: before.generator + cpu, ..meter.look()? };
            rounds.add(round(JOBS as f64, took, before, after));
        }
        let before = meter.look()?;
        let rate = load::create(&load, MANY, scale.round).await?.rate;
        created.add(round(rate * scale.round.as_secs_f64(), scale.round, before, meter.look()?));
        backlog(&server, JOBS).await?;
        let before = meter.look()?;
        let took = run(&server, JOBS).await?;
        lived.add(round(JOBS as f64, took, before, meter.look()?));
        eprintln!("  {}", [&*added, ran, created, lived].map(|rounds| format!("{:.0}", rounds.value())).join(" "));
    }
    let [added, ran, created, lived] = &taken;
    figures.add(Figure::taken("graphile-worker: jobs added one by one, 256 in flight", "/s", added));
    let name = "PostgreSQL: CreateJob, 256 in flight";
    figures.add(Figure::taken(name, "/s", created).of_taken("graphile-worker", created, added));
    figures.add(Figure::taken("graphile-worker: a backlog run", "/s", ran));
    let name = "PostgreSQL: a backlog run by an SDK worker";
    figures.add(Figure::taken(name, "/s", lived).of_taken("graphile-worker", lived, ran));
    Ok(())
}
