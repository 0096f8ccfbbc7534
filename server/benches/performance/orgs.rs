//! Many orgs compared with one, by two generators, with the processor time per call of each process.

use tempfile::TempDir;

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
    },
    figures::{Figure, Figures},
    generators::{Done, Generator, Work, generate},
    rounds::{Round, Rounds, a_call},
    spent::{Meter, Spent},
    unary::Scale,
};

const HUNDRED: usize = 100;
const THOUSAND: usize = 1_000;
/// Minimum rate of creates with 100 orgs, and of whole lives with 1,000, as a part of the rate with one org.
const CREATES_BAR: f64 = 0.5;
const LIVES_BAR: f64 = 0.4;

pub(crate) async fn orgs(figures: &mut Figures, cluster: &Cluster, scale: Scale) -> Result<()> {
    let folder = TempDir::new()?;
    let server = Server::start(&format!("sqlite://{}", folder.path().join("orgs.db").display()), 512).await?;
    on(figures, "SQLite", Meter::of(&server, None), scale).await?;
    drop(server);
    let database = cluster.create_database().await;
    let server = Server::start(&cluster.url(&database, cluster::SERVER), 512).await?;
    on(figures, "PostgreSQL", Meter::of(&server, Some(cluster)), scale).await
}

async fn on(figures: &mut Figures, name: &str, meter: Meter<'_>, scale: Scale) -> Result<()> {
    const MEASURES: [(Work, usize); 6] = [
        (Work::Empty, 1),
        (Work::Create, 1),
        (Work::Carry, 1),
        (Work::Create, HUNDRED),
        (Work::Life, 1),
        (Work::Life, THOUSAND),
    ];
    for generator in Generator::ALL {
        let mut taken = MEASURES.map(|_| Rounds::default());
        for _ in 0..scale.rounds {
            for ((work, orgs), taken) in MEASURES.into_iter().zip(&mut taken) {
                let before = meter.look()?;
                let Done { calls, time, cpu } = generate(generator, &meter.servers[0], work, orgs, scale.round).await?;
                let after = Spent { generator: before.generator + cpu, ..meter.look()? };
                let value = calls as f64 / time.as_secs_f64();
                eprint!("  {work:?}/{orgs} {value:.0}");
                taken.add(Round { value, cpu: Some(a_call(before, after, calls as f64)) });
            }
            eprintln!();
        }
        let [empty, one, carry, hundred, life, lives] = &taken;
        let by = |what: &str| format!("{name}: {what}, by {}", generator.name());
        let add = |figures: &mut Figures, what: &str, rounds: &Rounds, of: Option<(&Rounds, f64)>| {
            let mut figure = Figure::taken(by(what), "/s", rounds);
            if let Some((others, bar)) = of {
                figure = figure.of_taken("one org", rounds, others).at_least(bar);
            }
            figures.add(figure);
        };
        add(figures, "empty RPC", empty, None);
        add(figures, "CreateJob of one org", one, None);
        add(figures, "the same with a payload of 150 bytes", carry, None);
        add(figures, "CreateJob of 100 orgs", hundred, Some((one, CREATES_BAR)));
        add(figures, "whole lives of one org", life, None);
        add(figures, "whole lives of 1,000 orgs", lives, Some((life, LIVES_BAR)));
    }
    Ok(())
}
