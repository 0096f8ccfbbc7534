//! The command line.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand};
use jobledger_server::{
    Config, domain::status::JobStatus, ledger::StreamLimits, store::DatabaseUrl, telemetry::LogFormat,
};

/// A durable, ordered record of background jobs, served over gRPC.
///
/// Without a command it serves.
#[derive(Debug, Parser)]
#[command(name = "jobledger", version, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

/// What the program is asked to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the ledger until SIGINT or SIGTERM.
    Serve(Box<ServeArgs>),
    /// Show what jobledger does: digest the files under a path, as jobs, in one process with a server, workers and a subscriber.
    Demo(DemoArgs),
    /// Compute everything that is derived from the log again, and report every difference from what is stored. Runs beside
    /// servers; retention waits for it. Exits with 0 if there is no difference, with 1 if there is one, with 2 if it could not
    /// verify.
    Verify {
        #[command(flatten)]
        database: DatabaseArgs,
        /// Only this organisation, by its UUID. By default all.
        #[arg(long, value_name = "UUID")]
        org: Option<uuid::Uuid>,
    },
    /// Give the log another identity, after its database was restored from a backup: subscribers that were further on are told so,
    /// instead of missing what is written anew. Run it before a server is started on the database, as its owner.
    RenewLogId(DatabaseArgs),
    /// Bring in the jobs of the service that jobledger replaces, from its PostgreSQL database: the old `jobs` table, or `job` and
    /// `job_event`. It is only read. Runs beside servers, and as often as you like: what has changed there since is brought up to
    /// date. Exits with 0 if every row is in the ledger, with 1 if some are not, with 2 if it could not go through.
    Import(Box<ImportArgs>),
    /// Write jobs back as SQL for the service that jobledger replaces: `jobledger export --legacy | psql …`.
    Export(ExportArgs),
    /// Bring a database to this program's schema, or back.
    Migrate {
        #[command(subcommand)]
        command: Migrate,
    },
}

/// What to do with a database's schema.
#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Apply the migrations that are missing, creating an SQLite file where there is none.
    Up(DatabaseArgs),
    /// Undo migrations, the last one first. Says what it will lose, and does it only with --yes.
    Down {
        #[command(flatten)]
        database: DatabaseArgs,
        /// Undo every migration above this one; 0 undoes all. By default the last one alone is undone.
        #[arg(long, value_name = "VERSION")]
        to: Option<i64>,
        /// Do it.
        #[arg(long)]
        yes: bool,
    },
    /// List the migrations and where they stand.
    Status(DatabaseArgs),
    /// Print the SQL that makes a PostgreSQL role to serve as: neither owner nor superuser.
    RoleSql {
        /// The role's name.
        #[arg(long, default_value = "jobledger_server", value_name = "NAME")]
        role: String,
    },
}

/// What to bring in.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The old database: postgres://USER:PASSWORD@HOST:PORT/NAME. A role that may SELECT is enough.
    #[arg(long, env = "JOBLEDGER_IMPORT_FROM", hide_env_values = true, value_name = "URL")]
    pub(crate) from: String,
    /// The schema that the old tables are in.
    #[arg(long, value_name = "NAME", default_value = "public")]
    pub(crate) schema: String,
    /// Whose the rows of the old `jobs` table are, by the organisation's UUID; by default 00000000-0000-0000-0000-000000000000.
    /// Rows of `job` say it themselves.
    #[arg(long, value_name = "UUID")]
    pub(crate) org: Option<uuid::Uuid>,
    /// Say what would be done, and name each row that would be refused; write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Where rows go that are refused, or not quite as they were: a line of JSON each, written anew with each run.
    #[arg(long, value_name = "FILE", default_value = "import-refused.jsonl")]
    pub(crate) refused: PathBuf,
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
}

/// What to write back.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// As the old `jobs` table.
    #[arg(long, required = true)]
    pub(crate) legacy: bool,
    /// Whose jobs, by the organisation's UUID; by default 00000000-0000-0000-0000-000000000000.
    #[arg(long, value_name = "UUID")]
    pub(crate) org: Option<uuid::Uuid>,
    /// The schema that the old table is in.
    #[arg(long, value_name = "NAME", default_value = "public")]
    pub(crate) schema: String,
    /// Where to write; by default to standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
}

/// What to show.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// A directory, or a single file.
    pub(crate) path: PathBuf,
    /// An SQLite file to keep the jobs in, as sqlite://PATH: a second run finds there what the first has done. By default a
    /// temporary one, which is removed in the end.
    #[arg(long, value_name = "URL")]
    pub(crate) database_url: Option<DatabaseUrl>,
    /// Files to digest at the same time: 1 to 1,000.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) workers: u16,
    /// What to log, to stderr; as for serve.
    #[arg(long, env = "JOBLEDGER_LOG", value_name = "FILTER", default_value = "error")]
    pub(crate) log: String,
}

