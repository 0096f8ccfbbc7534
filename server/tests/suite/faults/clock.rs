//! Somebody sets the clock that decides: PostgreSQL's, or on SQLite the server's.

use std::{
    fs::{File, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use chrono::TimeDelta;
use jobledger_client::{
    Claim, Client, Follow, Item, JobEventKind, JobStatus, NewJob, Report, Subscription,
    worker::{Context, Error as Failure, Worker},
};
use jobledger_server::{
    domain::id::OrgId,
    store::{EventFilter, EventQuery},
};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::{PRELOADED, history::Callers, preloaded};
use crate::{
    support::cluster::{Cluster, Durability},
    support::harness::{Database, PATIENCE, await_kind, short_or_long},
    support::program::{Program, command},
    support::seeded::Seeded,
};

/// A clock that tests can move, for programs that preload its library.
pub(super) struct Clock {
    folder: TempDir,
}

impl Clock {
    pub(super) fn new() -> Self {
        let clock = Self { folder: tempfile::tempdir().expect("a temporary directory") };
        clock.move_to(0);
        // The user that PostgreSQL runs as must be able to read the folder.
        std::fs::set_permissions(clock.folder.path(), Permissions::from_mode(0o755)).expect("it is ours");
        let text = format!(
            r#"#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long moved(void) {{
    static volatile long *by;
    if (!by) {{
        int file = open("{}", O_RDONLY);
        if (file < 0) return 0;
        by = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        close(file);
    }}
    return by == MAP_FAILED ? 0 : *by;
}}

int clock_gettime(clockid_t id, struct timespec *time) {{
    int failed = syscall(SYS_clock_gettime, id, time);
    if (!failed && id == CLOCK_REALTIME) time->tv_sec += moved();
    return failed;
}}

int gettimeofday(struct timeval *time, void *zone) {{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}}
"#,
            clock.file().display()
        );
        preloaded(clock.folder.path(), &text);
        clock
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("seconds")
    }

    /// The library that a program preloads.
    pub(super) fn library(&self) -> PathBuf {
        self.folder.path().join(PRELOADED)
    }

    /// Sets the clock to this many seconds ahead of the machine's.
    pub(super) fn move_to(&self, seconds: i64) {
        let mut file = File::options().create(true).write(true).truncate(false).open(self.file()).expect("it is ours");
        file.write_all(&seconds.to_ne_bytes()).expect("there is room");
    }
}

/// Moves the deciding clock again and again while callers work.
async fn jump(clock: &Clock, database: &Database, program: Program) {
    let mut random = Seeded::new(Seeded::from_environment("a clock that jumps"));
    let mut callers = Callers::start(&[program.client()], 3);
    for n in 0..short_or_long(6, 60) {
        callers.go_on().await;
        let seconds = if n == 0 { 86_400 } else { random.below(2 * 86_400) as i64 - 86_400 };
        println!("the clock is {seconds} s ahead");
        clock.move_to(seconds);
    }
    callers.go_on().await;
    callers.end().await;
    assert!(program.end_by("TERM").success());
    println!("{:?}", callers.check(database).await);
    let store = database.open().await;
    let query = EventQuery { filter: EventFilter::default(), after: 0, max_events: usize::MAX, max_bytes: usize::MAX };
    let page = store.events(OrgId::DEFAULT, &query).await.expect("it answers");
    let events: Vec<_> = page.of_jobs().collect();
    assert!(events.is_sorted_by_key(|event| event.recorded_at), "time never falls along the log");
    let moved = events.last().expect("there are events").recorded_at - events[0].recorded_at;
    assert!(moved > TimeDelta::hours(1), "the clock was moved, as far as the log knows");
    store.close().await;
}

/// Runs every case on both databases, with control over the deciding clock.
macro_rules! with_a_clock {
    ($($case:ident,)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case(super::Clocked::sqlite()).await;
            })*
        }

        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case(super::Clocked::postgres().await).await;
            })*
        }
    };
}

with_a_clock! {
    a_clock_that_jumps_costs_nothing_that_was_acknowledged,
    a_jump_ahead_costs_no_lease_and_keeps_none_alive,
    a_day_ahead_for_a_moment_makes_nothing_late,
    what_is_kept_is_kept_after_a_jump_until_somebody_says_that_the_clock_is_right,
    months_ahead_everything_goes_on,
}

/// A database and the clock that decides for it.
struct Clocked {
    clock: Clock,
    database: Database,
}

impl Clocked {
    fn sqlite() -> Self {
        Self { clock: Clock::new(), database: Database::sqlite() }
    }

    async fn postgres() -> Self {
        let clock = Clock::new();
        let cluster: &'static Cluster =
            Box::leak(Box::new(Cluster::alone_with(&clock.library(), Durability::None).await));
        Self { clock, database: Database::postgres_on(cluster).await }
    }

    fn serve(&self, more: &[&str]) -> Program {
        let preload = [("LD_PRELOAD", &*self.clock.library())];
        // On SQLite the server's clock decides. On PostgreSQL the cluster already preloads the library.
        let preload = if self.database.is_postgres() { &preload[..0] } else { &preload };
        Program::serve_in("127.0.0.1:0", &self.database.url(), &[&["--log", "error"], more].concat(), preload)
    }
}

