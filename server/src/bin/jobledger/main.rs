//! The `jobledger` program.

mod cli;
mod confirm;
mod copies;
mod demo;
mod health;
mod migrate;
mod serve;
mod terminal;
mod token;
mod transfer;
mod verify;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use jobledger_server::telemetry;
use rustix::fs::Mode;

use crate::cli::{Cli, Command};

/// Calls make many small allocations, and often one thread frees what another has allocated.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Only the owner may read files that the program creates: payloads, tokens and results may be in any of them.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let _written = match telemetry::open() {
        Ok(open) => open,
        Err(error) => {
            let _ = writeln!(io::stderr(), "jobledger: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = match Cli::parse().into_command() {
        Command::Serve(args) => terminal::block_on(serve::serve(&args)),
        Command::Demo(args) => demo::run(args),
        Command::Health { address } => health::check(&address),
        Command::Verify { database, org } => return verify::verify(&database.database_url, org),
        Command::Backup { database, file } => copies::backup(&database.database_url, &file),
        Command::Restore { file, database, revoke_tokens } => {
            copies::restore(&database.database_url, &file, revoke_tokens)
        }
        Command::RenewLogId(database) => confirm::renew_log_id(&database.database_url),
        Command::ConfirmClock(database) => confirm::confirm_clock(&database.database_url),
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
