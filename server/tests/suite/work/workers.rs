//! The worker of the client crate: what becomes of jobs however handlers behave, and of workers however servers behave.

use std::{
    collections::HashMap,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use jobledger_client::{
    Client, Follow, Item, Job, JobEvent, JobEventKind, JobStatus, NewJob, Subscription, from_value,
    worker::{Context, Error, Worker, WorkerBuilder},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    sync::{Barrier, Notify, Semaphore, oneshot},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    support::harness::{Database, PATIENCE, TestServer, fixed_address, on_both_databases},
    support::program::Program,
    work::crash::verify,
};

on_both_databases! {
    a_handler_gets_the_payload_and_its_value_is_the_result,
    however_a_handler_ends_the_job_does_and_the_worker_lives_on,
    progress_is_throttled_and_the_last_of_it_is_not_lost,
    a_handler_that_ignores_cancellation_is_dropped_and_the_job_canceled,
    a_handler_that_never_returns_is_dropped_when_its_time_is_over,
    a_worker_takes_no_more_than_it_has_room_for,
    a_worker_that_stops_finishes_what_it_can_and_gives_the_rest_back,
    a_worker_outlives_its_server,
    a_hundred_slots_do_not_make_a_hundred_calls,
    many_long_messages_cost_no_lease,
}

#[derive(Deserialize)]
struct Add {
    a: i64,
    b: i64,
}

#[derive(Serialize)]
struct Sum {
    sum: i64,
}

/// A running worker.
struct Working {
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), jobledger_client::Error>>,
}

impl Working {
    fn start(worker: WorkerBuilder) -> Self {
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(worker.build().unwrap().run(async {
            let _ = stopped.await;
        }));
        Self { stop, running }
    }

    async fn stop(self) {
        drop(self.stop);
        timeout(PATIENCE, self.running).await.expect("the worker stops").unwrap().unwrap();
    }
}

/// The job at its end, and its events.
async fn until_it_ends(client: &Client, id: &str) -> (Job, Vec<JobEvent>) {
    let history = async {
        let mut events = client.subscribe(Follow::job(id)).await.unwrap();
        let mut history = Vec::new();
        while let Some(item) = events.next().await {
            if let Item::Event(event) = item.unwrap() {
                history.push(*event);
            }
        }
        history
    };
    let history = timeout(PATIENCE, history).await.expect("the job ends");
    (client.get(id).await.unwrap(), history)
}

fn kinds(events: &[JobEvent]) -> Vec<JobEventKind> {
    events.iter().map(JobEvent::kind).collect()
}

async fn create(client: &Client, job: NewJob) -> String {
    client.create(job).await.unwrap().job.id
}

