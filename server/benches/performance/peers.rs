//! Comparison with graphile-worker, one of the fastest queues in PostgreSQL that workers reach by SQL, on the same
//! cluster and in turn. It keeps no history and serves no streams; it deletes jobs once they are done.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use jobledger_client::Client;

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

/// Jobs per round.
const JOBS: usize = 20_000;
const MANY: usize = 256;

/// The variable with the folder where the Makefile has installed graphile-worker.
const MODULES: &str = "PEERS_MODULES";

/// Runs graphile-worker. Returns the elapsed time and the processor time of the Node.js process.
fn graphile(what: &str, url: &str, jobs: usize) -> Result<[Duration; 2]> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/graphile.mjs");
    let output = Command::new("node").args([script, what, url, &jobs.to_string()]).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8(output.stdout)?;
    let numbers = text.split_whitespace().map(str::parse).collect::<std::result::Result<Vec<u64>, _>>()?;
    let [took, cpu] = numbers[..] else { return Err("graphile-worker failed".into()) };
    Ok([took, cpu].map(Duration::from_micros))
}

fn round(jobs: f64, took: Duration, before: Spent, after: Spent) -> Round {
    Round { value: jobs / took.as_secs_f64(), cpu: Some(a_call(before, after, jobs)) }
}

/// Compares jobs added one by one, a backlog of jobs that do nothing, and jobs added in bulk and run.
pub(crate) async fn peers(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    if std::env::var_os(MODULES).is_none() {
        return Err(format!("{MODULES} does not say where graphile-worker is: `make bench BENCH=peers` does").into());
    }
    let database = cluster.create_database().await;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    let theirs = cluster.url(&cluster.create_empty_database("").await, cluster::OWNER);
    let load = Load::on(&server)?;
    let meter = Meter::of(&server, Some(cluster));
    let mut taken = [(); 6].map(|()| Rounds::default());
    for _ in 0..scale.rounds {
        let [added, ran, created, lived, theirs_whole, whole] = &mut taken;
        for (what, rounds) in [("add", &mut *added), ("run", &mut *ran)] {
            let before = meter.look()?;
            let [took, cpu] = graphile(what, &theirs, JOBS)?;
            let after = Spent { server: before.server, generator: before.generator + cpu, ..meter.look()? };
            rounds.add(round(JOBS as f64, took, before, after));
        }
        let before = meter.look()?;
        let rate = load::create(&load, MANY, scale.round).await?.rate;
        created.add(round(rate * scale.round.as_secs_f64(), scale.round, before, meter.look()?));
        let (since, first) = (Instant::now(), meter.look()?);
        lives::create(Client::new(&server.endpoint)?, JOBS).await?;
        let before = meter.look()?;
        let took = lives::work(&server, JOBS, 0, async { Ok(()) }).await?;
        let after = meter.look()?;
        lived.add(round(JOBS as f64, took, before, after));
        whole.add(round(JOBS as f64, since.elapsed(), first, after));
        let before = meter.look()?;
        let [took, cpu] = graphile("bulk", &theirs, JOBS)?;
        let [then, more] = graphile("run", &theirs, JOBS)?;
        let after = Spent { server: before.server, generator: before.generator + cpu + more, ..meter.look()? };
        theirs_whole.add(round(JOBS as f64, took + then, before, after));
        let of_round = [&*added, ran, created, lived, theirs_whole, whole];
        eprintln!("  {}", of_round.map(|rounds| format!("{:.0}", rounds.value())).join(" "));
    }
    let [added, ran, created, lived, theirs_whole, whole] = &taken;
    figures.add(Figure::taken("graphile-worker: jobs added one by one, 256 in flight", "/s", added));
    let name = "PostgreSQL: CreateJob, 256 in flight";
    figures.add(Figure::taken(name, "/s", created).of_taken("graphile-worker", created, added));
    figures.add(Figure::taken("graphile-worker: a backlog run", "/s", ran));
    let name = "PostgreSQL: a backlog run by an SDK worker";
    figures.add(Figure::taken(name, "/s", lived).of_taken("graphile-worker", lived, ran));
    figures.add(Figure::taken("graphile-worker: created in bulk, and run", "/s", theirs_whole));
    let name = "PostgreSQL: created in bulk, and run by an SDK worker";
    figures.add(Figure::taken(name, "/s", whole).of_taken("graphile-worker", whole, theirs_whole));
    Ok(())
}
