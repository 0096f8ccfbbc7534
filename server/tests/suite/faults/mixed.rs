//! Mixed faults: three servers on PostgreSQL or one on SQLite, callers with and without the SDK, and one fault after another.

use std::{
    io::PipeReader,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use jobledger_client::Client;
use sqlx::{Connection as _, Executor as _};
use tokio::task::block_in_place;

use super::{
    clock::Clock,
    failover::wait_for_standby,
    history::Callers,
    link::{Fault, Link, Peer},
};
use crate::{
    program::output::{OUTPUTS, Output},
    support::cluster::{Cluster, Durability, SERVER},
    support::harness::{Database, PATIENCE, fixed_address, resident, short_or_long},
    support::program::Program,
    support::seeded::Seeded,
};

const SERVERS: usize = 3;
/// Callers of each kind on each server.
const CALLERS: usize = 3;
/// Every caller and subscriber goes on within this time after a fault.
const BACK_WITHIN: Duration = Duration::from_secs(30);
/// A bound on a server's memory through all faults, in KiB, for a build without optimisation.
const MEMORY: u64 = 256 << 10;

/// A fault.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    /// A server is killed with SIGKILL.
    Kill(usize),
    /// A server is suspended.
    Stop(usize),
    /// Between a server and its callers.
    Callers(usize, Fault),
    /// Between a server and its database.
    Database(usize, Fault),
    /// All connections of a database are terminated, again and again.
    Storm,
    /// The database is killed with SIGKILL.
    KillDatabase,
    /// Another session holds a lock that every write needs.
    Lock,
    /// The database accepts no connections.
    NoConnections,
    /// The deciding clock is this many seconds ahead.
    Clock(i64),
    /// The synchronous standby is down, and the commits that wait for it are cut short.
    Standby(Cut),
    /// A server is restarted and logs much to an output that takes nothing.
    Log(usize, Output),
}

/// What happens to commits that wait for a standby.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// They are answered when the standby is back.
    Nothing,
    Canceled,
    Terminated,
    /// The database is restarted.
    Restarted,
}

/// Draws a fault. A single server has its database in a file, so no fault between servers or of PostgreSQL is drawn.
fn draw(random: &mut Seeded, servers: usize) -> Wrong {
    let n = random.below(servers as u64) as usize;
    let fault = match random.below(5) {
        0 => Fault::Latency(Duration::from_millis(5 + random.below(100))),
        1 => Fault::Cut,
        2 => Fault::BlackHole,
        3 => Fault::Unanswered,
        _ => Fault::HalfOpen,
    };
    match random.below(if servers > 1 { 14 } else { 8 }) {
        0 | 1 => Wrong::Kill(n),
        2 => Wrong::Stop(n),
        3 | 4 => Wrong::Callers(n, fault),
        5 => Wrong::Lock,
        6 => Wrong::Clock([45, -45, 86_400, -86_400, 40 * 86_400][random.below(5) as usize]),
        7 => Wrong::Log(n, OUTPUTS[random.below(OUTPUTS.len() as u64) as usize]),
        8 => Wrong::Database(n, fault),
        9 => Wrong::Storm,
        10 => Wrong::KillDatabase,
        11 => Wrong::NoConnections,
        _ => {
            let cuts = [Cut::Nothing, Cut::Canceled, Cut::Terminated, Cut::Restarted];
            Wrong::Standby(cuts[random.below(cuts.len() as u64) as usize])
        }
    }
}

/// The servers' `--fold-after`, a different one for each.
const FOLD_AFTER: [&str; 3] = ["1s", "10s", "0s"];

/// A server and its links.
struct Replica {
    address: String,
    url: String,
    fold_after: &'static str,
    program: Option<Program>,
    /// The other end of its log, if the log is a pipe.
    log: Option<PipeReader>,
    /// The library that the server preloads.
    preload: Option<PathBuf>,
    callers: Link,
    /// The link to the database, if it is reached over the network.
    database: Option<Link>,
}

