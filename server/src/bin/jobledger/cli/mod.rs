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
/// Without a command it runs `serve`.
#[derive(Debug, Parser)]
#[command(name = "jobledger", version, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

/// A command of the program.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the ledger until SIGINT or SIGTERM.
    Serve(Box<ServeArgs>),
    /// Show what jobledger does: digest the files under a path as jobs, with a server, workers and a subscriber in one process.
    Demo(DemoArgs),
    /// Check whether a server is ready, for container health checks. Exits with 0 if it is ready, with 1 if it is not or
    /// does not answer. Not for servers with TLS: use the gRPC health check for those.
    Health {
        /// The server's address and port.
        #[arg(long, env = "JOBLEDGER_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:50051")]
        address: String,
    },
    /// Recompute everything that is derived from the log, and report every difference from what is stored. Runs beside servers;
    /// retention is paused. Exits with 0 if there is no difference, with 1 if there is one, with 2 if it could not verify.
    Verify {
        #[command(flatten)]
        database: DatabaseArgs,
        /// Verify only the organisation with this UUID. By default all.
        #[arg(long, value_name = "UUID", value_parser = id)]
        org: Option<uuid::Uuid>,
    },
    /// Copy a consistent snapshot of an SQLite database to a file that can be served in its place. Servers may keep running
    /// meanwhile. The copy has a log id of its own: after a restore, subscribers with an older cursor get an error.
    Backup {
        /// The file to write. It must not exist yet.
        file: PathBuf,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Replace an SQLite database by a copy that `backup` made. The replaced one is kept beside it as FILE.replaced-TIME. No
    /// server may run on the database. The log gets a new id, so subscribers with an older cursor get an error. API tokens that
    /// were revoked since the copy was made stay revoked if the replaced database can be read, and are valid again otherwise.
    Restore {
        /// The copy, with this program's schema or an earlier one. It is not changed.
        file: PathBuf,
        #[command(flatten)]
        database: DatabaseArgs,
        /// Revoke all API tokens in the copy. New ones have to be made.
        #[arg(long)]
        revoke_tokens: bool,
    },
    /// Give the log a new id after its database was restored from a backup. Subscribers with an older cursor then get
    /// an error, instead of missing new events. Run it as the database's owner, before a server is started on it.
    RenewLogId(DatabaseArgs),
    /// Confirm that the database's clock is right. After the clock was set, or no server ran for an hour, retention
    /// pauses for an hour; this command ends the pause.
    ConfirmClock(DatabaseArgs),
    /// Import the jobs of the service that jobledger replaces from its PostgreSQL database: the old `jobs` table, or
    /// `job` and `job_event`. The old database is only read. An import may run beside servers and as often as needed:
    /// jobs that have changed there since are updated. Exits with 0 if every row is in the ledger, with 1 if some are
    /// not, with 2 if the import failed.
    Import(Box<ImportArgs>),
    /// Print jobs as SQL for the service that jobledger replaces: `jobledger export --legacy | psql …`.
    Export(ExportArgs),
    /// Make, list and revoke API tokens. Servers learn of changes within seconds.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Migrate a database to this program's schema, or back.
    Migrate {
        #[command(subcommand)]
        command: Migrate,
    },
}