async fn a_clock_that_jumps_costs_nothing_that_was_acknowledged(clocked: Clocked) {
    let program = clocked.serve(&[]);
    jump(&clocked.clock, &clocked.database, program).await;
}

/// Waits until a job's attempt is lost; returns how long that took.
async fn until_lost(client: &Client, id: &str) -> Duration {
    let began = Instant::now();
    await_kind(client, id, JobEventKind::Lost).await;
    began.elapsed()
}

/// Claims a job of a type, and sends nothing more. Returns the job's id.
async fn claim_and_die(client: &Client, job_type: &str, lease: Duration) -> String {
    let claim = Claim::new("dead").types([job_type]).lease(lease);
    client.claim(claim).await.unwrap().remove(0).job.unwrap().id
}

async fn await_event(events: &mut Subscription, kind: JobEventKind) {
    let seen = async {
        while let Some(item) = events.next().await {
            if matches!(item.unwrap(), Item::Event(event) if event.kind() == kind) {
                return;
            }
        }
        panic!("{kind:?} never came");
    };
    timeout(PATIENCE, seen).await.unwrap();
}

async fn a_jump_ahead_costs_no_lease_and_keeps_none_alive(clocked: Clocked) {
    const LEASE: Duration = Duration::from_secs(3);
    let program = clocked.serve(&[]);
    let client = program.client();
    // A server that has just started extends silent leases, whatever the clock does. This one has run for longer than
    // the jump once a lease of 12 s has expired.
    client.create(NewJob::new("first")).await.unwrap();
    let first = claim_and_die(&client, "first", 4 * LEASE).await;
    until_lost(&client, &first).await;
    client.create_all((0..2).map(|_| NewJob::new("long"))).await.unwrap();
    client.create(NewJob::new("dead")).await.unwrap();
    client.create(NewJob::new("timed").run_timeout(3 * LEASE)).await.unwrap();
    // Works for one and a half leases, and half of its run timeout.
    let handler = async |_: Context, (): ()| {
        sleep(3 * LEASE / 2).await;
        Ok::<_, Failure>(())
    };
    let worker = Worker::builder(client.clone()).handle("long", handler).handle("timed", handler).concurrency(3);
    let worker = worker.lease(LEASE).build().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let working = tokio::spawn(worker.run(async { drop(stopped.await) }));
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    for _ in 0..3 {
        await_event(&mut events, JobEventKind::Claimed).await;
    }
    let dead = claim_and_die(&client, "dead", LEASE).await;
    clocked.clock.move_to(6);
    let took = until_lost(&client, &dead).await;
    assert!(took >= LEASE / 2, "what is left of a lease is not taken away: {took:?}");
    let done = async {
        for _ in 0..3 {
            await_event(&mut events, JobEventKind::Succeeded).await;
        }
    };
    timeout(PATIENCE, done).await.expect("they end well");
    drop(stop);
    working.await.unwrap().unwrap();
    let happened = client.statistics(&[]).await.unwrap().happened.unwrap();
    assert_eq!((happened.started, happened.lost, happened.failed), (5, 2, 0));
    assert!(program.end_by("TERM").success());
    clocked.database.verify().await;
}

