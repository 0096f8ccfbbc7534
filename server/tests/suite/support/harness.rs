//! Databases, servers, clients and clocks for tests.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU16, Ordering},
    },
    time::Duration,
};

use chrono::DateTime;
use jobledger_client::{Client, Follow, Item, JobEventKind};
use jobledger_server::{
    Config, ServeError, Server,
    domain::clock::{Clock, SystemClock, Time},
    store::{self, DatabaseUrl, FileUse, OpenOptions, Store},
    verify,
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

pub(crate) use crate::support::cluster::root;
use crate::support::cluster::{self, Cluster};

/// A timeout: longer than anything takes that is going to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// `short` for `make test`, `long` for `make test-long`.
pub(crate) fn short_or_long<T>(short: T, long: T) -> T {
    #[expect(clippy::disallowed_methods, reason = "the Makefile says which")]
    let is_long = std::env::var("JOBLEDGER_TEST_LONG").is_ok_and(|value| value == "1");
    if is_long { long } else { short }
}

/// An address to listen on again after a stop. The system gives its port to nobody else meanwhile.
pub(crate) fn fixed_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Below Linux's ephemeral ports, and apart from other test programs that run at the same time.
    let first = 12_000 + (std::process::id() % 1_000) as u16 * 16;
    loop {
        let address = format!("127.0.0.1:{}", first + NEXT.fetch_add(1, Ordering::Relaxed));
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}

/// Runs every case on both databases, then verifies the database. A case that is not listed is dead code, a compile error.
macro_rules! on_both_databases {
    ($($case:ident,)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let database = $crate::support::harness::Database::sqlite();
                super::$case(database.clone()).await;
                database.verify_what_is_left().await;
            })*
        }

        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let database = $crate::support::harness::Database::postgres().await;
                super::$case(database.clone()).await;
                database.verify_what_is_left().await;
            })*
        }
    };
}
pub(crate) use on_both_databases;

/// A test's database, which outlives the servers on it.
#[derive(Clone)]
pub(crate) struct Database {
    place: Arc<Place>,
    /// Whether the test wrote to it past the ledger.
    is_tampered: Arc<AtomicBool>,
}

enum Place {
    /// A file in its own directory.
    Sqlite(TempDir),
    /// A file in a given directory.
    SqliteAt(PathBuf),
    /// A database of a cluster, by name.
    Postgres(&'static Cluster, String),
}

impl Database {
    pub(crate) fn sqlite() -> Self {
        Self::at(Place::Sqlite(TempDir::new().expect("a temporary directory")))
    }

    /// A file in a directory of the test.
    pub(crate) fn sqlite_at(folder: PathBuf) -> Self {
        Self::at(Place::SqliteAt(folder))
    }

    /// The database of the same name on another cluster.
    pub(crate) fn moved_to(&self, cluster: &'static Cluster) -> Self {
        Self::at(Place::Postgres(cluster, self.name().to_owned()))
    }

    /// A new database on the cluster that tests share.
    pub(crate) async fn postgres() -> Self {
        Self::postgres_on(cluster::shared().await).await
    }

    pub(crate) async fn postgres_on(cluster: &'static Cluster) -> Self {
        Self::at(Place::Postgres(cluster, cluster.create_database().await))
    }

    /// A new database of the same kind.
    pub(crate) async fn another(&self) -> Self {
        if self.is_postgres() { Self::postgres().await } else { Self::sqlite() }
    }

    fn at(place: Place) -> Self {
        Self { place: Arc::new(place), is_tampered: Arc::default() }
    }

    /// The path of the file, which need not exist yet.
    pub(crate) fn path(&self) -> PathBuf {
        match &*self.place {
            Place::Sqlite(folder) => folder.path().join("ledger.db"),
            Place::SqliteAt(folder) => folder.join("ledger.db"),
            Place::Postgres(..) => panic!("a database server's files are its own"),
        }
    }

