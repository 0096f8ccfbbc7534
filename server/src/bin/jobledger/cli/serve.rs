//! Options of `serve`.

use std::{str::FromStr, time::Duration};

use clap::Args;
use jobledger_server::{Config, domain::status::JobStatus, store::ORGS_PER_TRANSACTION, telemetry::LogFormat};

use super::{DatabaseArgs, access::AccessArgs, limits::LimitArgs, seconds, time};

/// Options of `serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, env = "JOBLEDGER_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:50051")]
    pub(crate) listen: String,

    #[command(flatten)]
    database: DatabaseArgs,

    /// Refuse a database that lacks migrations, instead of applying them.
    #[arg(long, env = "JOBLEDGER_NO_MIGRATE")]
    no_migrate: bool,

    /// Refuse to serve as a role that bypasses row-level security, instead of logging a warning. PostgreSQL only.
    #[arg(long, env = "JOBLEDGER_REQUIRE_RLS")]
    require_rls: bool,

    /// Database connections for writes, each with one transaction at a time: 1 to 100. PostgreSQL only.
    #[arg(long, env = "JOBLEDGER_WRITE_CONNECTIONS", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100))]
    write_connections: u32,

    /// Orgs whose commands may share one transaction: 1 to 64. On a distributed PostgreSQL more than one makes each
    /// transaction a two-phase commit.
    #[arg(long, env = "JOBLEDGER_ORGS_PER_TRANSACTION", value_name = "N", default_value_t = ORGS_PER_TRANSACTION, value_parser = clap::value_parser!(u32).range(1..=64))]
    orgs_per_transaction: u32,

    /// Connections that read for callers: 1 to 100. With fewer than 20, reads of one org may delay those of another.
    /// PostgreSQL only.
    #[arg(long, env = "JOBLEDGER_READ_CONNECTIONS", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    read_connections: u32,

    /// How far the row of a running job may lag behind its events, up to 1h. Only programs that read the tables
    /// themselves can notice; calls always return the current state.
    #[arg(long, env = "JOBLEDGER_FOLD_AFTER", value_name = "TIME", default_value = "10s", value_parser = fold_after)]
    fold_after: Duration,

    /// Remove jobs, with their events, once they have been finished for this long, as in 30d or 12h. For one status:
    /// succeeded=7d, failed=90d, canceled=… or dead_letter=…; may be given several times. By default all jobs are kept.
    #[arg(long, env = "JOBLEDGER_RETAIN_FINISHED", value_name = "[STATUS=]TIME", value_delimiter = ',')]
    retain_finished: Vec<Keep>,

    /// Bytes of the disk to keep free. With less, new jobs are refused (STORAGE_FULL), while reports, heartbeats and
    /// retention go on. By default a twentieth of the disk, 1 GiB at most. SQLite only.
    #[arg(long, env = "JOBLEDGER_DISK_RESERVE", value_name = "BYTES")]
    disk_reserve: Option<u64>,

    /// Serve the REST calls of the service that jobledger replaces, on the same port: POST /jobs, GET /jobs/ID, POST
    /// /jobs/ID/status.
    #[arg(long, env = "JOBLEDGER_LEGACY_HTTP")]
    legacy_http: bool,

    /// What to log: a level (error, warn, info, debug, trace), or levels by module as in `info,jobledger_server=debug`.
    #[arg(long, env = "JOBLEDGER_LOG", value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,

    /// Format of log lines.
    #[arg(long, env = "JOBLEDGER_LOG_FORMAT", value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,

    /// How long a shutdown may take to answer accepted calls and end streams: 0s to 1h.
    #[arg(long, env = "JOBLEDGER_SHUTDOWN_GRACE", value_name = "TIME", default_value = "20s", value_parser = grace)]
    shutdown_grace: Duration,

    #[command(flatten)]
    access: AccessArgs,

    #[command(flatten)]
    limits: LimitArgs,
}

impl ServeArgs {
    /// The server's configuration.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new(self.database.database_url.clone());
        config.migrate = !self.no_migrate;
        config.require_rls = self.require_rls;
        config.write_connections = self.write_connections;
        config.read_connections = self.read_connections;
        config.orgs_per_transaction = self.orgs_per_transaction;
        config.fold_after = self.fold_after;
        // A time for one status overrides the time for all.
        let (all, some): (Vec<&Keep>, Vec<&Keep>) = self.retain_finished.iter().partition(|keep| keep.status.is_none());
        for keep in all.into_iter().chain(some) {
            let ends = JobStatus::ALL.into_iter().filter(|status| status.is_terminal());
            for status in ends.filter(|status| keep.status.is_none_or(|only| only == *status)) {
                config.retention.set(status, keep.time);
            }
        }
        config.disk_reserve = self.disk_reserve;
        config.legacy_http = self.legacy_http;
        config.shutdown_grace = self.shutdown_grace;
        config.limits = self.limits.ledger();
        config.calls = self.limits.calls();
        config.connections = self.limits.connections();
        config.access = self.access.access();
        config.tls = self.access.tls();
        config
    }
}

fn fold_after(text: &str) -> Result<Duration, String> {
    time(text, Duration::ZERO..=Duration::from_secs(3_600))
}

fn grace(text: &str) -> Result<Duration, String> {
    seconds(text, Duration::ZERO..=Duration::from_secs(3_600))
}

/// How long to keep finished jobs: `30d`, or `failed=90d` for one status.
#[derive(Debug, Clone, Copy)]
struct Keep {
    /// `None`: all terminal statuses.
    status: Option<JobStatus>,
    time: Duration,
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (status, time) = match text.split_once('=') {
            None => (None, text),
            Some((name, time)) => {
                let status = JobStatus::parse(name).filter(|status| status.is_terminal());
                let known = "succeeded, failed, canceled or dead_letter";
                (Some(status.ok_or_else(|| format!("{name:?} is not a terminal status: expected {known}"))?), time)
            }
        };
        let time = humantime::parse_duration(time).map_err(|error| format!("{time:?}: {error}"))?;
        if time < MIN_RETENTION || time > MAX_RETENTION {
            return Err("the retention time must be one second to a hundred years".to_owned());
        }
        Ok(Self { status, time })
    }
}

/// A shorter time would hardly let a client read the outcome of its job.
const MIN_RETENTION: Duration = Duration::from_secs(1);
const MAX_RETENTION: Duration = Duration::from_secs(100 * 366 * 86_400);