async fn a_day_ahead_for_a_moment_makes_nothing_late(clocked: Clocked) {
    const LEASE: Duration = Duration::from_secs(2);
    let mut program = clocked.serve(&[]);
    for is_restarted in [false, true] {
        let client = program.client();
        let before = client.create(NewJob::new("t")).await.unwrap().job;
        // These leases and this attempt begin before the jump. What is left of them is far less than a day.
        let [early, passing] = ["early", "passing"].map(|name| format!("{name} {is_restarted}"));
        client.create_all([NewJob::new(&early), NewJob::new(&passing)]).await.unwrap();
        let early = claim_and_die(&client, &early, 5 * LEASE).await;
        let begun = client.create(NewJob::new("timed").run_timeout(5 * LEASE)).await.unwrap().job;
        client.update(Report::start(&begun.id)).await.unwrap();
        clocked.clock.move_to(86_400);
        // Once this lease is lost, a sweep has seen the earlier jobs under the moved clock.
        let passing = claim_and_die(&client, &passing, LEASE).await;
        until_lost(&client, &passing).await;
        let later = client.create(NewJob::new("t")).await.unwrap().job;
        let apart = |job: &jobledger_client::Job| job.created_at.unwrap().seconds - before.created_at.unwrap().seconds;
        assert!(apart(&later) > 80_000);
        // This lease and this wait for another attempt are dated by the clock that is a day ahead.
        let [ahead, again] = ["ahead", "again"].map(|name| format!("{name} {is_restarted}"));
        client.create(NewJob::new(&ahead)).await.unwrap();
        let held = claim_and_die(&client, &ahead, LEASE).await;
        client.create(NewJob::new(&again).max_attempts(2)).await.unwrap();
        let lease = client.claim(Claim::new("w").types([&again])).await.unwrap().remove(0);
        let failed = Report::failed(&lease.job.unwrap().id, "X", "y").retry_after(Duration::from_secs(1));
        client.update(failed.lease(&lease.lease_token)).await.unwrap();
        clocked.clock.move_to(0);
        if is_restarted {
            assert!(program.end_by("TERM").success());
            program = clocked.serve(&[]);
        }
        let client = program.client();
        assert!(until_lost(&client, &held).await < PATIENCE);
        assert!(until_lost(&client, &early).await < PATIENCE);
        await_kind(&client, &begun.id, JobEventKind::Failed).await;
        claim_when_ready(&client, &again).await;
        let after = client.create(NewJob::new("dead")).await.unwrap().job;
        assert!(apart(&after) < 1_000, "when it happened the clock says");
        let dead = claim_and_die(&client, "dead", LEASE).await;
        assert!(until_lost(&client, &dead).await < PATIENCE);
        // The next attempt waits for a second, as the policy says, and not for a day.
        claim_when_ready(&client, "dead").await;
        let soon = std::time::SystemTime::UNIX_EPOCH
            + Duration::from_micros((now(&client).await + TimeDelta::seconds(2)).timestamp_micros() as u64);
        client.create(NewJob::new("scheduled").scheduled_at(soon)).await.unwrap();
        claim_when_ready(&client, "scheduled").await;
        let timed = client.create(NewJob::new("timed").run_timeout(Duration::from_secs(1))).await.unwrap().job;
        client.update(Report::start(&timed.id)).await.unwrap();
        await_kind(&client, &timed.id, JobEventKind::Failed).await;
    }
    assert!(program.end_by("TERM").success());
    clocked.database.verify().await;
}

/// The database's clock, read from a new job.
async fn now(client: &Client) -> chrono::DateTime<chrono::Utc> {
    let created_at = client.create(NewJob::new("now")).await.unwrap().job.created_at.unwrap();
    chrono::DateTime::from_timestamp(created_at.seconds, created_at.nanos as u32).unwrap()
}

async fn claim_when_ready(client: &Client, job_type: &str) {
    let claim = Claim::new("w").types([job_type]).wait(Duration::from_secs(20));
    let leases = timeout(PATIENCE, client.claim(claim)).await.expect("an answer").unwrap();
    assert_eq!(leases.len(), 1, "{job_type} is ready in time");
}

async fn what_is_kept_is_kept_after_a_jump_until_somebody_says_that_the_clock_is_right(clocked: Clocked) {
    let program = clocked.serve(&["--retain-finished", "60s"]);
    let client = program.client();
    let kept = client.create(NewJob::new("kept")).await.unwrap().job.id;
    client.update(Report::start(&kept)).await.unwrap();
    client.update(Report::succeeded(&kept)).await.unwrap();
    client.create(NewJob::new("dead")).await.unwrap();
    clocked.clock.move_to(40 * 86_400);
    // Retention checks twice a second, so it had time to remove the job.
    let dead = claim_and_die(&client, "dead", Duration::from_secs(3)).await;
    until_lost(&client, &dead).await;
    assert_eq!(client.get(&kept).await.unwrap().status(), JobStatus::Succeeded);
    // A server that starts after the jump removes nothing either.
    assert!(program.end_by("TERM").success());
    let program = clocked.serve(&["--retain-finished", "60s"]);
    let client = program.client();
    let dead = client.create(NewJob::new("dead again")).await.unwrap().job.id;
    claim_and_die(&client, "dead again", Duration::from_secs(3)).await;
    until_lost(&client, &dead).await;
    assert_eq!(client.get(&kept).await.unwrap().status(), JobStatus::Succeeded);
    let mut confirm = command(&["confirm-clock", "--database-url", &clocked.database.url()]);
    let confirmed = confirm.env("LD_PRELOAD", clocked.clock.library()).output().unwrap();
    let said = String::from_utf8(confirmed.stdout).unwrap();
    assert!(confirmed.status.success() && said.contains("retention continues"), "{said}");
    let removed = async {
        while client.get(&kept).await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, removed).await.expect("it is removed");
    assert!(program.end_by("TERM").success());
}

async fn months_ahead_everything_goes_on(clocked: Clocked) {
    let program = clocked.serve(&[]);
    let client = program.client();
    client.create(NewJob::new("t")).await.unwrap();
    // Beyond the last partition, and back to a month that has one.
    for days in [200, 0, 400] {
        clocked.clock.move_to(days * 86_400);
        let jobs = client.create_all((0..20).map(|_| NewJob::new("t"))).await.unwrap();
        assert!(jobs.iter().all(Result::is_ok), "{jobs:?}");
        let lease = client.claim(Claim::new("w")).await.unwrap().remove(0);
        client.update(Report::succeeded(&lease.job.unwrap().id).lease(&lease.lease_token)).await.unwrap();
    }
    assert!(program.end_by("TERM").success());
    clocked.database.verify().await;
}