    /// The URL with the server's role.
    pub(crate) fn url(&self) -> String {
        match &*self.place {
            Place::Sqlite(_) | Place::SqliteAt(_) => format!("sqlite://{}", self.path().display()),
            Place::Postgres(cluster, name) => cluster.url(name, cluster::SERVER),
        }
    }

    /// The URL with this role, which SQLite ignores.
    pub(crate) fn url_as(&self, role: &str) -> String {
        match &*self.place {
            Place::Sqlite(_) | Place::SqliteAt(_) => self.url(),
            Place::Postgres(cluster, name) => cluster.url(name, role),
        }
    }

    pub(crate) fn config(&self) -> Config {
        Config::new(self.url().parse::<DatabaseUrl>().expect("a valid URL"))
    }

    /// Opens a store as a server does.
    pub(crate) async fn open(&self) -> Arc<dyn Store> {
        self.open_with(Arc::new(SystemClock)).await
    }

    pub(crate) async fn open_with(&self, clock: Arc<dyn Clock>) -> Arc<dyn Store> {
        let url: DatabaseUrl = self.url().parse().expect("a valid URL");
        store::open(&url, OpenOptions::new(clock)).await.expect("the database opens")
    }

    /// Verifies the database after a test, if only the ledger has written to it.
    pub(crate) async fn verify_what_is_left(&self) {
        let is_there = self.is_postgres() || self.path().exists();
        if is_there && !self.is_tampered.load(Ordering::SeqCst) {
            self.find_no_difference().await;
        }
    }

    /// Checks that everything derived matches the log. This also works beside a server.
    pub(crate) async fn verify(&self) {
        let jobs = self.find_no_difference().await;
        assert!(jobs > 0, "there was something to verify");
    }

    /// Panics if `verify` finds a difference. Returns the number of jobs.
    async fn find_no_difference(&self) -> u64 {
        let url: DatabaseUrl = self.url().parse().expect("a valid URL");
        let options =
            OpenOptions { migrate: false, file_use: FileUse::Beside, ..OpenOptions::new(Arc::new(SystemClock)) };
        let store = store::open(&url, options).await.expect("the database opens");
        let verified = verify::verify(&*store, None, |_| {}).await.expect("it can be verified");
        store.close().await;
        let differences: Vec<_> = verified.differences.iter().map(ToString::to_string).collect();
        assert!(differences.is_empty(), "{differences:#?}");
        verified.jobs
    }

    /// Turns off the verification at the end, because the test writes data that the ledger would not write.
    pub(crate) fn is_made_up(&self) {
        self.is_tampered.store(true, Ordering::SeqCst);
    }

    /// A connection to the file beside the server's.
    pub(crate) async fn connect(&self) -> sqlx::SqliteConnection {
        use sqlx::ConnectOptions as _;
        sqlx::sqlite::SqliteConnectOptions::new().filename(self.path()).connect().await.expect("the file opens")
    }

    /// A connection to PostgreSQL beside the server's, with this role.
    pub(crate) async fn connect_as(&self, role: &str) -> sqlx::PgConnection {
        match &*self.place {
            Place::Sqlite(_) | Place::SqliteAt(_) => panic!("SQLite has no roles"),
            Place::Postgres(cluster, name) => cluster.connect(name, role).await,
        }
    }

    /// Runs SQL beside the server that means the same on both databases. On PostgreSQL it runs as the superuser, with
    /// the search path `jobledger`.
    pub(crate) async fn tamper(&self, sql: &str) {
        self.is_made_up();
        self.run(sql).await;
    }

    pub(crate) async fn run(&self, sql: &str) {
        use sqlx::Executor as _;
        let sql = sqlx::AssertSqlSafe(sql.to_owned());
        match &*self.place {
            Place::Sqlite(_) | Place::SqliteAt(_) => self.connect().await.execute(sql).await.map(|_| ()),
            Place::Postgres(..) => {
                let mut connection = self.connect_as("postgres").await;
                connection.execute("SET search_path = jobledger").await.expect("a setting");
                connection.execute(sql).await.map(|_| ())
            }
        }
        .expect("the SQL runs");
    }

