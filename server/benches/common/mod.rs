//! Shared by the benchmarks: server processes, callers and pgbench.

use std::{
    error::Error,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use self::cluster::Cluster;

#[allow(dead_code, reason = "tests need more of it")]
#[path = "../../tests/suite/support/cluster.rs"]
pub(crate) mod cluster;

pub(crate) const CONNECTIONS: usize = 4;

/// The server's allocator, so that the load generator is not slower than the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A server process, killed when dropped.
pub(crate) struct Server {
    process: Child,
    #[allow(dead_code, reason = "some use clients of their own")]
    pub(crate) channels: Vec<Channel>,
    #[allow(dead_code, reason = "some use the channels")]
    pub(crate) endpoint: String,
}

impl Server {
    #[allow(dead_code, reason = "some run another command of the program")]
    pub(crate) async fn start(database_url: &str, max_batch: u16) -> Result<Self> {
        Self::start_program(Path::new(env!("CARGO_BIN_EXE_jobledger")), database_url, max_batch).await
    }

    /// Starts another build of the program.
    #[allow(dead_code, reason = "some run this build alone")]
    pub(crate) async fn start_program(program: &Path, database_url: &str, max_batch: u16) -> Result<Self> {
        Self::run(Command::new(program).args(["--max-batch", &max_batch.to_string()]), database_url).await
    }

    /// Starts a server with this `--fold-after`.
    #[allow(dead_code, reason = "some take it as it is")]
    pub(crate) async fn start_folding(database_url: &str, fold_after: &str) -> Result<Self> {
        let mut program = Command::new(env!("CARGO_BIN_EXE_jobledger"));
        Self::run(program.args(["--fold-after", fold_after]), database_url).await
    }

    async fn run(program: &mut Command, database_url: &str) -> Result<Self> {
        let mut process = program
            .args(["--listen", "127.0.0.1:0", "--log", "warn", "--database-url", database_url])
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().ok_or("the server has no stdout")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ").ok_or("the server did not start")?;
        let url = format!("http://{address}");
        let endpoint = Endpoint::from_shared(url.clone())?.tcp_nodelay(true);
        let mut channels = Vec::new();
        for _ in 0..CONNECTIONS {
            channels.push(endpoint.connect().await?);
        }
        Ok(Self { process, channels, endpoint: url })
    }

    /// Resident memory in bytes.
    #[allow(dead_code, reason = "some measure time alone")]
    pub(crate) fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }

    /// Bytes that the process has written to disk.
    #[allow(dead_code, reason = "some measure time alone")]
    pub(crate) fn written(&self) -> Result<u64> {
        let io = fs::read_to_string(format!("/proc/{}/io", self.process.id()))?;
        let line = io.lines().find_map(|line| line.strip_prefix("write_bytes:")).ok_or("no write_bytes")?;
        Ok(line.trim().parse()?)
    }

    /// Processor time of the process.
    #[allow(dead_code, reason = "some measure time alone")]
    pub(crate) fn cpu(&self) -> Result<Duration> {
        const TICKS_A_SECOND: u64 = 100;
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let fields: Vec<_> = stat.rsplit(')').next().ok_or("no stat")?.split_whitespace().collect();
        let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(Duration::from_millis(ticks * 1_000 / TICKS_A_SECOND))
    }

    #[allow(dead_code, reason = "some use clients of their own")]
    pub(crate) fn channel(&self, n: usize) -> Channel {
        self.channels[n % CONNECTIONS].clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // No benchmark needs the data after this.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Calls per second by callers that each wait for their answer before the next call.
#[allow(dead_code, reason = "some count otherwise")]
pub(crate) async fn rate<F>(
    callers: usize,
    time: Duration,
    call: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Result<f64>
where
    F: Future<Output = Result<()>> + Send,
{
    let done = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let calls = 0..callers;
    let mut callers = JoinSet::new();
    for caller in calls {
        let (call, done) = (call.clone(), Arc::clone(&done));
        callers.spawn(async move {
            while started.elapsed() < time {
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

/// pgbench script of the bare lane: a batch of 256 creates in an org of its own.
#[allow(dead_code, reason = "some have other yardsticks")]
pub(crate) const BARE_LANE: &str = "
BEGIN;
SELECT seq AS head FROM jobledger.begin_batch('{00000000-0000-0000-0000-00000000000c}', '{NULL}', '{NULL}') \\gset
WITH made AS MATERIALIZED (SELECT gen_random_uuid() AS id, :head + n AS seq FROM generate_series(1, 256) n),
job AS (
    INSERT INTO jobledger.job (org_id, id, type, retry_initial, retry_multiplier, retry_max, ready_at, created_seq,
        last_job_seq, last_seq, last_recorded_at)
    SELECT '00000000-0000-0000-0000-00000000000c', id, 'bench', 1000000, 2, 600000000, now(), seq, 1, seq, now() FROM made
), event AS (
    INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type, bytes)
    SELECT '00000000-0000-0000-0000-00000000000c', seq, id, 1, now(), now(), 'created', 'queued', 0, 'bench', 256 FROM made
)
INSERT INTO jobledger.org_record (org_id, n, id, prev, seq, ready_gen, recorded_at, written_at, format, base_seq, base_n, jobs, bytes, counts)
VALUES ('00000000-0000-0000-0000-00000000000c', :head + 256, 1, 1, :head + 256, 1, now(), now(), 1, :head + 256, :head + 256, :head + 256, (:head + 256) * 1024, '{\"bench\": [256, 0, 0, 0, 0, 0]}');
COMMIT;
";

/// Transactions per second of a pgbench script.
#[allow(dead_code, reason = "some have no yardstick in SQL")]
pub(crate) fn pgbench(cluster: &Cluster, database: &str, script: &str, clients: usize, time: Duration) -> Result<f64> {
    let folder = TempDir::new()?;
    let file = folder.path().join("script.sql");
    fs::write(&file, script)?;
    let output = cluster
        .program("pgbench")
        .args(["--no-vacuum", "--protocol=prepared", "--username=postgres"])
        // The planner settings of the server's sessions.
        .env("PGOPTIONS", "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off -c enable_sort=off -c enable_bitmapscan=off")
        .arg(format!("--host={}", cluster.socket().display()))
        .arg(format!("--client={clients}"))
        .arg(format!("--jobs={}", clients.min(2)))
        .arg(format!("--time={}", time.as_secs()))
        .arg("--file")
        .arg(&file)
        .arg(database)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let rate = said.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rate.ok_or_else(|| format!("pgbench: {said}{}", String::from_utf8_lossy(&output.stderr)).into())
}

pub(crate) fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[allow(dead_code, reason = "some have no rounds")]
pub(crate) fn last_of<const N: usize>(rates: [&Vec<f64>; N]) -> String {
    rates.map(|rates| format!("{:8.0}", rates.last().copied().unwrap_or_default())).join(" ")
}
