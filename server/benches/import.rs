//! `jobledger import` of an old database with 200,000 rows in each of its tables, into SQLite and PostgreSQL.
//!
//! ```sh
//! make bench-import
//! ```
//!
//! The old database is in a throw-away PostgreSQL cluster with `fsync` on, as is the PostgreSQL ledger. The yardstick
//! for the jobs and events written per second is the bare lane of the same run: the statements of a batch of 256 jobs,
//! each with one event, by one pgbench connection.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Executor as _};
use tempfile::TempDir;

use crate::common::{
    BARE_LANE, Result,
    cluster::{self, Cluster, Durability},
    median, pgbench,
};

mod common;

#[path = "../tests/suite/legacy/tables.rs"]
mod legacy_tables;

const ROWS: usize = 200_000;
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(3);
/// Goal for the import's rate, as a part of the bare lane's.
const BAR: f64 = 0.5;

#[tokio::main]
async fn main() -> Result<()> {
    let cluster = Cluster::alone(Durability::Full).await;
    let legacy = cluster.create_database().await;
    let mut connection = cluster.connect(&legacy, "postgres").await;
    connection.execute(legacy_tables::TABLES).await?;
    for sql in legacy_tables::rows(ROWS) {
        connection.execute(AssertSqlSafe(sql)).await?;
    }
    let (mut lanes, mut to_postgres, mut to_sqlite) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let database = cluster.create_database().await;
        lanes.push(2.0 * 256.0 * pgbench(&cluster, &database, BARE_LANE, 1, ROUND)?);
        let database = cluster.create_database().await;
        to_postgres.push(import(&cluster, &legacy, &cluster.url(&database, cluster::SERVER))?);
        let folder = TempDir::new()?;
        to_sqlite.push(import(&cluster, &legacy, &format!("sqlite://{}", folder.path().join("bench.db").display()))?);
    }
    let lane = median(lanes);
    println!("bare lane: {lane:.0} jobs and events/s");
    for (name, rates) in [("PostgreSQL", to_postgres), ("SQLite", to_sqlite)] {
        let rate = median(rates);
        println!("into {name}: {rate:.0} jobs and events/s, {:.2} of the bare lane (bar: {BAR})", rate / lane);
    }
    Ok(())
}

/// Jobs and events written per second, over the whole run of the program.
fn import(cluster: &Cluster, legacy: &str, into: &str) -> Result<f64> {
    let folder = TempDir::new()?;
    let refused = folder.path().join("refused.jsonl");
    let began = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_jobledger"))
        .args(["import", "--from", &cluster.url(legacy, "postgres"), "--database-url", into, "--refused"])
        .arg(&refused)
        .output()?;
    let took = began.elapsed();
    let said = String::from_utf8(output.stdout)?;
    print!("{said}");
    let number = |before: &str| -> Result<f64> {
        let number = said.split(before).next().and_then(|text| text.split_whitespace().last());
        Ok(number.ok_or_else(|| format!("no{before}in {said}"))?.parse()?)
    };
    Ok((number(" new, ")? + number(" events written")?) / took.as_secs_f64())
}