impl Replica {
    async fn start(database: &Database, clock: &Clock, fold_after: &'static str) -> Self {
        let address = fixed_address();
        let link = match database.is_postgres() {
            true => Some(Link::to(Peer::Postgres(database.socket())).await),
            false => None,
        };
        let url = match &link {
            Some(link) => format!("postgres://{SERVER}@{}/{}", link.address, database.name()),
            None => database.url(),
        };
        let callers = Link::to(Peer::Tcp(address.clone())).await;
        // On SQLite the server's clock decides.
        let preload = Some(clock.library()).filter(|_| !database.is_postgres());
        let mut replica = Self { address, url, fold_after, program: None, log: None, preload, callers, database: link };
        replica.run(None);
        replica
    }

    /// Starts the server. If `log` is given, the server logs at debug level to that output.
    fn run(&mut self, log: Option<Output>) {
        let preload = self.preload.as_deref().map(|library| ("LD_PRELOAD", library));
        let (to, reader) = log.map_or((Stdio::null(), None), Output::open);
        let level = if log.is_some() { "debug" } else { "error" };
        let options = ["--log", level, "--fold-after", self.fold_after];
        let serve = || Program::serve_saying(&self.address, &self.url, &options, preload.as_slice(), to);
        self.program = Some(block_in_place(serve));
        self.log = reader;
    }

    fn signal(&self, signal: &str) {
        self.program.as_ref().expect("it runs").signal(signal);
    }

    fn client(&self) -> Client {
        Client::builder(format!("http://{}", self.callers.address)).timeout(PATIENCE).build().expect("a valid endpoint")
    }
}

/// The database of a run, its servers, and the means to cause faults.
struct Scene {
    clock: Clock,
    cluster: Option<&'static Cluster>,
    /// The standby that commits wait for.
    standby: Option<&'static Cluster>,
    database: Database,
    replicas: Vec<Replica>,
}