    pub(crate) fn socket(&self) -> PathBuf {
        match &*self.place {
            Place::Sqlite(_) | Place::SqliteAt(_) => panic!("SQLite has no socket"),
            Place::Postgres(cluster, _) => cluster.socket(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        match &*self.place {
            Place::Sqlite(_) | Place::SqliteAt(_) => panic!("a file has a path"),
            Place::Postgres(_, name) => name,
        }
    }

    pub(crate) fn is_postgres(&self) -> bool {
        matches!(*self.place, Place::Postgres(..))
    }

    /// Makes the database refuse jobs of a type, which validation lets through.
    pub(crate) async fn refuse_jobs_of_type(&self, job_type: &str) {
        self.run(&if self.is_postgres() {
            format!("ALTER TABLE job ADD CONSTRAINT poison CHECK (type <> '{job_type}')")
        } else {
            format!(
                "CREATE TRIGGER poison BEFORE INSERT ON job WHEN NEW.type = '{job_type}'
                 BEGIN SELECT RAISE(ABORT, 'poison'); END"
            )
        })
        .await;
    }

    /// Blocks every server's writes, but not its reads.
    pub(crate) async fn block_writes(&self) -> Blocked {
        use sqlx::Executor as _;
        if self.is_postgres() {
            let mut connection = self.connect_as("postgres").await;
            let lock = "BEGIN; LOCK TABLE jobledger.org_head IN EXCLUSIVE MODE";
            connection.execute(lock).await.expect("the lock is free");
            Blocked::Postgres(connection)
        } else {
            let mut connection = self.connect().await;
            connection.execute("BEGIN IMMEDIATE").await.expect("the lock is free");
            Blocked::Sqlite(connection)
        }
    }
}

/// A transaction that blocks servers' writes.
pub(crate) enum Blocked {
    Sqlite(sqlx::SqliteConnection),
    Postgres(sqlx::PgConnection),
}

impl Blocked {
    pub(crate) async fn end(self) {
        use sqlx::Connection as _;
        match self {
            Self::Sqlite(connection) => connection.close().await,
            Self::Postgres(connection) => connection.close().await,
        }
        .expect("it ends");
    }
}

/// A server in this process, on a socket.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), ServeError>>,
}

impl TestServer {
    /// Starts a server with the defaults. Returns it and a client.
    pub(crate) async fn on(database: &Database) -> (Self, Client) {
        let server = Self::start(database.config()).await;
        let client = server.client();
        (server, client)
    }

    pub(crate) async fn start(config: Config) -> Self {
        Self::start_on("127.0.0.1:0", config).await
    }

    pub(crate) async fn start_on(address: &str, config: Config) -> Self {
        let listener = TcpListener::bind(address).await.expect("the port is free");
        Self::run(Server::open(listener, config).await.expect("the database opens"))
    }

    /// Starts a server on a free port, with a store that is already open.
    pub(crate) async fn start_with(config: Config, store: Arc<dyn Store>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::run(Server::with_store(listener, config, store).await.expect("it can be served"))
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

    /// Stops the server and waits until it has ended.
    pub(crate) async fn stop(mut self) {
        self.begin_stop();
        self.running.await.expect("the server does not panic").expect("the server stops cleanly");
    }
}

/// Waits for an event of this kind on a job.
pub(crate) async fn await_kind(client: &Client, id: &str, kind: JobEventKind) {
    let seen = async {
        let mut events = client.subscribe(Follow::job(id)).await.unwrap();
        while let Some(item) = events.next().await {
            if matches!(item.unwrap(), Item::Event(event) if event.kind() == kind) {
                return;
            }
        }
        panic!("{kind:?} never came");
    };
    tokio::time::timeout(PATIENCE, seen).await.unwrap();
}

/// A clock that tests set, in microseconds. Each reading moves it on by one step.
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

/// Resident memory of a process, in KiB.
pub(crate) fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux reports it");
    line.trim().strip_suffix(" kB").and_then(|number| number.parse().ok()).expect("a number of KiB")
}
