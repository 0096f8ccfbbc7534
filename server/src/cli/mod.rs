//! The command line.

mod access;
mod limits;
mod serve;

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use jobledger_server::{domain::access::Role, store::DatabaseUrl};

pub(crate) use self::serve::ServeArgs;

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
        #[arg(long, value_name = "UUID", value_parser = id)]
        org: Option<uuid::Uuid>,
    },
    /// Copy an SQLite database, as it is at one moment, to a file that can be served in its place. Servers go on meanwhile. The copy has
    /// a log id of its own: where it is restored, subscribers that were further on are told so.
    Backup {
        /// The copy; it must not be there yet.
        file: PathBuf,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Put a copy that `backup` made in the place of an SQLite database, which is kept beside it as FILE.replaced-TIME. No server may
    /// have it. The log has an id of its own then: subscribers that were further on are told so. API tokens that were revoked since
    /// the copy was made stay revoked where the present database can be read, and hold again otherwise.
    Restore {
        /// The copy, of this program's schema or an earlier one; it stays as it is.
        file: PathBuf,
        #[command(flatten)]
        database: DatabaseArgs,
        /// Revoke all API tokens that the copy has: new ones are to be made.
        #[arg(long)]
        revoke_tokens: bool,
    },
    /// Give the log another identity, after its database was restored from a backup: subscribers that were further on are told so,
    /// instead of missing what is written anew. Run it before a server is started on the database, as its owner.
    RenewLogId(DatabaseArgs),
    /// Say that the database's clock is right after it was set, or after no server had seen it for long: retention, which then waits for an
    /// hour, goes on.
    ConfirmClock(DatabaseArgs),
    /// Bring in the jobs of the service that jobledger replaces, from its PostgreSQL database: the old `jobs` table, or `job` and
    /// `job_event`. It is only read. Runs beside servers, and as often as you like: what has changed there since is brought up to
    /// date. Exits with 0 if every row is in the ledger, with 1 if some are not, with 2 if it could not go through.
    Import(Box<ImportArgs>),
    /// Write jobs back as SQL for the service that jobledger replaces: `jobledger export --legacy | psql …`.
    Export(ExportArgs),
    /// Make API tokens, list and revoke them. Servers know of it within seconds.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Bring a database to this program's schema, or back.
    Migrate {
        #[command(subcommand)]
        command: Migrate,
    },
}

/// What to do with API tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token, and print it: it can't be read again. Of the roles, `producer` creates, cancels and retries jobs, `worker` claims
    /// them and reports, `observer` sees all there is, `admin` may do all of that within its org, `operator` in any org.
    Create {
        /// Whose it is, by the organisation's UUID. An operator's is nobody's.
        #[arg(long, value_name = "UUID", value_parser = id, required_unless_present = "operator", conflicts_with = "operator")]
        org: Option<uuid::Uuid>,
        /// What its holder may do, within the org: producer, worker, observer, admin; several with commas between.
        #[arg(
            long,
            value_name = "ROLE",
            value_delimiter = ',',
            required_unless_present = "operator",
            conflicts_with = "operator"
        )]
        role: Vec<Role>,
        /// Make an operator's: all may be done with it, in any org that a call names with x-org-id.
        #[arg(long)]
        operator: bool,
        /// Who calls with it, as jobs and events tell; by default a name made of its id.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// From when on it is refused: a time as 2027-01-31T00:00:00Z, how long from now, as 90d, or never.
        #[arg(long, value_name = "WHEN", default_value = "90d")]
        expires: String,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// List tokens, without their secrets.
    List {
        /// Only those of this organisation, by its UUID.
        #[arg(long, value_name = "UUID", value_parser = id)]
        org: Option<uuid::Uuid>,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Have every server refuse a token from now on, and end what is being called with it.
    Revoke {
        /// Its id, as `list` has it.
        #[arg(value_parser = id)]
        id: uuid::Uuid,
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// What to do with a database's schema.
#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Apply the migrations that are missing.
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
    #[arg(long, value_name = "UUID", value_parser = id)]
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
    #[arg(long, value_name = "UUID", value_parser = id)]
    pub(crate) org: Option<uuid::Uuid>,
    /// The schema that the old table is in.
    #[arg(long, value_name = "NAME", default_value = "public")]
    pub(crate) schema: String,
    /// Where to write, a file that is not there yet; by default to standard output.
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
    /// Take what is in hidden directories, and in those that are marked as caches (CACHEDIR.TAG), too.
    #[arg(long)]
    pub(crate) all: bool,
    /// What to log, to stderr; as for serve.
    #[arg(long, env = "JOBLEDGER_LOG", value_name = "FILTER", default_value = "error")]
    pub(crate) log: String,
}

/// Which database.
#[derive(Debug, Args)]
pub(crate) struct DatabaseArgs {
    /// Where the ledger is kept: sqlite://PATH (three slashes for an absolute path), made by serve and import if it is missing, or
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

/// A UUID, as organisations and tokens have.
fn id(text: &str) -> Result<uuid::Uuid, String> {
    text.parse().map_err(|_| "expected a UUID, as 6ba7b810-9dad-11d1-80b4-00c04fd430c8".to_owned())
}

/// A time as in 20s or 500ms, where seconds need no unit, within bounds.
fn seconds(text: &str, bounds: RangeInclusive<Duration>) -> Result<Duration, String> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { time(&format!("{text}s"), bounds) } else { time(text, bounds) }
}

/// A time as in 90d, 12h or 500ms, within bounds.
fn time(text: &str, bounds: RangeInclusive<Duration>) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if bounds.contains(&time) {
        return Ok(time);
    }
    let [least, most] = [bounds.start(), bounds.end()].map(|bound| humantime::format_duration(*bound));
    Err(format!("must be {least} to {most}"))
}
