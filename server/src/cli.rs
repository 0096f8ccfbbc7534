//! The command line.

use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use jobledger_server::{Config, store::DatabaseUrl, telemetry::LogFormat};

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

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the ledger until SIGINT or SIGTERM.
    Serve(ServeArgs),
}

impl Cli {
    /// What to serve, with the command named or left out.
    pub(crate) fn into_serve(self) -> ServeArgs {
        match self.command {
            Some(Command::Serve(args)) => args,
            None => self.serve,
        }
    }
}

/// How to serve.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, env = "JOBLEDGER_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:50051")]
    pub(crate) listen: String,

    /// Where the ledger is kept: sqlite://PATH, created if it is missing (three slashes for an absolute path).
    #[arg(long, env = "JOBLEDGER_DATABASE_URL", value_name = "URL", default_value = "sqlite://jobledger.db")]
    database_url: DatabaseUrl,

    /// What to log: a level (error, warn, info, debug, trace), or levels by module as in `info,jobledger_server=debug`.
    #[arg(long, env = "JOBLEDGER_LOG", value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,

    /// How log lines look.
    #[arg(long, env = "JOBLEDGER_LOG_FORMAT", value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,

    /// Seconds that a stop may take: to answer what was accepted and to end streams.
    #[arg(long, env = "JOBLEDGER_SHUTDOWN_GRACE", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    shutdown_grace: u64,

    /// Commands in one batch, and so in one commit, at most: 1 to 4,096.
    #[arg(long, env = "JOBLEDGER_MAX_BATCH", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..=4_096))]
    max_batch: u16,
}

impl ServeArgs {
    /// The server's configuration.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new(self.database_url.clone());
        config.shutdown_grace = Duration::from_secs(self.shutdown_grace);
        config.limits.batch_commands = usize::from(self.max_batch);
        config
    }
}
