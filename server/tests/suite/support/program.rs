//! The program in a process of its own.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use crate::support::cluster::{self};
use crate::support::harness::{Database, PATIENCE};
use jobledger_client::Client;
use uuid::Uuid;

/// The real program in its own process. Killed when dropped.
pub(crate) struct Program {
    process: Child,
    pub(crate) address: String,
}

impl Program {
    /// Starts the program on a free port.
    pub(crate) fn start(database: &Database) -> Self {
        Self::start_on("127.0.0.1:0", database)
    }

    /// Starts the program on a free port, with more arguments.
    pub(crate) fn start_with(database: &Database, more: &[&str]) -> Self {
        Self::run("127.0.0.1:0", database, more)
    }

    pub(crate) fn start_on(address: &str, database: &Database) -> Self {
        Self::run(address, database, &[])
    }

    fn run(address: &str, database: &Database, more: &[&str]) -> Self {
        Self::serve(address, &database.url(), more)
    }

    /// Starts the program on a free port, with at most this many open files.
    pub(crate) fn with_files(database: &Database, files: usize) -> Self {
        let served = command(&["--listen", "127.0.0.1:0", "--database-url", &database.url(), "--log", "error"]);
        let mut limited = Command::new("sh");
        limited.arg("-c").arg(format!(r#"ulimit -n {files} && exec "$0" "$@""#)).arg(served.get_program());
        Self::run_command(limited.args(served.get_args()))
    }

    /// Starts the program on a free port in a session of its own, as a service manager does. Linux shares processors between
    /// sessions first (`sched(7)`, autogroups); each process of PostgreSQL has its own.
    pub(crate) fn in_own_session(database: &Database, more: &[&str]) -> Self {
        let mut served = command(&["--listen", "127.0.0.1:0", "--database-url", &database.url()]);
        let served = served.args(more);
        let mut apart = Command::new("setsid");
        apart.arg(served.get_program()).args(served.get_args());
        Self::run_command(&mut apart)
    }

    /// Starts the program on an address with a database URL.
    pub(crate) fn serve(address: &str, url: &str, more: &[&str]) -> Self {
        Self::serve_in(address, url, more, &[])
    }

    /// As [`Program::serve`], with these environment variables.
    pub(crate) fn serve_in(address: &str, url: &str, more: &[&str], environment: &[(&str, &Path)]) -> Self {
        Self::serve_saying(address, url, more, environment, Stdio::null())
    }

    /// As [`Program::serve_in`], with this output for its log.
    pub(crate) fn serve_saying(
        address: &str,
        url: &str,
        more: &[&str],
        environment: &[(&str, &Path)],
        log: Stdio,
    ) -> Self {
        let mut served = command(&["--listen", address, "--database-url", url]);
        Self::run_command_saying(served.args(more).envs(environment.iter().copied()), log)
    }

    fn run_command(command: &mut Command) -> Self {
        Self::run_command_saying(command, Stdio::null())
    }

    fn run_command_saying(command: &mut Command, log: Stdio) -> Self {
        let mut process = command.stdout(Stdio::piped()).stderr(log).spawn().expect("the program starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("the program prints");
        let address = line.trim().strip_prefix("listening on ").expect("the program serves").to_owned();
        Self { process, address }
    }

    pub(crate) fn client(&self) -> Client {
        Client::builder(format!("http://{}", self.address)).timeout(PATIENCE).build().expect("a valid endpoint")
    }

    pub(crate) fn client_of(&self, org: Uuid) -> Client {
        let builder = Client::builder(format!("http://{}", self.address)).timeout(PATIENCE).org(org);
        builder.build().expect("a valid endpoint")
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills the program with SIGKILL.
    pub(crate) fn kill(mut self) {
        self.process.kill().expect("the program was running");
        self.process.wait().expect("the program ends");
    }

    /// Sends a signal by name, and waits for the program's end.
    pub(crate) fn end_by(mut self, signal: &str) -> ExitStatus {
        self.signal(signal);
        self.process.wait().expect("the program ends")
    }

    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The program with these arguments, without the tests' own `JOBLEDGER_` variables.
pub(crate) fn command(arguments: &[&str]) -> Command {
    // Long tests may run against an optimised build.
    let program = cluster::environment("JOBLEDGER_TEST_PROGRAM");
    let mut command = Command::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_jobledger")));
    let ours = std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("JOBLEDGER_"));
    for (name, _) in ours {
        command.env_remove(name);
    }
    command.args(arguments);
    command
}
