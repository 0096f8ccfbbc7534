//! Unary CreateJob with 256 calls in flight on SQLite: with batching, and with batches forced to one command.
//!
//! ```sh
//! cargo bench -p jobledger-server --bench create
//! ```
//!
//! Both servers run in processes of their own, on this machine, at the same time; rounds are interleaved and medians
//! compared. Beside them stands the empty RPC (a health check of one of the servers), the ceiling of the transport.

use std::{
    error::Error,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::proto::{CreateJobRequest, job_service_client::JobServiceClient};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const IN_FLIGHT: usize = 256;
const CONNECTIONS: usize = 4;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
/// How many times faster batching has to be.
const BAR: f64 = 4.0;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A server process, killed when dropped.
struct Server {
    process: Child,
    channels: Vec<Channel>,
    _dir: TempDir,
}

impl Server {
    async fn start(max_batch: u16) -> Result<Self> {
        let dir = TempDir::new()?;
        let url = format!("sqlite://{}", dir.path().join("bench.db").display());
        let mut process = Command::new(env!("CARGO_BIN_EXE_jobledger"))
            .args(["--listen", "127.0.0.1:0", "--log", "warn", "--database-url", &url])
            .args(["--max-batch", &max_batch.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().ok_or("the server has no stdout")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ").ok_or("the server did not start")?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(endpoint.connect().await?);
        }
        Ok(Self { process, channels, _dir: dir })
    }

    fn channel(&self, n: usize) -> Channel {
        self.channels[n % CONNECTIONS].clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing of a benchmark needs to survive.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Calls a second, with [`IN_FLIGHT`] callers that each wait for their answer before they call again.
async fn rate<F>(call: impl Fn(usize) -> F + Clone + Send + 'static) -> Result<f64>
where
    F: Future<Output = Result<()>> + Send,
{
    let done = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let mut callers = JoinSet::new();
    for caller in 0..IN_FLIGHT {
        let (call, done) = (call.clone(), Arc::clone(&done));
        callers.spawn(async move {
            while started.elapsed() < ROUND {
                call(caller).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Result::Ok(())
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended??;
    }
    Ok(done.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64())
}

async fn create(server: &Server) -> Result<f64> {
    let channels = server.channels.clone();
    rate(move |caller| {
        let mut service = JobServiceClient::new(channels[caller % CONNECTIONS].clone());
        async move {
            service.create_job(CreateJobRequest { r#type: "bench".to_owned(), ..Default::default() }).await?;
            Ok(())
        }
    })
    .await
}

async fn empty(server: &Server) -> Result<f64> {
    let channels: Vec<_> = (0..CONNECTIONS).map(|n| server.channel(n)).collect();
    rate(move |caller| {
        let mut health = HealthClient::new(channels[caller % CONNECTIONS].clone());
        async move {
            health.check(HealthCheckRequest { service: String::new() }).await?;
            Ok(())
        }
    })
    .await
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[tokio::main]
async fn main() -> Result<()> {
    let batched = Server::start(512).await?;
    let single = Server::start(1).await?;
    let (mut with, mut without, mut ceiling) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        with.push(create(&batched).await?);
        without.push(create(&single).await?);
        ceiling.push(empty(&batched).await?);
        let last = |rates: &[f64]| rates[rates.len() - 1];
        println!(
            "round {round}: {:8.0} jobs/s batched, {:8.0} jobs/s one by one, {:8.0} empty RPC/s",
            last(&with),
            last(&without),
            last(&ceiling)
        );
    }
    let (with, without, ceiling) = (median(with), median(without), median(ceiling));
    println!("median:  {with:8.0} jobs/s batched, {without:8.0} jobs/s one by one, {ceiling:8.0} empty RPC/s");
    println!("batching: {:.1} times as fast (bar: {BAR}); {:.2} of the empty RPC", with / without, with / ceiling);
    if with / without < BAR {
        return Err(format!("batching is less than {BAR} times as fast").into());
    }
    Ok(())
}
