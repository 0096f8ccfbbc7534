//! `jobledger serve`.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    thread,
};

use jobledger_server::{Server, telemetry};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{cli::ServeArgs, terminal};

/// The most connections that wait to be accepted. The system's limit (`net.core.somaxconn`) may be lower.
const BACKLOG: i32 = 65_535;

/// Serves until a signal ends it.
pub(crate) async fn serve(args: &ServeArgs) -> Result<(), terminal::Failure> {
    telemetry::init(&args.log, args.log_format)?;
    // Listen before anything is opened, so that an early signal is not lost.
    let (mut first, mut second) = (Signals::listen()?, Signals::listen()?);

    let listener = TcpListener::bind(&args.listen).await.map_err(|error| {
        use io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
        let is_address = matches!(error.kind(), AddrInUse | AddrNotAvailable | PermissionDenied);
        let hint = if is_address { "" } else { " (expected ADDR:PORT)" };
        format!("can't listen on {}: {error}{hint}", args.listen)
    })?;
    // Sets the longest queue. If a burst fills it, other clients' attempts to connect are retried only a second later.
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
        tracing::warn!(%address, "authentication is off: anyone who can reach this address may read and change every job");
    }
    if is_guarded && !has_tls && !address.ip().is_loopback() {
        tracing::warn!(%address, "credentials are sent unencrypted: set --tls-cert and --tls-key, or use a TLS proxy");
    }
    say_where(address)?;
    let again = async {
        second.next().await;
        second.next().await;
    };
    tokio::select! {
        ended = server.run(first.next()) => Ok(ended?),
        () = again => Err("stopped at once by a second signal; acknowledged changes are durable".into()),
    }
}

/// Prints the address, on a thread of its own: standard output may block if nobody reads it.
fn say_where(address: SocketAddr) -> io::Result<()> {
    let print = move || {
        let mut stdout = io::stdout();
        if let Err(error) = writeln!(stdout, "listening on {address}").and_then(|()| stdout.flush()) {
            tracing::debug!(%error, "standard output takes nothing");
        }
    };
    thread::Builder::new().name("stdout".to_owned()).spawn(print).map(drop)
}

/// Files that a server needs beside those of its connections: for databases, logs, certificates.
const OTHER_FILES: u64 = 300;

/// Raises the limit on open files, which many systems set lower than allowed. Returns how many connections there are files
/// for.
fn raise_file_limit(connections: u64) -> u64 {
    let needed = connections + OTHER_FILES;
    let files = rlimit::increase_nofile_limit(needed).or_else(|error| {
        tracing::warn!(%error, "can't raise the limit on open files");
        rlimit::getrlimit(rlimit::Resource::NOFILE).map(|(files, _)| files)
    });
    match files {
        Ok(files) if files < needed => {
            // Keep files for the server itself: without them it can serve no connection.
            let connections = files - OTHER_FILES.min(files / 2);
            tracing::warn!(
                files,
                needed,
                connections,
                "the open file limit is too low for --max-connections: raise RLIMIT_NOFILE"
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
