//! Curves of CreateJob: throughput over the calls in flight, and latency over the load.

use std::{fs, path::Path, time::Duration};

use tempfile::TempDir;

use crate::{
    common::{
        Result, Server,
        cluster::{self, Cluster},
    },
    figures::{Figure, Figures},
    load::{self, Load},
    plot::{Line, Plot},
};

const IN_FLIGHT: [usize; 6] = [1, 4, 16, 64, 256, 1_024];
/// Loads as parts of the rate with 256 calls in flight.
const LOADS: [f64; 6] = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8];
const TIME: Duration = Duration::from_secs(3);

/// The curves of one database, as points.
#[derive(Default)]
struct Curves {
    rates: Vec<(f64, f64)>,
    p50: Vec<(f64, f64)>,
    p99: Vec<(f64, f64)>,
}

async fn measure(figures: &mut Figures, name: &str, url: &str) -> Result<Curves> {
    let server = Server::start(url, 512).await?;
    let load = Load::on(&server)?;
    let mut curves = Curves::default();
    let mut most = 0.0;
    for callers in IN_FLIGHT {
        let measured = load::create(&load, callers, TIME).await?;
        figures.add(Figure::new(format!("{name}: CreateJob, {callers} in flight"), "/s", measured.rate));
        let took = format!("{name}: the same, p50; p99 is {:.2} ms", measured.at(0.99));
        figures.add(Figure::new(took, "ms", measured.at(0.5)));
        curves.rates.push((callers as f64, measured.rate));
        if callers == 256 {
            most = measured.rate;
        }
    }
    for part in LOADS {
        let rate = (most * part) as u32;
        let measured = load.offered(rate, TIME, load::create_one).await?;
        let (p50, p99) = (measured.at(0.5), measured.at(0.99));
        figures.add(Figure::new(format!("{name}: CreateJob at {rate}/s, p50; p99 is {p99:.2} ms"), "ms", p50));
        curves.p50.push((f64::from(rate), p50));
        curves.p99.push((f64::from(rate), p99));
    }
    Ok(curves)
}

/// Measures the curves of both databases, and plots them into `folder`.
pub(crate) async fn curves(figures: &mut Figures, cluster: &Cluster, folder: Option<&Path>) -> Result<()> {
    let database = cluster.create_database().await;
    let postgres = measure(figures, "PostgreSQL", &cluster.url(&database, cluster::SERVER)).await?;
    let file = TempDir::new()?;
    let sqlite = measure(figures, "SQLite", &format!("sqlite://{}", file.path().join("curves.db").display())).await?;
    let Some(folder) = folder else { return Ok(()) };
    let line = |name: &str, points: &[(f64, f64)]| Line { name: name.to_owned(), points: points.to_vec() };
    let rates = Plot {
        title: "CreateJob: throughput against calls in flight",
        across: "calls in flight",
        up: "jobs/s",
        is_logarithmic: false,
        lines: vec![line("SQLite", &sqlite.rates), line("PostgreSQL", &postgres.rates)],
    };
    let latencies = Plot {
        title: "CreateJob: latency against load",
        across: "jobs/s",
        up: "ms",
        is_logarithmic: true,
        lines: vec![
            line("SQLite, p50", &sqlite.p50),
            line("SQLite, p99", &sqlite.p99),
            line("PostgreSQL, p50", &postgres.p50),
            line("PostgreSQL, p99", &postgres.p99),
        ],
    };
    fs::create_dir_all(folder)?;
    fs::write(folder.join("throughput.svg"), rates.svg())?;
    fs::write(folder.join("latency.svg"), latencies.svg())?;
    Ok(())
}