impl Scene {
    async fn do_harm(&mut self, wrong: Wrong, time: Duration) {
        match wrong {
            Wrong::Kill(n) => {
                self.replicas[n].program.take().expect("it runs").kill();
                tokio::time::sleep(time / 4).await;
                self.replicas[n].run(None);
            }
            Wrong::Stop(n) => {
                self.replicas[n].signal("STOP");
                tokio::time::sleep(time).await;
                self.replicas[n].signal("CONT");
            }
            Wrong::Callers(n, fault) => during(&self.replicas[n].callers, fault, time).await,
            Wrong::Database(n, fault) => {
                during(self.replicas[n].database.as_ref().expect("a network"), fault, time).await;
            }
            Wrong::Storm => {
                let ends = Instant::now() + time;
                let mut admin = self.database.connect_as("postgres").await;
                while Instant::now() < ends {
                    admin.execute(TERMINATE).await.expect("a superuser may");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                admin.close().await.expect("it ends");
            }
            Wrong::KillDatabase => {
                let cluster = self.cluster.expect("a server of databases");
                block_in_place(|| cluster.kill());
                tokio::time::sleep(time / 4).await;
                block_in_place(|| cluster.start_again());
            }
            Wrong::Lock => {
                let blocked = self.database.block_writes().await;
                tokio::time::sleep(time).await;
                blocked.end().await;
            }
            Wrong::Clock(seconds) => {
                self.clock.move_to(seconds);
                tokio::time::sleep(time).await;
                self.clock.move_to(0);
            }
            Wrong::Standby(cut) => {
                let standby = self.standby.expect("a server of databases");
                block_in_place(|| standby.stop());
                tokio::time::sleep(time / 2).await;
                self.cut(cut).await;
                tokio::time::sleep(time / 2).await;
                block_in_place(|| standby.start_again());
            }
            Wrong::Log(n, output) => {
                let replica = &mut self.replicas[n];
                let ended = block_in_place(|| replica.program.take().expect("it runs").end_by("TERM"));
                assert!(ended.success());
                replica.run(Some(output));
                tokio::time::sleep(time).await;
            }
            Wrong::NoConnections => {
                let mut admin = self.database.connect_as("postgres").await;
                let limit = |limit: i32| {
                    sqlx::AssertSqlSafe(format!("ALTER DATABASE {} CONNECTION LIMIT {limit}", self.database.name()))
                };
                admin.execute(limit(0)).await.expect("a superuser may");
                admin.execute(TERMINATE).await.expect("a superuser may");
                tokio::time::sleep(time).await;
                admin.execute(limit(-1)).await.expect("a superuser may");
                admin.close().await.expect("it ends");
            }
        }
    }
}

impl Scene {
    /// Cuts commits short that wait for the standby.
    async fn cut(&self, cut: Cut) {
        let function = match cut {
            Cut::Nothing => return,
            Cut::Canceled => "pg_cancel_backend",
            Cut::Terminated => "pg_terminate_backend",
            Cut::Restarted => {
                let cluster = self.cluster.expect("a server of databases");
                return block_in_place(|| {
                    cluster.kill();
                    cluster.start_again();
                });
            }
        };
        let sql = format!("SELECT {function}(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
        let mut admin = self.database.connect_as("postgres").await;
        admin.execute(sqlx::AssertSqlSafe(sql)).await.expect("a superuser may");
        admin.close().await.expect("it ends");
    }
}

const TERMINATE: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()";

async fn during(link: &Link, fault: Fault, time: Duration) {
    link.set(fault);
    tokio::time::sleep(time).await;
    link.set(Fault::None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_hold_what_they_acknowledged_whatever_goes_wrong() {
    let time = Duration::from_secs(short_or_long(120, 30 * 60));
    let clock = Clock::new();
    let cluster = Cluster::alone_with(&clock.library(), Durability::Full).await;
    let cluster: &'static Cluster = Box::leak(Box::new(cluster));
    let database = Database::postgres_on(cluster).await;
    let standby: &'static Cluster = Box::leak(Box::new(block_in_place(|| cluster.standby())));
    wait_for_standby(&database).await;
    let scene = Scene { clock, cluster: Some(cluster), standby: Some(standby), database, replicas: Vec::new() };
    run(scene, SERVERS, time).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_on_a_file_holds_what_it_acknowledged_whatever_goes_wrong() {
    let time = Duration::from_secs(short_or_long(30, 10 * 60));
    let (clock, database) = (Clock::new(), Database::sqlite());
    run(Scene { clock, cluster: None, standby: None, database, replicas: Vec::new() }, 1, time).await;
}

async fn run(mut scene: Scene, servers: usize, time: Duration) {
    let mut random = Seeded::new(Seeded::from_environment("mixed faults"));
    for fold_after in FOLD_AFTER.into_iter().cycle().take(servers) {
        scene.replicas.push(Replica::start(&scene.database, &scene.clock, fold_after).await);
    }
    let clients: Vec<_> = scene.replicas.iter().map(Replica::client).collect();
    let mut callers = Callers::start(&clients, CALLERS);
    callers.go_on().await;
    let began = Instant::now();
    let (mut faults, mut most) = (0, 0);
    while began.elapsed() < time {
        let wrong = draw(&mut random, servers);
        // As often shorter than leases and timeouts as longer.
        let lasts = Duration::from_millis([200, 1_000, 4_000, 12_000][random.below(4) as usize] + random.below(1_000));
        println!("{:6.1} s: {wrong:?} for {:.1} s", began.elapsed().as_secs_f64(), lasts.as_secs_f64());
        scene.do_harm(wrong, lasts).await;
        faults += 1;
        let ended = Instant::now();
        callers.go_on().await;
        let memory: Vec<_> =
            scene.replicas.iter().map(|replica| resident(replica.program.as_ref().expect("it runs").id())).collect();
        most = most.max(*memory.iter().max().expect("there are servers"));
        println!("         all go on after {:.1} s; {memory:?} KiB", ended.elapsed().as_secs_f64());
        assert!(ended.elapsed() < BACK_WITHIN, "{wrong:?} is over, and somebody does not go on");
        assert!(most < MEMORY, "a server takes {most} KiB");
    }
    callers.end().await;
    let took = began.elapsed();
    for replica in &mut scene.replicas {
        assert!(replica.program.take().expect("it runs").end_by("TERM").success());
    }
    if let (Some(cluster), Some(standby)) = (scene.cluster, scene.standby) {
        // The standby has everything that was acknowledged, too.
        block_in_place(|| {
            cluster.kill();
            standby.promote();
        });
        scene.database = scene.database.moved_to(standby);
    }
    let summary = callers.check(&scene.database).await;
    println!("{faults} faults in {:.0} s, {most} KiB at most: {summary:?}", took.as_secs_f64());
    assert!(faults > 0);
}
