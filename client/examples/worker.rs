//! A worker that counts as far as each job says, one step at a time.
//!
//! ```sh
//! cargo run --example worker
//! grpcurl -plaintext -d '{"type": "count", "payload": {"to": 20, "every_ms": 250}}' 127.0.0.1:50051 jobledger.v1.JobService/CreateJob
//! ```

use std::{io::IsTerminal as _, time::Duration};

use clap::Parser;
use jobledger_client::{
    Client, shutdown_signal,
    worker::{Context, Error, Worker},
};
use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Runs jobs of the type `count` until SIGTERM or SIGINT; then finishes running jobs, or gives them back after 30 s.
#[derive(Parser)]
struct Args {
    /// URL of the server, or of several on one database, separated by commas. If one fails, the next is used.
    #[arg(long, env = "JOBLEDGER_SERVER", default_value = "http://127.0.0.1:50051")]
    server: String,
    /// Number of jobs to run at the same time.
    #[arg(long, default_value_t = 4)]
    concurrency: usize,
    /// Length of the leases in seconds. Another worker gets a job that has no heartbeat for this long.
    #[arg(long, default_value_t = 30)]
    lease: u64,
}

#[derive(Deserialize)]
struct Count {
    to: u32,
    every_ms: u64,
}

#[derive(Serialize)]
struct Counted {
    steps: u32,
}

async fn count(context: Context, job: Count) -> Result<Counted, Error> {
    let (failures, max_attempts, lost) = (context.failures(), context.job().max_attempts, context.lost_attempts());
    println!("{} counts to {}: failures {failures} of {max_attempts}, lost {lost}", context.job_id(), job.to);
    context.stage("counting");
    for step in 0..job.to {
        tokio::select! {
            () = context.canceled() => return Err(Error::new("interrupted")),
            () = tokio::time::sleep(Duration::from_millis(job.every_ms)) => {}
        }
        context.progress((100 * u64::from(step + 1) / u64::from(job.to)) as u8);
    }
    Ok(Counted { steps: job.to })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // From here on a signal does not end the process by itself.
    let shutdown = shutdown_signal()?;
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    let is_terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_terminal).with_writer(std::io::stderr).init();
    let worker = Worker::builder(Client::new(args.server)?)
        .handle("count", count)
        .concurrency(args.concurrency)
        .lease(Duration::from_secs(args.lease))
        .build()?;
    Ok(worker.run(shutdown).await?)
}
