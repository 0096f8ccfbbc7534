//! The machine fails: its disk is full or does not sync, it has no more file descriptors, another process locks the database.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use jobledger_client::{Error, NewJob};
use tokio::{
    net::TcpStream,
    task::block_in_place,
    time::{sleep, timeout},
};

use super::{history::Callers, preloaded, volume::Volume};
use crate::{
    support::cluster::{Cluster, Durability},
    support::harness::{Database, PATIENCE, on_both_databases, short_or_long},
    support::program::Program,
    support::seeded::Seeded,
};

on_both_databases! {
    who_takes_all_files_keeps_nobody_else_out_for_longer,
}

/// The processor time that a process has used so far.
fn processor_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("the process runs");
    let fields: Vec<_> = stat.rsplit(") ").next().expect("a name in parentheses").split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("a number") + fields[12].parse::<u64>().expect("a number");
    // Linux reports hundredths of a second, whatever the kernel's own ticks are.
    Duration::from_millis(ticks * 10)
}

async fn who_takes_all_files_keeps_nobody_else_out_for_longer(database: Database) {
    const FILES: usize = 160;
    let program = Program::with_files(&database, FILES);
    let client = program.client();
    client.create(NewJob::new("t")).await.expect("it is created");
    let mut silent = Vec::new();
    for _ in 0..2 * FILES {
        silent.push(TcpStream::connect(&program.address).await.expect("the system takes it"));
    }
    client.create(NewJob::new("t")).await.expect("who is there already goes on");
    // Measures the cost of waiting for file descriptors.
    let (before, time) = (processor_time(program.id()), Duration::from_secs(2));
    sleep(time).await;
    let spent = processor_time(program.id()) - before;
    assert!(spent < time / 4, "{spent:?} of processors in {time:?}");
    drop(silent);
    let late = program.client();
    timeout(PATIENCE, late.create(NewJob::new("t"))).await.expect("there are files again").expect("it is created");
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

/// A file that takes all the room there is, until it is dropped.
struct Ballast<'a>(&'a Path);

impl<'a> Ballast<'a> {
    fn fill(path: &'a Path) -> Self {
        let mut file = std::fs::File::create(path).expect("the volume is there");
        let chunk = vec![7; 64 << 10];
        while file.write_all(&chunk).is_ok() {}
        let _ = file.sync_all();
        Self(path)
    }
}

impl Drop for Ballast<'_> {
    fn drop(&mut self) {
        std::fs::remove_file(self.0).expect("it is there");
    }
}

