//! The server is killed with SIGKILL while it works.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use jobledger_client::{Client, Follow, Item, JobStatus, NewJob, Report};
use jobledger_server::{
    domain::{event::JobEvent, id::OrgId},
    store::{EventFilter, EventQuery},
};
use tokio::{task::JoinSet, time::timeout};

use crate::support::harness::{Database, PATIENCE, fixed_address, on_both_databases, short_or_long};
use crate::support::program::Program;

on_both_databases! {
    nothing_acknowledged_is_lost_when_the_server_is_killed,
    a_server_that_is_killed_has_all_that_it_acknowledged,
}

/// Checks derived data against the log, and that each job has at least the acknowledged number of events. Returns the events.
pub(crate) async fn verify(
    database: &Database,
    acknowledged: &HashMap<String, (JobStatus, i64)>,
) -> Vec<Arc<JobEvent>> {
    database.verify().await;
    let store = database.open().await;
    let query = EventQuery { filter: EventFilter::default(), after: 0, max_events: usize::MAX, max_bytes: usize::MAX };
    let mut events = Vec::new();
    loop {
        let after = events.last().map_or(0, |event: &Arc<JobEvent>| event.seq);
        let page = store.events(OrgId::DEFAULT, &EventQuery { after, ..query.clone() }).await.unwrap();
        events.extend(page.of_jobs().cloned());
        if page.through == page.head {
            break;
        }
    }
    store.close().await;
    let mut histories: HashMap<_, i64> = HashMap::new();
    for (event, expected) in events.iter().zip(1..) {
        assert_eq!(event.seq, expected, "every seq from 1 to the head once");
        *histories.entry(event.job_id.to_string()).or_default() += 1;
    }
    for (id, (_, events)) in acknowledged {
        assert!(histories.get(id).is_some_and(|found| found >= events), "{events} events of {id} were acknowledged");
    }
    events
}

/// What was acknowledged of each job: its last status, and how many events it had by then.
type Acknowledged = Arc<Mutex<HashMap<String, (JobStatus, i64)>>>;

fn is_end(status: JobStatus) -> bool {
    status == JobStatus::Succeeded
}

async fn work(client: Client, acknowledged: Acknowledged, jobs: usize) {
    for n in 0..jobs {
        let note = |job: &jobledger_client::Job, events| {
            acknowledged.lock().unwrap().insert(job.id.clone(), (job.status(), events));
        };
        let job = client.create(NewJob::new(["a", "b"][n % 2])).await.unwrap().job;
        note(&job, 1);
        let id = job.id;
        note(&client.update(Report::start(&id)).await.unwrap().job, 2);
        note(&client.update(Report::progress(&id).percent(50)).await.unwrap().job, 3);
        note(&client.update(Report::succeeded(&id)).await.unwrap().job, 4);
    }
}

async fn nothing_acknowledged_is_lost_when_the_server_is_killed(database: Database) {
    const WORKERS: usize = 16;
    let (jobs, kills) = short_or_long((60, 5), (600, 40));
    let address = fixed_address();
    let mut program = Program::start_on(&address, &database);
    let client = program.client();
    let acknowledged = Acknowledged::default();
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        workers.spawn(work(client.clone(), Arc::clone(&acknowledged), jobs));
    }
    // The kills are spread over the work. The subscriber, which resumes after each, measures how far it is.
    let total = (WORKERS * jobs * 4) as i64;
    let (mut seen, mut killed) = (0, 0);
    while seen < total {
        let item = timeout(PATIENCE, events.next()).await.expect("events come").expect("for ever").unwrap();
        let Item::Event(event) = item else { continue };
        assert_eq!(event.seq, seen + 1, "the subscriber sees every event once, in order");
        seen = event.seq;
        if killed < kills && seen > (killed + 1) * total / (kills + 1) {
            let running = acknowledged.lock().unwrap().values().filter(|(status, _)| !is_end(*status)).count();
            assert!(running > 0, "work was under way");
            program.kill();
            // What was acknowledged before the kill must be in the database, whatever comes later.
            let so_far = acknowledged.lock().unwrap().clone();
            verify(&database, &so_far).await;
            program = Program::start_on(&address, &database);
            killed += 1;
        }
    }
    workers.join_all().await;
    assert_eq!(killed, kills);
    program.kill();

    let acknowledged = acknowledged.lock().unwrap().clone();
    let written = verify(&database, &acknowledged).await;
    assert_eq!(written.len() as i64, total, "each create and each report happened once, however often it was sent");
    assert_eq!(acknowledged.len(), WORKERS * jobs);
    assert!(acknowledged.values().all(|(status, events)| is_end(*status) && *events == 4));
    println!("{kills} kills, {total} events: none lost, none twice");
}

async fn a_server_that_is_killed_has_all_that_it_acknowledged(database: Database) {
    // Calls are not retried, so what was answered before the kill must be in the database.
    let program = Program::start(&database);
    let client = program.client();
    let acknowledged = Arc::new(Mutex::new(HashSet::new()));
    let mut writers = JoinSet::new();
    for _ in 0..32 {
        let (mut service, acknowledged) = (client.raw(), Arc::clone(&acknowledged));
        writers.spawn(async move {
            let request = jobledger_client::proto::CreateJobRequest { r#type: "t".to_owned(), ..Default::default() };
            while let Ok(answer) = service.create_job(request.clone()).await {
                acknowledged.lock().unwrap().insert(answer.into_inner().job.unwrap().id);
            }
        });
    }
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    let mut seen = HashSet::new();
    while seen.len() < 2_000 {
        if let Item::Event(event) = timeout(PATIENCE, events.next()).await.expect("events come").unwrap().unwrap() {
            seen.insert(event.job_id);
        }
    }
    program.kill();
    writers.join_all().await;
    let kept: HashSet<_> =
        verify(&database, &HashMap::new()).await.iter().map(|event| event.job_id.to_string()).collect();
    let acknowledged = acknowledged.lock().unwrap();
    assert!(acknowledged.len() >= 1_000, "{} were acknowledged", acknowledged.len());
    assert_eq!(acknowledged.difference(&kept).count(), 0, "acknowledged and gone");
    assert_eq!(seen.difference(&kept).count(), 0, "seen by a subscriber and gone");
}
