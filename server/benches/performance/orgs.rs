//! Many orgs against one, by two generators, with the processor time that a call takes of each process.

use tempfile::TempDir;

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
        median,
    },
    figures::{Figure, Figures},
    generators::{Done, Generator, Work, generate},
    spent::{Meter, Spent},
    unary::Scale,
};

const HUNDRED: usize = 100;
const THOUSAND: usize = 1_000;
/// Of one org's creates, what a hundred together have at least; and of its whole lives a thousand.
const CREATES_BAR: f64 = 0.5;
const LIVES_BAR: f64 = 0.4;

/// What a round came to.
#[derive(Debug, Clone, Copy)]
struct Taken {
    /// Calls a second.
    rate: f64,
    /// Processor time a call, in µs: of the server, the database and the generator.
    cpu: [f64; 3],
}

impl Taken {
    fn new(done: Done, before: Spent, after: Spent) -> Self {
        let a_call = |spent: std::time::Duration| spent.as_secs_f64() * 1e6 / done.calls.max(1) as f64;
        let cpu = [after.server - before.server, after.database.saturating_sub(before.database), done.cpu].map(a_call);
        Self { rate: done.calls as f64 / done.time.as_secs_f64(), cpu }
    }

    /// The median of each number.
    fn median(rounds: &[Self]) -> Self {
        let of = |number: &dyn Fn(&Self) -> f64| median(rounds.iter().map(number).collect());
        Self { rate: of(&|taken| taken.rate), cpu: [0, 1, 2].map(|n| of(&|taken| taken.cpu[n])) }
    }
}

/// Both databases.
pub(crate) async fn orgs(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    let folder = TempDir::new()?;
    let server = Server::start(&format!("sqlite://{}", folder.path().join("orgs.db").display()), 512).await?;
    on(figures, "SQLite", Meter { server: &server, cluster: None }, scale).await?;
    drop(server);
    let database = cluster.create_database().await;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    on(figures, "PostgreSQL", Meter { server: &server, cluster: Some(cluster) }, scale).await
}

async fn on(figures: &mut Figures, name: &str, meter: Meter<'_>, scale: Scale) -> Result<()> {
    const MEASURES: [(Work, usize); 5] =
        [(Work::Empty, 1), (Work::Create, 1), (Work::Create, HUNDRED), (Work::Life, 1), (Work::Life, THOUSAND)];
    for generator in Generator::ALL {
        let mut taken = MEASURES.map(|_| Vec::with_capacity(scale.rounds));
        for _ in 0..scale.rounds {
            for ((work, orgs), taken) in MEASURES.into_iter().zip(&mut taken) {
                let before = meter.look()?;
                let done = generate(generator, meter.server, work, orgs, scale.round).await?;
                let round = Taken::new(done, before, meter.look()?);
                eprint!("  {work:?}/{orgs} {:.0}", round.rate);
                taken.push(round);
            }
            eprintln!();
        }
        let [empty, one, hundred, life, lives] = &taken;
        let by = |what: &str| format!("{name}: {what}, by {}", generator.name());
        let add = |figures: &mut Figures, what: &str, rounds: &[Taken], of: Option<(&str, &[Taken], f64)>| {
            let Taken { rate, cpu } = Taken::median(rounds);
            let mut figure = Figure::new(by(what), "/s", rate).cpu(cpu);
            if let Some((of, others, bar)) = of {
                let ratios: Vec<_> = rounds.iter().zip(others).map(|(one, other)| one.rate / other.rate).collect();
                figure = figure.of(of, Taken::median(others).rate).between(&ratios).at_least(bar);
            }
            figures.add(figure);
        };
        add(figures, "empty RPC", empty, None);
        add(figures, "CreateJob of one org", one, None);
        add(figures, "CreateJob of 100 orgs", hundred, Some(("one org", one, CREATES_BAR)));
        add(figures, "whole lives of one org", life, None);
        add(figures, "whole lives of 1,000 orgs", lives, Some(("one org", life, LIVES_BAR)));
    }
    Ok(())
}