/// Fills the disk under a server, and makes room again.
async fn fill_the_disk(volume: &Volume, database: &Database, mut make_good: impl FnMut()) {
    let program = Program::start_with(database, &["--log", "error"]);
    let client = program.client();
    let mut callers = Callers::start(std::slice::from_ref(&client), 3);
    callers.go_on().await;
    let path = volume.path().join("ballast");
    let ballast = Ballast::fill(&path);
    // Writes until a caller gets an error. Reads succeed for as long as the database answers at all.
    let mut bare = client.raw();
    let told = async {
        loop {
            let payload = jobledger_client::to_value(&"x".repeat(200_000)).expect("it has a JSON form");
            let request = jobledger_client::proto::CreateJobRequest {
                r#type: "t".to_owned(),
                payload: Some(payload),
                ..Default::default()
            };
            if let Err(status) = bare.create_job(request).await {
                break Error::from(status);
            }
        }
    };
    let told = timeout(PATIENCE, told).await.expect("somebody is told");
    println!("a caller was told {told:?}");
    assert!(matches!(told, Error::Exhausted { .. } | Error::Unavailable { .. }), "{told:?}");
    drop(ballast);
    block_in_place(&mut make_good);
    callers.go_on().await;
    callers.end().await;
    assert!(program.end_by("TERM").success());
    println!("{:?}", callers.check(database).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_sqlite_nothing_that_was_acknowledged() {
    let Some(volume) = Volume::new(48) else { return };
    let database = Database::sqlite_at(volume.path());
    for _ in 0..short_or_long(1, 10) {
        fill_the_disk(&volume, &database, || {}).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_postgres_nothing_that_was_acknowledged() {
    let Some(volume) = Volume::new(400) else { return };
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::alone_in(&volume.path(), Durability::Full).await));
    let database = Database::postgres_on(cluster).await;
    for _ in 0..short_or_long(1, 5) {
        fill_the_disk(&volume, &database, || cluster.start_if_down()).await;
    }
    block_in_place(|| cluster.kill());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_to_sync_costs_sqlite_nothing_that_was_acknowledged() {
    let tools = tempfile::tempdir().expect("a temporary directory");
    // If fsync fails, the data may or may not be on the disk, so it must not be acknowledged. The first calls succeed:
    // they belong to the server's start.
    let text = "#include <errno.h>
static int fails(void) {
    static unsigned calls;
    unsigned call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    if (call < 40 || call % 11 != 10) return 0;
    errno = EIO;
    return -1;
}
int fsync(int file) { return fails(); }
int fdatasync(int file) { return fails(); }
";
    let library = preloaded(tools.path(), text);
    let database = Database::sqlite();
    let preload = [("LD_PRELOAD", &*library)];
    let program = Program::serve_in("127.0.0.1:0", &database.url(), &["--log", "off"], &preload);
    let mut callers = Callers::start(&[program.client()], 3);
    for _ in 0..short_or_long(60, 2_000) {
        callers.go_on().await;
    }
    callers.end().await;
    assert!(program.end_by("TERM").success());
    println!("{:?}", callers.check(&database).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_do_not_wait_until_a_slow_disk_has_the_database() {
    const LONGEST: Duration = Duration::from_secs(2);
    let tools = tempfile::tempdir().expect("a temporary directory");
    // A sync takes a second for each 10 MB that were written to the file since its last one.
    let text = "#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>
static unsigned long written[4096];
static unsigned long *of(int file) {
    struct stat found;
    return &written[fstat(file, &found) ? 0 : found.st_ino % 4096];
}
ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t at) {
    static ssize_t (*next)(int, const void *, size_t, off64_t);
    if (!next) next = (ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, \"pwrite64\");
    ssize_t done = next(file, bytes, length, at);
    if (done > 0) __atomic_add_fetch(of(file), done, __ATOMIC_RELAXED);
    return done;
}
int fdatasync(int file) {
    usleep(__atomic_exchange_n(of(file), 0, __ATOMIC_RELAXED) / 10);
    return 0;
}
int fsync(int file) { return fdatasync(file); }
";
    let library = preloaded(tools.path(), text);
    let database = Database::sqlite();
    let preload = [("LD_PRELOAD", &*library)];
    let program = Program::serve_in("127.0.0.1:0", &database.url(), &["--log", "off"], &preload);
    let (client, payload, log) = (program.client(), "x".repeat(400), database.path().with_extension("db-wal"));
    let (mut longest, mut length, mut is_anew) = (Duration::ZERO, 0, false);
    // The log begins anew after 64 MiB, from when on its file does not grow.
    for _ in 0..300 {
        let jobs = (0..500).map(|n| NewJob::new(format!("t{}", n % 7)).payload(&payload).expect("it is JSON"));
        let began = Instant::now();
        client.create_all(jobs).await.expect("they are created");
        longest = longest.max(began.elapsed());
        let before = std::mem::replace(&mut length, std::fs::metadata(&log).expect("the server has it").len());
        is_anew = length > 60 << 20 && length == before;
        if is_anew {
            break;
        }
    }
    assert!(is_anew, "the log has {} MiB and goes on growing", length >> 20);
    assert!(longest < LONGEST, "500 creates took {longest:?}");
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_that_locks_the_file_is_waited_for() {
    let database = Database::sqlite();
    let program = Program::start_with(&database, &["--log", "error"]);
    let mut callers = Callers::start(&[program.client()], 3);
    let mut random = Seeded::new(Seeded::from_environment("another process that locks the file"));
    for _ in 0..short_or_long(2, 20) {
        callers.go_on().await;
        let hold = "import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute('PRAGMA busy_timeout = 60000')
connection.execute('BEGIN IMMEDIATE')
print('locked', flush=True)
sys.stdin.read()";
        let mut holder = Command::new("python3")
            .args(["-c", hold])
            .arg(database.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python runs");
        let mut said = String::new();
        let output = holder.stdout.take().expect("a pipe");
        block_in_place(|| BufReader::new(output).read_line(&mut said)).expect("it says so");
        assert_eq!(said.trim(), "locked");
        // Some waits are shorter than the server waits for a lock, some longer.
        sleep(Duration::from_millis(500 + random.below(9_000))).await;
        drop(holder.stdin.take());
        assert!(block_in_place(|| holder.wait()).expect("it ends").success());
    }
    callers.go_on().await;
    callers.end().await;
    assert!(program.end_by("TERM").success());
    println!("{:?}", callers.check(&database).await);
}
