//! The `jobledger` program.

mod audit;
mod cli;
mod demo;
mod migrate;
mod terminal;
mod token;
mod transfer;

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    process::ExitCode,
    thread,
};

use clap::Parser as _;
use jobledger_server::{Server, telemetry};
use rustix::fs::Mode;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::cli::{Cli, Command, ServeArgs};

/// Calls allocate much and in small pieces, on one thread what another frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Payloads, tokens and results are nobody else's business, whatever file they are in.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let _written = match telemetry::open() {
        Ok(open) => open,
        Err(error) => {
            let _ = writeln!(io::stderr(), "jobledger: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = match Cli::parse().into_command() {
        Command::Serve(args) => terminal::block_on(serve(&args)),
        Command::Demo(args) => demo::run(args),
        Command::Verify { database, org } => return audit::verify(&database.database_url, org),
        Command::Backup { database, file } => audit::backup(&database.database_url, &file),
        Command::Restore { file, database, revoke_tokens } => {
            audit::restore(&database.database_url, &file, revoke_tokens)
        }
        Command::RenewLogId(database) => audit::renew_log_id(&database.database_url),
        Command::ConfirmClock(database) => audit::confirm_clock(&database.database_url),
        Command::Import(args) => return transfer::import(*args),
        Command::Export(args) => transfer::export(args),
        Command::Token { command } => token::run(command),
        Command::Migrate { command } => migrate::run(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::say(&format!("jobledger: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Connections that may wait to be accepted, if the system lets as many (`net.core.somaxconn`).
const BACKLOG: i32 = 65_535;

async fn serve(args: &ServeArgs) -> Result<(), terminal::Failure> {
    telemetry::init(&args.log, args.log_format)?;
    // Before anything is opened: a signal that comes early is not lost.
    let (mut first, mut second) = (Signals::listen()?, Signals::listen()?);

    let listener = TcpListener::bind(&args.listen).await.map_err(|error| {
        use io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
        let is_address = matches!(error.kind(), AddrInUse | AddrNotAvailable | PermissionDenied);
        let hint = if is_address { "" } else { " (expected ADDR:PORT)" };
        format!("can't listen on {}: {error}{hint}", args.listen)
    })?;
    // As many as the system lets wait to be accepted: a burst of strangers would otherwise have others' connections tried again a second later.
    rustix::net::listen(&listener, BACKLOG)?;
    let mut config = args.config();
    let address = listener.local_addr()?;
    let connections = raise_file_limit(config.connections.connections as u64);
    config.connections.at_most(connections as usize);
    let (is_guarded, has_tls) = (config.access.is_on(address.ip().is_loopback()), config.tls.is_some());
    let server = tokio::select! {
        opened = Server::open(listener, config) => opened?,
        () = first.next() => {
            tracing::info!("stopped by a signal before the database was open");
            return Ok(());
        }
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %address, "serving");
    if !is_guarded && !address.ip().is_loopback() {
        tracing::warn!(%address, "whoever reaches this address may read and change every job: nobody is asked who they are");
    }
    if is_guarded && !has_tls && !address.ip().is_loopback() {
        tracing::warn!(%address, "credentials travel in the clear: give a certificate with --tls-cert, or put a proxy in front");
    }
    say_where(address)?;
    let again = async {
        second.next().await;
        second.next().await;
    };
    tokio::select! {
        ended = server.run(first.next()) => Ok(ended?),
        () = again => Err("stopped at once by a second signal; what was acknowledged is safe".into()),
    }
}

/// Prints where it listens. Nobody has to read it.
fn say_where(address: SocketAddr) -> io::Result<()> {
    let print = move || {
        let mut stdout = io::stdout();
        if let Err(error) = writeln!(stdout, "listening on {address}").and_then(|()| stdout.flush()) {
            tracing::debug!(%error, "standard output takes nothing");
        }
    };
    thread::Builder::new().name("stdout".to_owned()).spawn(print).map(drop)
}

/// Files that a server needs beside those of its connections: databases, logs, certificates.
const OTHER_FILES: u64 = 300;

/// Many systems let a process begin with fewer files than it may have. For so many connections there are files.
fn raise_file_limit(connections: u64) -> u64 {
    let needed = connections + OTHER_FILES;
    let files = rlimit::increase_nofile_limit(needed).or_else(|error| {
        tracing::warn!(%error, "the limit on open files stays as it is");
        rlimit::getrlimit(rlimit::Resource::NOFILE).map(|(files, _)| files)
    });
    match files {
        Ok(files) if files < needed => {
            // Without files of its own a server answers nobody, whoever has the others.
            let connections = files - OTHER_FILES.min(files / 2);
            tracing::warn!(
                files,
                needed,
                connections,
                "there are fewer files than --max-connections needs: raise RLIMIT_NOFILE"
            );
            connections
        }
        Ok(_) | Err(_) => connections,
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
