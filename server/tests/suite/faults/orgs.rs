//! SIGKILL of the server and of PostgreSQL at random moments, with many orgs that share transactions. Each server folds
//! after another time: at once, soon, late or never.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jobledger_client::{Claim, Client, NewJob, Report};
use jobledger_server::{
    domain::{event::EventKind, id::OrgId},
    store::{EventFilter, EventQuery, Store},
};
use tokio::{
    sync::watch,
    task::{JoinSet, block_in_place},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    support::cluster::{Cluster, Durability},
    support::harness::{Database, PATIENCE, fixed_address, short_or_long},
    support::program::Program,
    support::seeded::Seeded,
    work::leases::keep,
};

const ORGS: u128 = 50;
/// Values of `--fold-after`.
const FOLD_AFTER: [&str; 4] = ["0s", "100ms", "10s", "1h"];

/// What was acknowledged to an org's caller: its jobs, and how each ended if that was acknowledged.
type Told = HashMap<String, Option<EventKind>>;

/// Starts a server with a random `--fold-after`.
fn start(random: &mut Seeded, address: &str, database: &Database) -> Program {
    let fold_after = FOLD_AFTER[random.below(FOLD_AFTER.len() as u64) as usize];
    Program::serve(address, &database.url(), &["--fold-after", fold_after])
}

/// Runs whole lives of one org's jobs, one after the other, some with progress and heartbeats. The SDK retries calls
/// whose outcome is unknown.
async fn live(client: Client, is_over: Arc<AtomicBool>, done: watch::Sender<u64>) -> Told {
    let mut told = Told::new();
    while !is_over.load(Ordering::Relaxed) {
        let created = client.create(NewJob::new("life").max_lost_attempts(100)).await.expect("it is created").job.id;
        told.insert(created, None);
        let lease =
            client.claim(Claim::new("w").types(["life"]).wait(PATIENCE)).await.expect("it is claimed").remove(0);
        let id = lease.job.as_ref().expect("a job").id.clone();
        if told.len().is_multiple_of(3) {
            keep(&client, std::slice::from_ref(&lease), None).await;
        }
        if told.len().is_multiple_of(2) {
            let report = Report::progress(&id).lease(&lease.lease_token).stage("half").percent(50);
            client.update(report).await.expect("the lease lasts for longer than anything here");
        }
        let report = Report::succeeded(&id).lease(lease.lease_token);
        client.update(report).await.expect("the lease lasts for longer than anything here");
        told.insert(id, Some(EventKind::Succeeded));
        done.send_modify(|done| *done += 1);
    }
    told
}

/// Checks that the log has everything that was acknowledged to the org's caller.
async fn check(store: &dyn Store, org: OrgId, told: &Told) {
    let mut last = HashMap::new();
    let mut after = 0;
    loop {
        let filter = EventFilter::default();
        let query = EventQuery { filter, after, max_events: 10_000, max_bytes: usize::MAX };
        let page = store.events(org, &query).await.unwrap();
        for event in page.of_jobs() {
            after += 1;
            assert_eq!(event.seq, after, "every seq of {org} from 1 on once");
            last.insert(event.job_id.to_string(), event.kind);
        }
        if page.through == page.head {
            break;
        }
    }
    for (id, end) in told {
        let found = last.get(id);
        assert!(
            found.is_some() && (end.is_none() || found == end.as_ref()),
            "{org} was told {end:?} of {id}: {found:?}"
        );
    }
}

/// Lets `harm` kill and restart something at random moments, while all orgs are written.
async fn run(database: &Database, mut harm: impl FnMut(&mut Seeded, Program, &str) -> Program) {
    let mut random = Seeded::new(Seeded::from_environment("kills"));
    let address = fixed_address();
    let mut program = start(&mut random, &address, database);
    let (is_over, (done, mut count)) = (Arc::<AtomicBool>::default(), watch::channel(0));
    let mut callers = JoinSet::new();
    let told = Arc::<Mutex<HashMap<OrgId, Told>>>::default();
    for n in 1..=ORGS {
        let org = Uuid::from_u128(n);
        let client =
            Client::builder(format!("http://{address}")).org(org).timeout(PATIENCE).build().expect("an endpoint");
        let (is_over, done, told) = (Arc::clone(&is_over), done.clone(), Arc::clone(&told));
        callers.spawn(async move {
            let of_org = live(client, is_over, done).await;
            told.lock().unwrap().insert(OrgId(org), of_org);
        });
    }
    let kills = short_or_long(5, 100);
    for _ in 0..kills {
        let so_far = *count.borrow();
        timeout(PATIENCE, count.wait_for(|done| *done > so_far + 20)).await.expect("they go on").unwrap();
        tokio::time::sleep(Duration::from_micros(random.below(50_000))).await;
        program = block_in_place(|| harm(&mut random, program, &address));
    }
    is_over.store(true, Ordering::Relaxed);
    timeout(PATIENCE, callers.join_all()).await.expect("they come to an end");
    assert!(program.end_by("TERM").success());
    database.verify().await;
    let store = database.open().await;
    let told = std::mem::take(&mut *told.lock().unwrap());
    assert_eq!(told.len(), ORGS as usize);
    for (org, told) in &told {
        check(&*store, *org, told).await;
    }
    store.close().await;
    let jobs: usize = told.values().map(HashMap::len).sum();
    println!("{kills} kills, {jobs} jobs of {ORGS} orgs: nothing is lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_orgs_lose_nothing_when_the_server_on_a_file_is_killed() {
    let database = Database::sqlite();
    run(&database, |random, program, address| {
        program.kill();
        start(random, address, &database)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_orgs_lose_nothing_when_the_server_or_postgres_is_killed() {
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::alone(Durability::Full).await));
    let database = Database::postgres_on(cluster).await;
    run(&database, |random, program, address| {
        if random.below(2) == 0 {
            program.kill();
            return start(random, address, &database);
        }
        cluster.kill();
        cluster.start_again();
        program
    })
    .await;
    block_in_place(|| cluster.kill());
}
