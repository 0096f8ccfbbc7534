//! Speed of the service on both databases, compared with the limits of the transport, the database and the machine.
//!
//! ```sh
//! make bench
//! ```
//!
//! Servers run in processes of their own, on this machine, beside this load generator, which uses the client crate.
//! PostgreSQL is a throw-away cluster with `fsync` and `synchronous_commit` on. Both sides of a ratio were measured in
//! turn in one run; the ratio is that of their medians over several rounds. docs/performance.md explains each number.

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use crate::{
    common::{
        Result,
        cluster::{Cluster, Durability},
    },
    figures::Figures,
    unary::Scale,
};

mod against;
#[path = "../common/mod.rs"]
mod common;
mod curves;
mod figures;
mod folding;
mod generators;
mod growth;
mod lives;
mod load;
mod orgs;
mod peers;
mod plot;
mod rounds;
mod spent;
mod unary;
mod yardsticks;

/// The parts in order. The second list runs only on request: it takes long, or needs more than this repository has.
const PARTS: [&str; 6] = ["sqlite", "postgres", "orgs", "lives", "replicas", "curves"];
const LONG_PARTS: [&str; 5] = ["folding", "growth", "snapshot", "peers", "against"];

const HELP: &str = "cargo bench --bench performance -- [PART …] [--json FILE] [--plots FOLDER] [--rounds N] [--round SECONDS]
    [--against PROGRAM [--shape TEXT]]

Parts: sqlite, postgres, orgs, lives, replicas, curves; folding, growth and snapshot, which take many minutes; peers, which takes Node.js and
graphile-worker (make brings it); and against, which compares with another build of the server. Without any: the first six.
--shape has it compare those whose names (SQLite: whole lives by an SDK worker, for one) contain the text.
--json writes a line of JSON a figure, --plots two plots. The exit code is 1 if a figure is below its bar.";

struct Options {
    parts: Vec<String>,
    json: Option<String>,
    plots: Option<PathBuf>,
    against: Option<PathBuf>,
    shape: String,
    scale: Scale,
}

fn options() -> Result<Options> {
    let mut options = Options {
        parts: Vec::new(),
        json: None,
        plots: None,
        against: None,
        shape: String::new(),
        scale: Scale { rounds: 7, round: Duration::from_secs(2) },
    };
    // Cargo adds --bench.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match &*argument {
            "--json" => options.json = Some(value()?),
            "--plots" => options.plots = Some(value()?.into()),
            "--against" => {
                options.against = Some(value()?.into());
                options.parts.push("against".to_owned());
            }
            "--shape" => options.shape = value()?,
            "--rounds" => options.scale.rounds = value()?.parse::<usize>()?.max(1),
            "--round" => options.scale.round = Duration::from_secs(value()?.parse::<u64>()?.max(1)),
            part if PARTS.contains(&part) || LONG_PARTS.contains(&part) => options.parts.push(part.to_owned()),
            _ => return Err(HELP.into()),
        }
    }
    if options.parts.is_empty() {
        options.parts = PARTS.map(str::to_owned).into();
    }
    Ok(options)
}

async fn measure(options: &Options, figures: &mut Figures) -> Result<()> {
    let is_wanted = |part: &str| options.parts.iter().any(|wanted| wanted == part);
    if is_wanted("sqlite") {
        unary::sqlite(figures, options.scale).await?;
    }
    if options.parts.iter().all(|part| part == "sqlite") {
        return Ok(());
    }
    let cluster = Cluster::alone(Durability::Full).await;
    yardsticks::settle(&cluster).await?;
    if is_wanted("postgres") {
        unary::postgres(figures, &cluster, options.scale).await?;
    }
    if is_wanted("orgs") {
        orgs::orgs(figures, &cluster, options.scale).await?;
    }
    if is_wanted("lives") {
        lives::whole(figures, &cluster, options.scale.rounds).await?;
    }
    if is_wanted("replicas") {
        growth::replicas(figures, &cluster, options.scale).await?;
    }
    if is_wanted("curves") {
        curves::curves(figures, &cluster, options.plots.as_deref()).await?;
    }
    if is_wanted("folding") {
        folding::folding(figures, &cluster).await?;
    }
    if is_wanted("growth") {
        growth::growth(figures, &cluster, options.scale).await?;
    }
    if is_wanted("snapshot") {
        lives::snapshot(figures, &cluster).await?;
    }
    if is_wanted("peers") {
        peers::peers(figures, &cluster, options.scale).await?;
    }
    if is_wanted("against") {
        let other = options.against.as_deref().ok_or("against what? --against PROGRAM names a build of the server")?;
        against::against(figures, &cluster, other, &options.shape, options.scale).await?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    if let Some(generated) = generators::as_asked().await {
        generated?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = match options() {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("{wrong}");
            return Ok(ExitCode::from(2));
        }
    };
    let mut figures = Figures::default();
    let measured = measure(&options, &mut figures).await;
    // Also prints what was measured before an error.
    print!("{}", figures.table());
    if let Some(path) = &options.json {
        fs::write(path, figures.json())?;
    }
    measured?;
    let missed = figures.missed();
    if missed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("below their bars: {}", missed.join("; "));
    Ok(ExitCode::from(1))
}
