//! A worker: counts as far as each job says, a step at a time.
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

/// Works on jobs of the type `count`, until SIGTERM or SIGINT; what is running then is finished, or given back after 30 s.
#[derive(Parser)]
struct Args {
    /// The server; or several on one database, separated by commas: what does not reach one goes to the next.
    #[arg(long, env = "JOBLEDGER_SERVER", default_value = "http://127.0.0.1:50051")]
    server: String,
    /// Jobs to work on at the same time.
    #[arg(long, default_value_t = 4)]
    concurrency: usize,
    /// Seconds without a sign of this worker after which its jobs are given to others.
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
    // From here on a signal ends nothing by itself.
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
