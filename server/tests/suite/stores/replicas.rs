//! Several servers on one PostgreSQL database, and what becomes of them when the database or the network fails.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::TimeDelta;
use jobledger_client::{Client, Follow, Item, JobStatus, NewJob, Report, Subscription, proto::CreateJobRequest};
use jobledger_server::{
    Config,
    domain::{id::OrgId, job::Job},
    store::{self, Batch, Changes, EventFilter, EventQuery, Head, Needs, OpenOptions, Store, StoreError},
};
use sqlx::Executor as _;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep_until, timeout},
};
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    support::cluster::{Cluster, Durability, SERVER},
    support::harness::{Database, PATIENCE, TestServer, fixed_address, short_or_long},
    support::program::Program,
    support::proxy::Proxy,
    work::crash::verify,
};

async fn next_event(events: &mut Subscription) -> jobledger_client::JobEvent {
    // Bookmarks come all the time, so the timeout covers the whole wait for an event.
    let event = async {
        loop {
            if let Item::Event(event) = events.next().await.expect("for ever").unwrap() {
                return *event;
            }
        }
    };
    timeout(PATIENCE, event).await.expect("events come")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_created_here_followed_there_and_worked_on_elsewhere() {
    let database = Database::postgres().await;
    let (a, on_a) = TestServer::on(&database).await;
    let (b, on_b) = TestServer::on(&database).await;
    let (c, on_c) = TestServer::on(&database).await;
    let mut org = on_b.subscribe(Follow::org().after(0)).await.unwrap();
    let started = Instant::now();
    const ROUNDS: i64 = 20;
    for round in 0..ROUNDS {
        let id = on_a.create(NewJob::new("t")).await.unwrap().job.id;
        assert_eq!(next_event(&mut org).await.seq, round * 3 + 1);
        let mut job = on_b.subscribe(Follow::job(&id)).await.unwrap();
        on_c.update(Report::start(&id)).await.unwrap();
        assert_eq!(next_event(&mut org).await.seq, round * 3 + 2);
        on_a.update(Report::succeeded(&id)).await.unwrap();
        assert_eq!(next_event(&mut org).await.seq, round * 3 + 3);
        for job_seq in 1..=3 {
            assert_eq!(next_event(&mut job).await.job_seq, job_seq);
        }
        while let Some(item) = timeout(PATIENCE, job.next()).await.expect("the job's stream ends") {
            assert!(matches!(item.unwrap(), Item::Bookmark(bookmark) if bookmark.caught_up));
        }
    }
    // Servers that only polled would need seconds for each step.
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    for server in [a, b, c] {
        server.stop().await;
    }
}

/// Works on jobs through one server, and notes what was acknowledged.
async fn work(client: Client, jobs: usize, acknowledged: Arc<Mutex<HashMap<String, (JobStatus, i64)>>>) {
    for _ in 0..jobs {
        let note = |job: &jobledger_client::Job, events| {
            acknowledged.lock().unwrap().insert(job.id.clone(), (job.status(), events));
        };
        let job = client.create(NewJob::new("t")).await.unwrap().job;
        note(&job, 1);
        note(&client.update(Report::start(&job.id)).await.unwrap().job, 2);
        note(&client.update(Report::progress(&job.id).percent(50)).await.unwrap().job, 3);
        note(&client.update(Report::succeeded(&job.id)).await.unwrap().job, 4);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_subscriber_on_every_server_sees_the_same_log_through_kills_and_lost_listeners() {
    const SERVERS: usize = 3;
    const WRITERS: usize = 16;
    let (jobs, kills) = short_or_long((50, 3), (350, 12));
    let database = Database::postgres().await;
    let addresses: [String; SERVERS] = std::array::from_fn(|_| fixed_address());
    let mut programs: Vec<_> = addresses.iter().map(|address| Some(Program::start_on(address, &database))).collect();
    let clients: Vec<_> = programs.iter().map(|program| program.as_ref().unwrap().client()).collect();
    let total = (WRITERS * jobs * 4) as i64;

    let (progress, mut watched) = watch::channel(0);
    let mut subscribers = JoinSet::new();
    for n in 0..SERVERS * 3 {
        let mut events = clients[n % SERVERS].subscribe(Follow::org().after(0)).await.unwrap();
        let progress = (n == 0).then(|| progress.clone());
        subscribers.spawn(async move {
            let mut log = Vec::new();
            while log.len() < total as usize {
                let event = next_event(&mut events).await;
                assert_eq!(event.seq, log.len() as i64 + 1, "nothing is missing, nothing comes twice");
                log.push((event.job_id, event.job_seq, event.next_status));
                if let Some(progress) = &progress {
                    progress.send_replace(log.len() as i64);
                }
            }
            log
        });
    }
    let acknowledged = Arc::default();
    let mut writers = JoinSet::new();
    for n in 0..WRITERS {
        writers.spawn(work(clients[n % SERVERS].clone(), jobs, Arc::clone(&acknowledged)));
    }
    let mut admin = database.connect_as("postgres").await;
    for kill in 0..kills {
        let due = (kill + 1) * total / (kills + 1);
        timeout(PATIENCE * 4, watched.wait_for(|seen| *seen >= due)).await.expect("it goes on").unwrap();
        let n = kill as usize % SERVERS;
        programs[n].take().expect("it runs").kill();
        let (address, again) = (addresses[n].clone(), &database);
        programs[n] = Some(Program::start_on(&address, again));
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE application_name = 'jobledger-listen' AND datname = current_database()";
        let ended = admin.execute(sql).await.unwrap().rows_affected();
        assert!(ended > 0, "there are listeners");
    }
    while let Some(ended) = timeout(PATIENCE * 4, writers.join_next()).await.expect("writers end") {
        ended.expect("a writer gets all its work done");
    }
    let logs = timeout(PATIENCE * 2, subscribers.join_all()).await.expect("every subscriber gets there");
    assert!(logs.iter().all(|log| *log == logs[0]), "all see the same order");
    drop(programs);
    let acknowledged = acknowledged.lock().unwrap().clone();
    assert_eq!(verify(&database, &acknowledged).await.len() as i64, total);
    println!("{} subscribers on {SERVERS} servers, {total} events, {kills} kills: all saw the same", logs.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_heals_after_a_kill_of_the_database_and_has_all_that_it_acknowledged() {
    let kills = short_or_long(2, 10);
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::alone(Durability::Full).await));
    let database = Database::postgres_on(cluster).await;
    let program = Program::start(&database);
    let acknowledged = Arc::new(Mutex::new(HashMap::new()));
    let stop = Arc::new(AtomicBool::new(false));
    let ((count, mut counted), (failure, mut failed)) = (watch::channel(0), watch::channel(0));
    let mut writers = JoinSet::new();
    for _ in 0..32 {
        let (mut service, acknowledged) = (program.client().raw(), Arc::clone(&acknowledged));
        let (stop, count, failure) = (Arc::clone(&stop), count.clone(), failure.clone());
        writers.spawn(async move {
            let mut slowest = Duration::ZERO;
            while !stop.load(Ordering::SeqCst) {
                let request = CreateJobRequest { r#type: "t".to_owned(), ..Default::default() };
                let started = Instant::now();
                let answer = service.create_job(request).await;
                slowest = slowest.max(started.elapsed());
                match answer {
                    Ok(answer) => {
                        let job = answer.into_inner().job.unwrap();
                        acknowledged.lock().unwrap().insert(job.id.clone(), (job.status(), 1));
                        count.send_modify(|count| *count += 1);
                    }
                    Err(error) => {
                        assert_eq!(error.code(), Code::Unavailable, "{error:?}");
                        let retry = error.get_details_retry_info().expect("says when to come back");
                        let wait = retry.retry_delay.expect("a delay");
                        failure.send_modify(|failures| *failures += 1);
                        sleep_until(tokio::time::Instant::now() + wait).await;
                    }
                }
            }
            slowest
        });
    }
    let mut goes_on = async || {
        let goal = *counted.borrow() + 500;
        timeout(PATIENCE, counted.wait_for(|count| *count >= goal)).await.expect("jobs are created").unwrap();
    };
    goes_on().await;
    for _ in 0..kills {
        let failures = *failed.borrow();
        cluster.kill();
        // The database stays away until a caller gets an error. A short absence would be waited out.
        timeout(PATIENCE, failed.wait_for(|now| *now > failures)).await.expect("callers are told").unwrap();
        cluster.start_again();
        goes_on().await;
    }
    stop.store(true, Ordering::SeqCst);
    let slowest = writers.join_all().await.into_iter().max().unwrap();
    let failures = *failed.borrow();
    // The server may look for a batch that was committing for up to 10 s, after it waited for the head.
    assert!(slowest < Duration::from_secs(25), "a call took {slowest:?}");
    program.kill();
    let acknowledged = acknowledged.lock().unwrap().clone();
    let written = verify(&database, &acknowledged).await.len();
    println!(
        "{kills} kills of PostgreSQL, {failures} failures, slowest {slowest:?}: {} of {written}",
        acknowledged.len()
    );
}

/// A database behind a proxy, and the configuration of a server that uses the proxy.
async fn behind_a_proxy() -> (Database, Proxy, Config) {
    let database = Database::postgres().await;
    let proxy = Proxy::before(database.socket()).await;
    let url = format!("postgres://{SERVER}@127.0.0.1:{}/{}", proxy.port, database.name());
    (database, proxy, Config::new(url.parse().unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_hears_nothing_is_replaced_and_looking_covers_for_it() {
    let (database, proxy, config) = behind_a_proxy().await;
    let server = TestServer::start(config).await;
    let (other, on_other) = TestServer::on(&database).await;
    let mut events = server.client().subscribe(Follow::org().after(0)).await.unwrap();
    on_other.create(NewJob::new("t")).await.unwrap();
    assert_eq!(next_event(&mut events).await.seq, 1);
    proxy.has_seen("jobledger-listen", 1).await;
    proxy.swallow(&["jobledger-listen"]);
    on_other.create(NewJob::new("t")).await.unwrap();
    assert_eq!(next_event(&mut events).await.seq, 2, "found without being told");
    proxy.has_seen("jobledger-listen", 2).await;
    server.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_vanishes_with_a_head_blocks_its_org_for_ten_seconds_at_most() {
    let (database, proxy, config) = behind_a_proxy().await;
    let vanishing = store::open(&config.database_url, config.open_options()).await.unwrap();
    let staying = database.open().await;
    let org = OrgId::DEFAULT;
    let held = vanishing.begin(&[org]).await.unwrap();
    proxy.swallow(&["jobledger", "jobledger-notify"]);
    let since = Instant::now();
    while staying.begin(&[org]).await.is_err() {
        assert!(since.elapsed() < Duration::from_secs(10), "the org is blocked");
    }
    assert!(since.elapsed() > Duration::from_secs(1), "it was blocked for a while");
    drop(held);
    // The server that vanished also answers its own callers in time.
    let server = TestServer::start_with(config, vanishing).await;
    let error =
        server.client().raw().create_job(CreateJobRequest { r#type: "t".to_owned(), ..Default::default() }).await;
    assert_eq!(error.unwrap_err().code(), Code::Unavailable);
    assert!(since.elapsed() < Duration::from_secs(40));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_waited_for_its_head_sees_what_was_committed_meanwhile() {
    let database = Database::postgres().await;
    // Whatever default the database's owner has set.
    let sql = format!("ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'", database.name());
    let mut admin = database.connect_as("postgres").await;
    admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    let store = database.open().await;
    let org = OrgId(Uuid::new_v4());
    crate::support::factory::create(&*store, org, false, 1).await;
    let first = crate::support::factory::begin_create(&*store, org, 3).await;
    let waiting = tokio::spawn({
        let store = Arc::clone(&store);
        async move { crate::support::factory::create(&*store, org, false, 1).await }
    });
    let waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let is_waiting = async { while admin.fetch_optional(waits).await.unwrap().is_none() {} };
    timeout(PATIENCE, is_waiting).await.expect("the second waits for the head");
    first.commit().await.unwrap();
    waiting.await.unwrap();
    let query = EventQuery { filter: EventFilter::default(), after: 0, max_events: 100, max_bytes: usize::MAX };
    let events = store.events(org, &query).await.unwrap().events;
    assert_eq!(events.iter().map(|event| event.seq()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
}

/// A batch of creates that begins from the cached state, after the store has just written the log.
async fn recalled(store: &dyn Store, org: OrgId, n: usize) -> Box<dyn Batch> {
    recalled_keyed(store, org, &[], n).await
}

/// As [`recalled`], with these idempotency keys on the first jobs.
async fn recalled_keyed(store: &dyn Store, org: OrgId, keys: &[&str], n: usize) -> Box<dyn Batch> {
    // The first batch of a minute does not begin from the cached state.
    for _ in 0..5 {
        crate::support::factory::create(store, org, false, 1).await;
        if let Some(batch) = crate::support::factory::recall_keyed(store, org, keys, n).await {
            return batch;
        }
    }
    panic!("it remembers nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_has_moved_on_is_not_where_memory_has_it() {
    let database = Database::postgres().await;
    let mut admin = database.connect_as("postgres").await;
    let waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    for isolation in ["read committed", "repeatable read"] {
        let sql = format!("ALTER DATABASE {} SET default_transaction_isolation = '{isolation}'", database.name());
        admin.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
        let (ours, theirs) = (database.open().await, database.open().await);
        // The other server writes while ours waits for the head, has written before, or has only raised `ready_gen` (no event).
        for case in 0..3 {
            let org = OrgId(Uuid::new_v4());
            let create = async |store: &dyn Store| crate::support::factory::create(store, org, false, 1).await;
            let recalled = recalled(&*ours, org, 2).await;
            let before = crate::support::factory::load(&*theirs, org, Needs::default()).await.head;
            let outcome = match case {
                0 => {
                    let other = crate::support::factory::begin_create(&*theirs, org, 3).await;
                    let waiting = tokio::spawn(recalled.commit());
                    let is_waiting = async { while admin.fetch_optional(waits).await.unwrap().is_none() {} };
                    timeout(PATIENCE, is_waiting).await.expect("it waits for the head");
                    other.commit().await.unwrap();
                    waiting.await.unwrap()
                }
                1 => {
                    create(&*theirs).await;
                    recalled.commit().await
                }
                _ => {
                    let head = Some(Head { ready_gen: before.ready_gen + 1, ..before });
                    crate::support::factory::write(&*theirs, org, &Changes { head, ..Changes::default() })
                        .await
                        .unwrap();
                    recalled.commit().await
                }
            };
            assert!(matches!(outcome, Err(StoreError::Conflict(_))), "{isolation}, {case}: {outcome:?}");
            assert!(crate::support::factory::recall_create(&*ours, org, 1).await.is_none(), "others write it");
            create(&*ours).await;
            let query = EventQuery { filter: EventFilter::default(), after: 0, max_events: 100, max_bytes: usize::MAX };
            let events = ours.events(org, &query).await.unwrap().events;
            let expected = before.seq + [4, 2, 1][case];
            assert_eq!(events.iter().map(|event| event.seq()).collect::<Vec<_>>(), (1..=expected).collect::<Vec<_>>());
        }
    }
}

/// A leased job, as a batch of `store` has just left it, and a batch from the cached state that writes the job's next event.
async fn recalled_report(store: &dyn Store, org: OrgId) -> (Job, Box<dyn Batch>) {
    for _ in 0..5 {
        let held = crate::support::factory::hold_one(store, org).await;
        let needs = Needs { jobs: vec![held.id], ..Needs::default() };
        let Some(mut batch) = store.begin_cached(&[(org, needs, 1)]) else { continue };
        let loaded = crate::support::factory::load_in(&mut *batch, org, Needs::default()).await.unwrap();
        assert_eq!(loaded.jobs, std::slice::from_ref(&held));
        crate::support::factory::write_in(&mut *batch, org, &crate::support::factory::progress(&held, &loaded.head))
            .await
            .unwrap();
        return (held, batch);
    }
    panic!("it remembers nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_another_server_has_changed_is_not_as_memory_has_it() {
    let database = Database::postgres().await;
    let (ours, theirs) = (database.open().await, database.open().await);
    // None of these changes has an event, but each leaves a record.
    type Change = fn(&mut Job);
    let changes: [Option<Change>; 5] = [
        Some(|job| job.lease.as_mut().unwrap().expires_at += TimeDelta::seconds(1)),
        Some(|job| job.lease.as_mut().unwrap().is_confirmed = true),
        Some(|job| job.due_at = None),
        Some(|_| {}),
        None,
    ];
    for (case, change) in changes.into_iter().enumerate() {
        let org = OrgId(Uuid::new_v4());
        let (held, recalled) = recalled_report(&*ours, org).await;
        let before = crate::support::factory::load(&*theirs, org, Needs::default()).await.head;
        let mut job = held.clone();
        let theirs_did = match change {
            Some(change) => {
                change(&mut job);
                Changes { changed: vec![job.clone().into()], ..Changes::default() }
            }
            None => Changes { head: Some(before), removed: vec![job.clone()], ..Changes::default() },
        };
        crate::support::factory::write(&*theirs, org, &theirs_did).await.unwrap();
        let outcome = recalled.commit().await;
        let stored = theirs.job(org, held.id).await.unwrap().map(|found| found.job);
        assert!(matches!(outcome, Err(StoreError::Conflict(_))), "{case}: {outcome:?}");
        assert_eq!(stored, change.map(|_| job), "{case}");
        assert_eq!(crate::support::factory::load(&*theirs, org, Needs::default()).await.head, before, "{case}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_there_already_is_found_where_the_log_was_not_read() {
    let database = Database::postgres().await;
    let (store, org) = (database.open().await, OrgId(Uuid::new_v4()));
    recalled_keyed(&*store, org, &["one", "two"], 3).await.commit().await.unwrap();
    let again = recalled_keyed(&*store, org, &["three", "two"], 3).await;
    let before = crate::support::factory::load(&*database.open().await, org, Needs::default()).await.head;
    let refused = again.commit().await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))), "{refused:?}");
    let keys = ["one", "two", "three"].map(Arc::from).to_vec();
    let found = crate::support::factory::load(&*store, org, Needs { keys, ..Needs::default() }).await;
    assert_eq!(found.head, before, "nothing of it has happened");
    let keys: HashSet<_> = found.jobs.iter().filter_map(|job| Some(&*job.spec.idempotency.as_ref()?.key)).collect();
    assert_eq!(keys, HashSet::from(["one", "two"]));
    crate::support::factory::create(&*store, org, false, 1).await;
    let keyed = crate::support::factory::recall_keyed(&*store, org, &["four"], 3).await;
    assert!(keyed.is_none(), "keys are looked for, for a while");
    crate::support::factory::recall_create(&*store, org, 3).await.expect("others need no look").commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_takes_one_to_four_round_trips_whatever_its_size() {
    let (_database, proxy, config) = behind_a_proxy().await;
    let options = OpenOptions { write_connections: 1, ..config.open_options() };
    let store: Arc<dyn Store> = store::open(&config.database_url, options).await.unwrap();
    let org = OrgId(Uuid::new_v4());
    // A connection prepares each statement once. The least of three runs leaves that out.
    let trips = async |keyed: bool, n: usize| {
        let mut least = usize::MAX;
        for _ in 0..3 {
            let before = proxy.round_trips();
            crate::support::factory::create(&*store, org, keyed, n).await;
            least = least.min(proxy.round_trips() - before);
        }
        least
    };
    for n in [1, 400] {
        // The first run prepares the statement.
        let mut least = usize::MAX;
        for _ in 0..3 {
            let recalled = recalled(&*store, org, n).await;
            let before = proxy.round_trips();
            recalled.commit().await.unwrap();
            least = least.min(proxy.round_trips() - before);
        }
        assert_eq!(least, 1, "plain creates where the last batch has left the log");
        let mut least = usize::MAX;
        for _ in 0..3 {
            let keys: Vec<_> = (0..n).map(|_| Uuid::new_v4().to_string()).collect();
            let keys: Vec<_> = keys.iter().map(String::as_str).collect();
            let recalled = recalled_keyed(&*store, org, &keys, n).await;
            let before = proxy.round_trips();
            recalled.commit().await.unwrap();
            least = least.min(proxy.round_trips() - before);
        }
        assert_eq!(least, 1, "creates with keys");
        let mut least = usize::MAX;
        for _ in 0..3 {
            let (_, recalled) = recalled_report(&*store, org).await;
            let before = proxy.round_trips();
            recalled.commit().await.unwrap();
            least = least.min(proxy.round_trips() - before);
        }
        assert_eq!(least, 1, "a report on a job that it has changed itself");
    }
    assert_eq!(trips(false, 1).await, 3, "a plain create");
    assert_eq!(trips(true, 1).await, 4, "a create with a key, where that is looked for");
    assert_eq!(trips(true, 400).await, 4, "many");
}
