//! Servers, clients and clocks for tests.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU16, Ordering},
    },
    time::Duration,
};

use chrono::DateTime;
use jobledger_client::Client;
use jobledger_server::{
    Config, ServeError, Server,
    domain::clock::{Clock, Time},
    store::{DatabaseUrl, Store},
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// Longer than anything takes that is going to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The short form of a measure for `make test`, or the long one for `make test-long`.
pub(crate) fn short_or_long<T>(short: T, long: T) -> T {
    #[expect(clippy::disallowed_methods, reason = "the Makefile says which")]
    let is_long = std::env::var("JOBLEDGER_TEST_LONG").is_ok_and(|value| value == "1");
    if is_long { long } else { short }
}

/// An address to serve on again after a stop. Its port is none that the system gives to others meanwhile.
pub(crate) fn fixed_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Below Linux's ephemeral range, and apart from other test programs at the same time.
    let first = 12_000 + (std::process::id() % 1_000) as u16 * 16;
    loop {
        let address = format!("127.0.0.1:{}", first + NEXT.fetch_add(1, Ordering::Relaxed));
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}

/// A directory with a database in it, which outlives the servers on it.
pub(crate) struct Database(TempDir);

impl Database {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().expect("a temporary directory"))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("ledger.db")
    }

    pub(crate) fn url(&self) -> String {
        format!("sqlite://{}", self.path().display())
    }

    pub(crate) fn config(&self) -> Config {
        Config::new(self.url().parse::<DatabaseUrl>().expect("a valid URL"))
    }

    /// A connection beside the server's, to look at or to tamper with the file.
    pub(crate) async fn connect(&self) -> sqlx::SqliteConnection {
        use sqlx::ConnectOptions as _;
        sqlx::sqlite::SqliteConnectOptions::new().filename(self.path()).connect().await.expect("the file opens")
    }
}

/// A server in this process, on a socket.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), ServeError>>,
}

impl TestServer {
    /// A server with the defaults on a fresh database.
    pub(crate) async fn fresh() -> (Database, Self, Client) {
        let database = Database::new();
        let server = Self::start(database.config()).await;
        let client = server.client();
        (database, server, client)
    }

    pub(crate) async fn start(config: Config) -> Self {
        Self::start_on("127.0.0.1:0", config).await
    }

    pub(crate) async fn start_on(address: &str, config: Config) -> Self {
        let listener = TcpListener::bind(address).await.expect("the port is free");
        Self::run(Server::open(listener, config).await.expect("the database opens"))
    }

    /// A server on a free port and a store that is open already.
    pub(crate) async fn start_with(config: Config, store: Arc<dyn Store>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::run(Server::with_store(listener, config, store))
    }

    fn run(server: Server) -> Self {
        let address = server.local_addr().expect("a bound socket");
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Self { address, stop: Some(stop), running }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn client(&self) -> Client {
        Client::builder(self.endpoint()).timeout(PATIENCE).build().expect("a valid endpoint")
    }

    /// Asks the server to stop, without waiting for it.
    pub(crate) fn begin_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Stops the server and waits until it is gone.
    pub(crate) async fn stop(mut self) {
        self.begin_stop();
        self.running.await.expect("the server does not panic").expect("the server stops cleanly");
    }
}

/// The real program in a process of its own. Killed when dropped.
pub(crate) struct Program {
    process: Child,
    pub(crate) address: String,
}

impl Program {
    /// Starts it on a free port.
    pub(crate) fn start(database: &Database) -> Self {
        Self::start_on("127.0.0.1:0", database)
    }

    pub(crate) fn start_on(address: &str, database: &Database) -> Self {
        let mut process = command(&["--listen", address, "--database-url", &database.url()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("the program prints");
        let address = line.trim().strip_prefix("listening on ").expect("the program serves").to_owned();
        Self { process, address }
    }

    pub(crate) fn client(&self) -> Client {
        Client::builder(format!("http://{}", self.address)).timeout(PATIENCE).build().expect("a valid endpoint")
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// kill -9.
    pub(crate) fn kill(mut self) {
        self.process.kill().expect("the program was running");
        self.process.wait().expect("the program ends");
    }

    /// Sends a signal by name and waits for the end.
    pub(crate) fn end_by(mut self, signal: &str) -> ExitStatus {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
        self.process.wait().expect("the program ends")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The program with these arguments, unaffected by the environment of the tests.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jobledger"));
    for name in ["LISTEN", "DATABASE_URL", "LOG", "LOG_FORMAT", "SHUTDOWN_GRACE", "MAX_BATCH"] {
        command.env_remove(format!("JOBLEDGER_{name}"));
    }
    command.args(arguments);
    command
}

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the server is in a workspace")
}

/// A clock that is moved by hand, in microseconds. Each reading moves it by one step.
pub(crate) struct ManualClock {
    now: AtomicI64,
    step: i64,
}

impl ManualClock {
    pub(crate) fn stepping(step: i64) -> Arc<Self> {
        Arc::new(Self { now: AtomicI64::new(1_700_000_000_000_000), step })
    }

    pub(crate) fn set_back(&self, micros: i64) {
        self.now.fetch_sub(micros, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Time {
        DateTime::from_timestamp_micros(self.now.fetch_add(self.step, Ordering::SeqCst)).expect("a valid time")
    }
}
