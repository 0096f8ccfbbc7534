//! The `jobledger` program.

mod cli;

use std::{error::Error, io::Write as _, process::ExitCode};

use clap::Parser as _;
use jobledger_server::{Server, telemetry};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use crate::cli::{Cli, ServeArgs};

fn main() -> ExitCode {
    match run(&Cli::parse().into_serve()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("jobledger: {error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(args: &ServeArgs) -> Result<(), Box<dyn Error + Send + Sync>> {
    telemetry::init(&args.log, args.log_format)?;
    // Before anything is opened: a signal that comes early is not lost.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let listener =
        TcpListener::bind(&args.listen).await.map_err(|error| format!("can't listen on {}: {error}", args.listen))?;
    let server = Server::open(listener, args.config()).await?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening on {}", server.local_addr()?)?;
    stdout.flush()?;
    server
        .run(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
        .await?;
    Ok(())
}