/// A command on API tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token and print it: it can't be read again. Roles: `producer` creates, cancels and retries jobs; `worker` claims
    /// jobs and reports on them; `observer` sees everything; `auditor` everything but contents; `admin` may do all of that in its
    /// org; `operator` may in any org.
    Create {
        /// UUID of the organisation that the token belongs to. An operator's token belongs to none.
        #[arg(long, value_name = "UUID", value_parser = id, required_unless_present = "operator", conflicts_with = "operator")]
        org: Option<uuid::Uuid>,
        /// What the token allows within its org: producer, worker, observer, auditor or admin; several separated by commas.
        #[arg(
            long,
            value_name = "ROLE",
            value_delimiter = ',',
            required_unless_present = "operator",
            conflicts_with = "operator"
        )]
        role: Vec<Role>,
        /// Make an operator's token. It allows everything, in any org that a call names with x-org-id.
        #[arg(long)]
        operator: bool,
        /// The caller's name in jobs and events. By default it is derived from the token's id.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// When the token expires: a time like 2027-01-31T00:00:00Z, a duration from now like 90d, or never.
        #[arg(long, value_name = "WHEN", default_value = "90d")]
        expires: String,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// List tokens, without their secrets.
    List {
        /// List only tokens of the organisation with this UUID.
        #[arg(long, value_name = "UUID", value_parser = id)]
        org: Option<uuid::Uuid>,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Revoke a token. Every server refuses it within seconds, and ends its open streams and waiting claims.
    Revoke {
        /// The token's id, as `list` shows it.
        #[arg(value_parser = id)]
        id: uuid::Uuid,
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// A command on a database's schema.
#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Apply missing migrations.
    Up {
        #[command(flatten)]
        database: DatabaseArgs,
        /// Also grant this role what it needs to serve, as `role-sql` does. The role is created if it is missing. PostgreSQL
        /// only.
        #[arg(long, value_name = "ROLE")]
        grant: Option<String>,
    },
    /// Undo migrations, the last one first. Shows which data will be lost, and changes nothing without --yes.
    Down {
        #[command(flatten)]
        database: DatabaseArgs,
        /// Undo every migration above this one; 0 undoes all. By default only the last one.
        #[arg(long, value_name = "VERSION")]
        to: Option<i64>,
        /// Confirm that data may be lost.
        #[arg(long)]
        yes: bool,
    },
    /// List the migrations and whether they are applied.
    Status(DatabaseArgs),
    /// Print SQL that creates a PostgreSQL role for servers, which is neither owner nor superuser.
    RoleSql {
        /// The role's name.
        #[arg(long, default_value = "jobledger_server", value_name = "NAME")]
        role: String,
    },
}

/// Options of `import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The old database: postgres://USER:PASSWORD@HOST:PORT/NAME. A role with SELECT is enough.
    #[arg(long, env = "JOBLEDGER_IMPORT_FROM", hide_env_values = true, value_name = "URL")]
    pub(crate) from: String,
    /// The schema of the old tables.
    #[arg(long, value_name = "NAME", default_value = "public")]
    pub(crate) schema: String,
    /// UUID of the organisation to assign to the rows of the old `jobs` table. By default
    /// 00000000-0000-0000-0000-000000000000. Rows of `job` have their own.
    #[arg(long, value_name = "UUID", value_parser = id)]
    pub(crate) org: Option<uuid::Uuid>,
    /// Write nothing. Report what would be done, and each row that would be refused.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// The file for rows that are refused or adjusted: a line of JSON each. Each run replaces it.
    #[arg(long, value_name = "FILE", default_value = "import-refused.jsonl")]
    pub(crate) refused: PathBuf,
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
}

/// Options of `export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Write for the old `jobs` table.
    #[arg(long, required = true)]
    pub(crate) legacy: bool,
    /// UUID of the organisation to export. By default 00000000-0000-0000-0000-000000000000.
    #[arg(long, value_name = "UUID", value_parser = id)]
    pub(crate) org: Option<uuid::Uuid>,
    /// The schema of the old table.
    #[arg(long, value_name = "NAME", default_value = "public")]
    pub(crate) schema: String,
    /// The file to write, which must not exist yet. By default standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
}

/// Options of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// A directory, or a single file.
    pub(crate) path: PathBuf,
    /// An SQLite file for the jobs, as sqlite://PATH. A second run skips files that an earlier run digested. By default a
    /// temporary file, which is removed at the end.
    #[arg(long, value_name = "URL")]
    pub(crate) database_url: Option<DatabaseUrl>,
    /// Files to digest at the same time: 1 to 1,000.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) workers: u16,
    /// Include hidden directories and those marked as caches (CACHEDIR.TAG).
    #[arg(long)]
    pub(crate) all: bool,
    /// What to log to stderr, as for serve.
    #[arg(long, env = "JOBLEDGER_LOG", value_name = "FILTER", default_value = "error")]
    pub(crate) log: String,
}

/// The database to use.
#[derive(Debug, Args)]
pub(crate) struct DatabaseArgs {
    /// The ledger's database: sqlite://PATH (three slashes for an absolute path), which serve and import create if it is
    /// missing, or postgres://USER:PASSWORD@HOST:PORT/NAME. Add ?sslmode=verify-full for TLS, ?host=/DIRECTORY for a socket.
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
    /// The command; `serve` if none is named.
    pub(crate) fn into_command(self) -> Command {
        self.command.unwrap_or_else(|| Command::Serve(Box::new(self.serve)))
    }
}

fn id(text: &str) -> Result<uuid::Uuid, String> {
    text.parse().map_err(|_| "expected a UUID, as 6ba7b810-9dad-11d1-80b4-00c04fd430c8".to_owned())
}

/// Parses a duration like 20s or 500ms within bounds. A number without a unit is in seconds.
fn seconds(text: &str, bounds: RangeInclusive<Duration>) -> Result<Duration, String> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { time(&format!("{text}s"), bounds) } else { time(text, bounds) }
}

/// Parses a duration like 90d, 12h or 500ms within bounds.
fn time(text: &str, bounds: RangeInclusive<Duration>) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if bounds.contains(&time) {
        return Ok(time);
    }
    let [least, most] = [bounds.start(), bounds.end()].map(|bound| humantime::format_duration(*bound));
    Err(format!("must be {least} to {most}"))
}