async fn a_handler_gets_the_payload_and_its_value_is_the_result(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let add = |context: Context, job: Add| async move {
        assert_eq!((context.attempt(), context.job().r#type.as_str(), context.deadline()), (1, "add", None));
        assert!(!context.is_canceled());
        Ok(Sum { sum: job.a + job.b })
    };
    let nothing = |_: Context, (): ()| async { Ok(()) };
    let worker =
        Working::start(Worker::builder(client.clone()).handle("add", add).handle("nothing", nothing).worker_id("w1"));
    let sum = create(&client, NewJob::new("add").payload(&json!({"a": 2, "b": 40})).unwrap()).await;
    let none = create(&client, NewJob::new("nothing")).await;
    let others = create(&client, NewJob::new("others")).await;
    let (job, history) = until_it_ends(&client, &sum).await;
    assert_eq!(from_value::<serde_json::Value>(job.result.as_ref()).unwrap(), json!({"sum": 42}));
    assert_eq!(kinds(&history), [JobEventKind::Created, JobEventKind::Claimed, JobEventKind::Succeeded]);
    assert!(history[1..].iter().all(|event| event.actor == "w1"));
    let (job, _) = until_it_ends(&client, &none).await;
    assert_eq!((job.status(), job.result), (JobStatus::Succeeded, None));
    worker.stop().await;
    assert_eq!(client.get(others).await.unwrap().status(), JobStatus::Queued);
    server.stop().await;
}

async fn however_a_handler_ends_the_job_does_and_the_worker_lives_on(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let handler = |context: Context, how: String| async move {
        match how.as_str() {
            "panics" => panic!("something {}", "broke"),
            "errs" => Err(std::io::Error::other("no such picture"))?,
            "errs for good" => return Err(Error::permanent("no use").code("NO_USE")),
            "errs for now" => return Err(Error::retry_after(Duration::from_secs(3_600), "later").code("BUSY")),
            "gives back" if context.attempt() == 1 => return Err(Error::give_back(Duration::ZERO)),
            "returns 2 MiB" => return Ok(json!("x".repeat(2 << 20))),
            "returns NUL" => return Ok(json!("\0")),
            // Deeper than a message may be: the server would refuse the whole call.
            "returns depths" => return Ok((0..200).fold(json!(1), |inner, _| json!([inner]))),
            "errs for ever" => return Err(Error::retry_after(Duration::MAX, "some day").code("SOME_DAY")),
            "says too much" => return Err(Error::permanent("é".repeat(9_000)).code("\0x".repeat(200))),
            _ => {}
        }
        Ok(json!("done"))
    };
    let worker = Working::start(Worker::builder(client.clone()).handle("t", handler).concurrency(2));
    let cases = [
        ("panics", 1, JobStatus::Failed, "PANIC", "the handler panicked: something broke"),
        ("panics", 2, JobStatus::DeadLetter, "PANIC", "the handler panicked: something broke"),
        ("errs", 1, JobStatus::Failed, "HANDLER_FAILED", "no such picture"),
        ("errs for good", 9, JobStatus::Failed, "NO_USE", "no use"),
        ("gives back", 1, JobStatus::Succeeded, "", ""),
        (
            "returns 2 MiB",
            9,
            JobStatus::Failed,
            "INVALID_RESULT",
            "the result takes 2097157 bytes encoded; the limit is 1048576",
        ),
        ("returns NUL", 9, JobStatus::Failed, "INVALID_RESULT", "the result was refused: "),
        ("returns depths", 9, JobStatus::Failed, "INVALID_RESULT", "the result nests lists and objects deeper than 32"),
        ("errs for ever", 1, JobStatus::Failed, "SOME_DAY", "some day"),
        ("says too much", 9, JobStatus::Failed, "xxxxxxxxxx", "éééé"),
        ("returns", 1, JobStatus::Succeeded, "", ""),
    ];
    for (how, max_attempts, status, code, message) in cases {
        let policy = jobledger_client::RetryPolicy {
            initial_backoff: Some(jobledger_client::prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
            ..Default::default()
        };
        let job = NewJob::new("t").payload(how).unwrap().max_attempts(max_attempts).retry_policy(policy);
        let (job, history) = until_it_ends(&client, &create(&client, job).await).await;
        assert_eq!(job.status(), status, "{how}: {history:#?}");
        let (found_code, found) = (&job.last_error_code, &job.last_error_message);
        assert!(found_code.starts_with(code) && found.starts_with(message), "{how}: {found_code} {found:.200}");
        assert!(!code.is_empty() || found_code.is_empty(), "{how}");
        assert!(job.worker_id.is_empty());
    }
    let unreadable = create(&client, NewJob::new("t").payload(&7).unwrap().max_attempts(9)).await;
    let (job, _) = until_it_ends(&client, &unreadable).await;
    assert_eq!((job.status(), job.last_error_code.as_str()), (JobStatus::Failed, "INVALID_PAYLOAD"));
    let later = create(&client, NewJob::new("t").payload("errs for now").unwrap().max_attempts(9)).await;
    let mut events = client.subscribe(Follow::job(&later)).await.unwrap();
    let scheduled = async {
        loop {
            match events.next().await.unwrap().unwrap() {
                Item::Event(event) if event.kind() == JobEventKind::RetryScheduled => return *event,
                _ => {}
            }
        }
    };
    let event = timeout(PATIENCE, scheduled).await.unwrap();
    assert_eq!(event.scheduled_at.unwrap().seconds - event.ts.unwrap().seconds, 3_600);
    worker.stop().await;
    server.stop().await;
}

async fn progress_is_throttled_and_the_last_of_it_is_not_lost(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let handler = |context: Context, rounds: u32| async move {
        for round in 0..rounds {
            context.stage(format!("round {round}"));
            context.progress((100 * round / rounds) as u8);
            tokio::task::yield_now().await;
        }
        context.message("that was it");
        context.progress(99);
        Ok(())
    };
    let builder = Worker::builder(client.clone()).handle("t", handler).progress_interval(Duration::from_secs(3_600));
    let worker = Working::start(builder);
    let id = create(&client, NewJob::new("t").payload(&20_000).unwrap()).await;
    let (job, history) = until_it_ends(&client, &id).await;
    assert_eq!((job.stage.as_deref(), job.progress), (Some("round 19999"), Some(99)));
    assert!((3..=4).contains(&history.len()), "one report at the most beside the last: {history:#?}");
    assert_eq!(history.last().unwrap().message, "that was it");
    worker.stop().await;
    server.stop().await;
}

async fn a_handler_that_ignores_cancellation_is_dropped_and_the_job_canceled(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let started = Arc::new(Notify::new());
    let handler = {
        let started = Arc::clone(&started);
        move |context: Context, how: String| {
            let started = Arc::clone(&started);
            async move {
                started.notify_one();
                match how.as_str() {
                    "ignores" => pending().await,
                    "returns" => context.canceled().await,
                    _ => {
                        context.canceled().await;
                        return Err(Error::new("half way").code("STOPPED"));
                    }
                }
                Ok(7)
            }
        }
    };
    // Heartbeats tell workers of the request: often, for a short lease. One worker doesn't wait for handlers, the other does.
    let worker = |job_type: &str, grace| {
        let builder = Worker::builder(client.clone()).handle(job_type, handler.clone()).concurrency(1);
        Working::start(builder.lease(Duration::from_secs(2)).cancel_grace(grace))
    };
    let workers = [worker("hasty", Duration::from_millis(100)), worker("patient", PATIENCE)];
    let cases = [
        ("hasty", "ignores", ""),
        ("patient", "returns", ""),
        ("patient", "fails", "STOPPED"),
        ("hasty", "ignores", ""),
    ];
    for (job_type, how, code) in cases {
        let id = create(&client, NewJob::new(job_type).payload(how).unwrap().max_attempts(3)).await;
        timeout(PATIENCE, started.notified()).await.unwrap();
        client.cancel(&id, "enough").await.unwrap();
        let (job, history) = until_it_ends(&client, &id).await;
        assert_eq!((job.status(), job.last_error_code.as_str(), job.result), (JobStatus::Canceled, code, None));
        let expected =
            [JobEventKind::Created, JobEventKind::Claimed, JobEventKind::CancelRequested, JobEventKind::Canceled];
        assert_eq!(kinds(&history), expected, "{how}");
    }
    for worker in workers {
        worker.stop().await;
    }
    server.stop().await;
}

async fn a_handler_that_never_returns_is_dropped_when_its_time_is_over(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let handler = |context: Context, attempts: i32| async move {
        assert!(context.deadline().is_some());
        if context.attempt() < attempts {
            pending().await
        }
        Ok(())
    };
    let builder = Worker::builder(client.clone()).handle("t", handler).concurrency(1);
    let worker = Working::start(builder.lease(Duration::from_secs(1)).cancel_grace(Duration::ZERO));
    let job = NewJob::new("t").payload(&2).unwrap().run_timeout(Duration::from_secs(1)).max_attempts(2);
    let (job, history) = until_it_ends(&client, &create(&client, job).await).await;
    assert_eq!((job.status(), job.last_error_code.as_str()), (JobStatus::Succeeded, "RUN_TIMEOUT"));
    assert_eq!(history.iter().filter(|event| event.kind() == JobEventKind::Claimed).count(), 2);
    worker.stop().await;
    server.stop().await;
}

async fn a_worker_takes_no_more_than_it_has_room_for(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create_all((0..40).map(|_| NewJob::new("t"))).await.unwrap();
    let (running, most, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let ended = Arc::new(AtomicUsize::new(0));
    let handler = {
        let (running, most, done, ended) = (running.clone(), most.clone(), done.clone(), ended.clone());
        move |_: Context, (): ()| {
            let (running, most, done, ended) = (running.clone(), most.clone(), done.clone(), ended.clone());
            async move {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                if ended.fetch_add(1, Ordering::SeqCst) == 39 {
                    done.notify_one();
                }
                Ok(())
            }
        }
    };
    let worker = Working::start(Worker::builder(client.clone()).handle("t", handler).concurrency(3));
    timeout(PATIENCE, done.notified()).await.unwrap();
    worker.stop().await;
    assert_eq!((most.load(Ordering::SeqCst), ended.load(Ordering::SeqCst)), (3, 40));
    assert_eq!(client.statistics(&[]).await.unwrap().counts.unwrap().succeeded, 40);
    server.stop().await;
}

async fn a_worker_that_stops_finishes_what_it_can_and_gives_the_rest_back(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let (started, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
        move |context: Context, how: String| {
            let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
            async move {
                started.notify_one();
                match how.as_str() {
                    "finishes" => go_on.notified().await,
                    "heeds" => {
                        context.canceled().await;
                        return Err(Error::new("interrupted"));
                    }
                    _ => pending().await,
                }
                Ok(())
            }
        }
    };
    let worker =
        Working::start(Worker::builder(client.clone()).handle("t", handler).shutdown_grace(Duration::from_millis(500)));
    let mut jobs = HashMap::new();
    for how in ["finishes", "heeds", "hangs"] {
        jobs.insert(how, create(&client, NewJob::new("t").payload(how).unwrap()).await);
        timeout(PATIENCE, started.notified()).await.unwrap();
    }
    let stopping = tokio::spawn(worker.stop());
    go_on.notify_one();
    timeout(PATIENCE, stopping).await.unwrap().unwrap();
    let late = create(&client, NewJob::new("t")).await;
    for (how, status, attempt) in
        [("finishes", JobStatus::Succeeded, 1), ("heeds", JobStatus::Queued, 1), ("hangs", JobStatus::Queued, 1)]
    {
        let job = client.get(&jobs[how]).await.unwrap();
        assert_eq!((job.status(), job.attempt, job.last_error_code.as_str()), (status, attempt, ""), "{how}");
    }
    assert_eq!(client.get(late).await.unwrap().status(), JobStatus::Queued);
    // Nothing of their budget is used, and another worker gets them at once.
    let leases = client.claim(jobledger_client::Claim::new("w").max_jobs(10)).await.unwrap();
    assert_eq!(leases.len(), 3);
    server.stop().await;
}

async fn a_worker_outlives_its_server(database: Database) {
    let address = fixed_address();
    let program = Program::start_on(&address, &database);
    let client = program.client();
    let (started, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let runs = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let handler = {
        let (started, go_on, runs) = (Arc::clone(&started), Arc::clone(&go_on), Arc::clone(&runs));
        move |context: Context, waits: bool| {
            let (started, go_on, runs) = (Arc::clone(&started), Arc::clone(&go_on), Arc::clone(&runs));
            async move {
                *runs.lock().unwrap().entry(context.job_id().to_owned()).or_default() += 1;
                if waits {
                    started.notify_one();
                    go_on.notified().await;
                }
                Ok(())
            }
        }
    };
    let worker = Working::start(Worker::builder(client.clone()).handle("t", handler).concurrency(8));
    let mut jobs = vec![create(&client, NewJob::new("t").payload(&true).unwrap()).await];
    timeout(PATIENCE, started.notified()).await.unwrap();
    program.kill();
    // The handler ends while no server runs.
    go_on.notify_one();
    let program = Program::start_on(&address, &database);
    for _ in 0..50 {
        jobs.push(create(&client, NewJob::new("t").payload(&false).unwrap()).await);
    }
    for id in &jobs {
        let (job, history) = until_it_ends(&client, id).await;
        assert_eq!((job.status(), job.attempt), (JobStatus::Succeeded, 1));
        assert_eq!(history.len(), 3, "{history:#?}");
    }
    worker.stop().await;
    assert!(runs.lock().unwrap().values().all(|runs| *runs == 1));
    assert!(program.end_by("TERM").success());
    verify(&database, &HashMap::new()).await;
}

async fn a_hundred_slots_do_not_make_a_hundred_calls(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create_all((0..1_000).map(|_| NewJob::new("t"))).await.unwrap();
    let worker = Working::start(
        Worker::builder(client.clone()).handle("t", |_: Context, (): ()| async { Ok(()) }).concurrency(100),
    );
    let mut events = client.subscribe(Follow::org().after(0).statuses([JobStatus::Succeeded])).await.unwrap();
    let mut batches = std::collections::BTreeSet::new();
    let all = async {
        let mut seen = 0;
        while seen < 1_000 {
            if let Item::Event(event) = events.next().await.unwrap().unwrap() {
                seen += 1;
                // Events that were committed together have the same time.
                let at = event.recorded_at.unwrap();
                batches.insert((at.seconds, at.nanos));
            }
        }
    };
    timeout(PATIENCE, all).await.unwrap();
    worker.stop().await;
    assert!(batches.len() <= 250, "1,000 jobs were completed in {} batches", batches.len());
    server.stop().await;
}

/// A heartbeat has room for so many of the longest messages; the others go with the next one.
async fn many_long_messages_cost_no_lease(database: Database) {
    const JOBS: usize = 100;
    let (server, client) = TestServer::on(&database).await;
    let (running, all_told) = (Arc::new(Barrier::new(JOBS)), Arc::new(Semaphore::new(0)));
    let told = Arc::clone(&all_told);
    let handler = move |context: Context, (): ()| {
        let (running, told) = (Arc::clone(&running), Arc::clone(&told));
        async move {
            running.wait().await;
            context.message("x".repeat(4_096));
            told.acquire().await.unwrap().forget();
            Ok(())
        }
    };
    let worker = Worker::builder(client.clone()).handle("t", handler).concurrency(JOBS).lease(Duration::from_secs(3));
    let worker = Working::start(worker);
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    client.create_all((0..JOBS).map(|_| NewJob::new("t"))).await.unwrap();
    let until = async |events: &mut Subscription, wanted: JobEventKind| {
        let mut seen = 0;
        while seen < JOBS {
            if let Item::Event(event) = events.next().await.unwrap().unwrap() {
                assert_ne!(event.kind(), JobEventKind::Lost, "a lease is lost");
                seen += usize::from(
                    event.kind() == wanted && (wanted != JobEventKind::Progress || event.message.len() == 4_096),
                );
            }
        }
    };
    timeout(PATIENCE, until(&mut events, JobEventKind::Progress)).await.expect("all messages are told");
    all_told.add_permits(JOBS);
    timeout(PATIENCE, until(&mut events, JobEventKind::Succeeded)).await.expect("all jobs end");
    worker.stop().await;
    server.stop().await;
}