/// Which database.
#[derive(Debug, Args)]
pub(crate) struct DatabaseArgs {
    /// Where the ledger is kept: sqlite://PATH (three slashes for an absolute path), created if it is missing, or
    /// postgres://USER:PASSWORD@HOST:PORT/NAME; add ?sslmode=verify-full for TLS, ?host=/DIRECTORY for a socket.
    #[arg(
        long,
        env = "JOBLEDGER_DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        default_value = "sqlite://jobledger.db"
    )]
    pub(crate) database_url: DatabaseUrl,
}

impl Cli {
    /// What to do; to serve, where nothing is named.
    pub(crate) fn into_command(self) -> Command {
        self.command.unwrap_or_else(|| Command::Serve(Box::new(self.serve)))
    }
}

/// How long finished jobs are kept: `30d`, or `failed=90d` for one status.
#[derive(Debug, Clone, Copy)]
struct Keep {
    /// `None`: all in which jobs end.
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
                (Some(status.ok_or_else(|| format!("{name:?} is no status in which jobs end: {known}"))?), time)
            }
        };
        let time = humantime::parse_duration(time).map_err(|error| format!("{time:?}: {error}"))?;
        if time < MIN_RETENTION || time > MAX_RETENTION {
            return Err("jobs can be kept for a second at least, and a hundred years at most".to_owned());
        }
        Ok(Self { status, time })
    }
}

/// Shorter, a worker could hardly read what it has done.
const MIN_RETENTION: Duration = Duration::from_secs(1);
const MAX_RETENTION: Duration = Duration::from_secs(100 * 366 * 86_400);

/// How to serve.
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

    /// Refuse to serve as a role to which row-level security does not apply, instead of warning of it. PostgreSQL only.
    #[arg(long, env = "JOBLEDGER_REQUIRE_RLS")]
    require_rls: bool,

    /// Connections that write, and so orgs that may commit at the same time: 1 to 100. PostgreSQL only.
    #[arg(long, env = "JOBLEDGER_WRITE_CONNECTIONS", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100))]
    write_connections: u32,

    /// Connections that read: 1 to 100. PostgreSQL only.
    #[arg(long, env = "JOBLEDGER_READ_CONNECTIONS", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100))]
    read_connections: u32,

    /// Remove finished jobs, with their events, once they have been finished for so long, as in 30d or 12h. By status with
    /// succeeded=7d, failed=90d, canceled=… or dead_letter=…; may be given several times. By default all are kept.
    #[arg(long, env = "JOBLEDGER_RETAIN_FINISHED", value_name = "[STATUS=]TIME", value_delimiter = ',')]
    retain_finished: Vec<Keep>,

    /// Answer the REST calls of the service that jobledger replaces, on the same port: POST /jobs, GET /jobs/ID, POST
    /// /jobs/ID/status.
    #[arg(long, env = "JOBLEDGER_LEGACY_HTTP")]
    legacy_http: bool,

    /// What to log: a level (error, warn, info, debug, trace), or levels by module as in `info,jobledger_server=debug`.
    #[arg(long, env = "JOBLEDGER_LOG", value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,

    /// How log lines look.
    #[arg(long, env = "JOBLEDGER_LOG_FORMAT", value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,

    /// Seconds that a stop may take: to answer what was accepted and to end streams.
    #[arg(long, env = "JOBLEDGER_SHUTDOWN_GRACE", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    shutdown_grace: u64,

    /// Event streams that may be open on this server: 1 to 1,000,000.
    #[arg(long, env = "JOBLEDGER_MAX_STREAMS", value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_streams: u32,

    /// Event streams that one organisation may have open on this server.
    #[arg(long, env = "JOBLEDGER_MAX_STREAMS_PER_ORG", value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_streams_per_org: u32,

    /// Event streams that one connection may have open: 1 to 4,000.
    #[arg(long, env = "JOBLEDGER_MAX_STREAMS_PER_CONNECTION", value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=4_000))]
    max_streams_per_connection: u32,

    /// Commands in one batch, and so in one commit, at most: 1 to 4,096.
    #[arg(long, env = "JOBLEDGER_MAX_BATCH", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..=4_096))]
    max_batch: u16,
}

impl ServeArgs {
    /// The server's configuration.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new(self.database.database_url.clone());
        config.migrate = !self.no_migrate;
        config.require_rls = self.require_rls;
        config.write_connections = self.write_connections;
        config.read_connections = self.read_connections;
        // What is said of one status counts more than what is said of all.
        let (all, some): (Vec<&Keep>, Vec<&Keep>) = self.retain_finished.iter().partition(|keep| keep.status.is_none());
        for keep in all.into_iter().chain(some) {
            let ends = JobStatus::ALL.into_iter().filter(|status| status.is_terminal());
            for status in ends.filter(|status| keep.status.is_none_or(|only| only == *status)) {
                config.retention.set(status, keep.time);
            }
        }
        config.legacy_http = self.legacy_http;
        config.shutdown_grace = Duration::from_secs(self.shutdown_grace);
        config.limits.batch_commands = usize::from(self.max_batch);
        config.limits.streams = StreamLimits {
            in_all: self.max_streams as usize,
            per_org: self.max_streams_per_org as usize,
            per_connection: self.max_streams_per_connection as usize,
        };
        config
    }
}
