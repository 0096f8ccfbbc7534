//! The `jobledger` program.

mod audit;
mod cli;
mod demo;
mod migrate;
mod token;
mod transfer;

use std::{
    error::Error,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use jobledger_server::{Server, telemetry};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::cli::{Cli, Command, ServeArgs};

/// Calls allocate much and in small pieces, on one thread what another frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let done = match Cli::parse().into_command() {
        Command::Serve(args) => serve(&args),
        Command::Demo(args) => demo::run(args),
        Command::Verify { database, org } => return audit::verify(&database.database_url, org),
        Command::Backup { database, file } => audit::backup(&database.database_url, &file),
        Command::RenewLogId(database) => audit::renew_log_id(&database.database_url),
        Command::Import(args) => return transfer::import(*args),
        Command::Export(args) => transfer::export(args),
        Command::Token { command } => token::run(command),
        Command::Migrate { command } => migrate::run(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("jobledger: {error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn serve(args: &ServeArgs) -> Result<(), Box<dyn Error + Send + Sync>> {
    telemetry::init(&args.log, args.log_format)?;
    // Before anything is opened: a signal that comes early is not lost.
    let (mut first, mut second) = (Signals::listen()?, Signals::listen()?);

    let listener = TcpListener::bind(&args.listen)
        .await
        .map_err(|error| format!("can't listen on {}: {error} (expected ADDR:PORT)", args.listen))?;
    let config = args.config();
    let address = listener.local_addr()?;
    raise_file_limit(config.connections.connections as u64);
    let (is_guarded, has_tls) = (config.access.is_on(address.ip().is_loopback()), config.tls.is_some());
    let server = Server::open(listener, config).await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %address, "serving");
    if !is_guarded && !address.ip().is_loopback() {
        tracing::warn!(%address, "whoever reaches this address may read and change every job: nobody is asked who they are");
    }
    if is_guarded && !has_tls && !address.ip().is_loopback() {
        tracing::warn!(%address, "credentials travel in the clear: give a certificate with --tls-cert, or put a proxy in front");
    }
    let mut stdout = io::stdout();
    writeln!(stdout, "listening on {address}")?;
    stdout.flush()?;
    let again = async {
        second.next().await;
        second.next().await;
    };
    tokio::select! {
        ended = server.run(first.next()) => Ok(ended?),
        () = again => Err("stopped at once by a second signal; what was acknowledged is safe".into()),
    }
}

/// Files that a server needs beside those of its connections: databases, logs, certificates.
const OTHER_FILES: u64 = 300;

/// Many systems let a process begin with fewer files than it may have.
fn raise_file_limit(connections: u64) {
    let needed = connections + OTHER_FILES;
    match rlimit::increase_nofile_limit(needed) {
        Ok(files) if files < needed => tracing::warn!(
            files,
            needed,
            "there may be fewer files than connections: raise RLIMIT_NOFILE, or lower --max-connections"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "the limit on open files stays as it is"),
    }
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
