//! Restarts of workers, lapses of their tokens and failures of servers cost no job.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jobledger_client::{
    Client, Error, Follow, Item, Job, JobEventKind, JobStatus, ListJobsRequest, NewJob, Token,
    worker::{Context, Error as Failure, Worker},
};
use jobledger_server::domain::access::Role;
use serde_json::json;
use tokio::{
    sync::{Notify, Semaphore, oneshot},
    time::{Instant, sleep_until, timeout},
};
use uuid::Uuid;

use crate::{
    callers::access::{guarded, token},
    program::example::example,
    support::harness::{Database, PATIENCE, TestServer, await_kind, fixed_address, on_both_databases, short_or_long},
    support::program::Program,
};

on_both_databases! {
    a_rolling_deploy_fails_no_job_and_counts_what_was_lost,
    a_handler_that_never_awaits_keeps_its_job,
    a_worker_whose_credential_is_refused_ends_at_once,
    a_result_outlives_a_lapse_of_the_token,
    a_server_that_dies_or_stands_still_costs_no_lease_while_another_lives,
    a_worker_says_what_it_does_and_what_goes_wrong,
}

/// The worker of the examples in its own process. Killed when dropped.
struct Counter(Child);

impl Counter {
    fn start(endpoint: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(example("worker"));
        command.args(["--server", endpoint]).args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        Self(command.spawn().expect("the worker starts"))
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn count(to: u32, every_ms: u64) -> NewJob {
    NewJob::new("count").payload(&json!({"to": to, "every_ms": every_ms})).expect("it has a JSON form")
}

async fn all_jobs(client: &Client) -> Vec<Job> {
    let (mut jobs, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = ListJobsRequest { page_size: 1_000, page_token, ..Default::default() };
        let page = client.list(page).await.unwrap();
        jobs.extend(page.jobs);
        if page.next_page_token.is_empty() {
            return jobs;
        }
        page_token = page.next_page_token;
    }
}

async fn a_rolling_deploy_fails_no_job_and_counts_what_was_lost(database: Database) {
    let jobs = short_or_long(2_000, 10_000);
    let program = Program::start(&database);
    let client = program.client();
    for _ in 0..jobs / 500 {
        // One attempt each: a stop or a kill of a worker must never use it up.
        client.create_all((0..500).map(|_| count(3, 20).max_attempts(1))).await.unwrap();
    }
    let endpoint = format!("http://{}", program.address);
    let start = || {
        let mut counter = Counter::start(&endpoint, &["--concurrency", "4", "--lease", "1"]);
        // Until it logs this, a worker does not handle signals and has no job.
        let has_started = Arc::new(AtomicBool::new(false));
        let (said, started) = (BufReader::new(counter.0.stderr.take().unwrap()), Arc::clone(&has_started));
        std::thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                started.fetch_or(line.contains("worker started"), Ordering::Relaxed);
            }
        });
        (counter, has_started)
    };
    let mut workers: Vec<_> = (0..10).map(|_| start()).collect();
    let mut events = client.subscribe(Follow::org().after(0).statuses([JobStatus::Succeeded])).await.unwrap();
    let (mut done, mut ended, mut killed, mut next) = (0, 0, 0, Instant::now());
    let mut leaving = tokio::task::JoinSet::new();
    let all = async {
        while done < jobs {
            tokio::select! {
                item = events.next() => done += usize::from(matches!(item.unwrap().unwrap(), Item::Event(_))),
                () = sleep_until(next) => {
                    next = Instant::now() + Duration::from_millis(200);
                    let n = (ended + killed) % workers.len();
                    if !workers[n].1.load(Ordering::Relaxed) {
                        continue;
                    }
                    let (mut old, _) = std::mem::replace(&mut workers[n], start());
                    if (ended + killed) % 2 == 0 {
                        old.signal("TERM");
                        leaving.spawn_blocking(move || old.0.wait().expect("it ends"));
                        ended += 1;
                    } else {
                        drop(old);
                        killed += 1;
                    }
                }
            }
        }
    };
    timeout(short_or_long(3 * PATIENCE, 20 * PATIENCE), all).await.expect("every job ends");
    while let Some(left) = leaving.join_next().await {
        assert!(left.unwrap().success(), "told to end, a worker ends well");
    }
    workers.clear();

    let statistics = client.statistics(&[]).await.unwrap();
    let (counts, happened) = (statistics.counts.unwrap(), statistics.happened.unwrap());
    assert_eq!((counts.succeeded, counts.failed, counts.dead_letter), (jobs as i64, 0, 0));
    assert_eq!((happened.succeeded, happened.failed), (jobs as i64, 0));
    let listed = all_jobs(&client).await;
    assert!(listed.iter().all(|job| job.failures == 0 && job.status() == JobStatus::Succeeded));
    let of_jobs: i32 = listed.iter().map(|job| job.lost_attempts).sum();
    let mut history = client.subscribe(Follow::org().after(0).history_only()).await.unwrap();
    let mut kinds: HashMap<JobEventKind, i64> = HashMap::new();
    while let Some(item) = history.next().await {
        if let Item::Event(event) = item.unwrap() {
            *kinds.entry(event.kind()).or_default() += 1;
        }
    }
    let lost = kinds.get(&JobEventKind::Lost).copied().unwrap_or_default();
    assert_eq!((lost, i64::from(of_jobs)), (happened.lost, happened.lost), "events, list and statistics agree");
    assert!(killed > 0 && lost > 0, "{killed} workers were killed, and held jobs");
    let given_back = kinds.get(&JobEventKind::Released).copied().unwrap_or_default();
    assert_eq!(happened.started, jobs as i64 + lost + given_back);
    println!(
        "{jobs} jobs: {ended} workers ended by SIGTERM, {killed} by kill -9; {lost} attempts lost, {given_back} given back"
    );
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

async fn a_handler_that_never_awaits_keeps_its_job(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    client.create_all((0..4).map(|_| NewJob::new("spin"))).await.unwrap();
    let lease = Duration::from_secs(2);
    let endpoint = format!("http://{}", program.address);
    let (stop, stopped) = oneshot::channel::<()>();
    // A runtime of two threads, each blocked by a handler.
    let working = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let handler = move |context: Context, (): ()| async move {
                let began = std::time::Instant::now();
                while began.elapsed() < 3 * lease {
                    context.progress((began.elapsed().as_millis() * 100 / (3 * lease).as_millis()).min(100) as u8);
                }
                Ok::<_, Failure>(())
            };
            let worker = Worker::builder(Client::new(endpoint).unwrap()).handle("spin", handler).concurrency(2);
            worker.lease(lease).build().unwrap().run(async { drop(stopped.await) }).await.unwrap();
        });
    });
    let done = async {
        let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
        let mut succeeded = 0;
        while succeeded < 4 {
            let item = events.next().await.expect("it is live").unwrap();
            succeeded += usize::from(matches!(item, Item::Event(event) if event.kind() == JobEventKind::Succeeded));
        }
    };
    timeout(PATIENCE, done).await.expect("they are worked on");
    let happened = client.statistics(&[]).await.unwrap().happened.unwrap();
    assert_eq!((happened.started, happened.lost, happened.failed), (4, 0, 0));
    drop(stop);
    tokio::task::spawn_blocking(|| working.join().unwrap()).await.unwrap();
    assert!(program.end_by("TERM").success());
}

async fn a_worker_whose_credential_is_refused_ends_at_once(database: Database) {
    let org = Uuid::from_u128(7);
    let producer = token(&database, Some(org), Role::Producer).await;
    let server = TestServer::start(guarded(&database)).await;
    for (text, is_known) in [(producer, true), ("jl_nobody".to_owned(), false)] {
        let client = Client::builder(server.endpoint()).token(Token::new(&text).unwrap()).build().unwrap();
        let worker = Worker::builder(client).handle("t", |_: Context, (): ()| async { Ok::<_, Failure>(()) });
        let ended = timeout(Duration::from_secs(10), worker.build().unwrap().run(std::future::pending())).await;
        let error = ended.expect("it ends by itself").unwrap_err();
        match error {
            Error::PermissionDenied { .. } if is_known => {}
            Error::Unauthenticated { .. } if !is_known => {}
            other => panic!("{other}"),
        }
    }
    server.stop().await;
}

async fn a_result_outlives_a_lapse_of_the_token(database: Database) {
    let org = Uuid::from_u128(7);
    let admin = token(&database, Some(org), Role::Admin).await;
    let server = TestServer::start(guarded(&database)).await;
    let client =
        Client::builder(server.endpoint()).token(Token::new(&admin).unwrap()).timeout(PATIENCE).build().unwrap();
    let shared = Token::new(&admin).unwrap();
    let of_worker = Client::builder(server.endpoint()).token(shared.clone()).build().unwrap();
    let (started, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
        move |_: Context, (): ()| {
            let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
            async move {
                started.notify_one();
                go_on.notified().await;
                Ok::<_, Failure>("worth keeping")
            }
        }
    };
    let worker = Worker::builder(of_worker).handle("t", handler).lease(Duration::from_secs(20)).concurrency(2);
    let (stop, stopped) = oneshot::channel::<()>();
    let working = tokio::spawn(worker.build().unwrap().run(async { drop(stopped.await) }));
    let job = client.create(NewJob::new("t")).await.unwrap().job.id;
    timeout(PATIENCE, started.notified()).await.unwrap();
    shared.replace("jl_lapsed").unwrap();
    go_on.notify_one();
    // The worker's report is refused until the token is back. Meanwhile another client completes a job.
    let other = client.create(NewJob::new("other")).await.unwrap().job.id;
    let lease = client.claim(jobledger_client::Claim::new("v").types(["other"])).await.unwrap().remove(0);
    sleep_until(Instant::now() + Duration::from_millis(1_500)).await;
    client.update(jobledger_client::Report::succeeded(&other).lease(lease.lease_token)).await.unwrap();
    assert_eq!(client.get(&job).await.unwrap().status(), JobStatus::Running);
    shared.replace(&admin).unwrap();
    let done = timeout(PATIENCE, client.wait_for(&job)).await.unwrap().unwrap();
    assert_eq!((done.status(), done.attempt, done.lost_attempts), (JobStatus::Succeeded, 1, 0));
    assert_eq!(jobledger_client::from_value::<String>(done.result.as_ref()).unwrap(), "worth keeping");
    drop(stop);
    timeout(PATIENCE, working).await.unwrap().unwrap().unwrap();
    server.stop().await;
}

async fn a_server_that_dies_or_stands_still_costs_no_lease_while_another_lives(database: Database) {
    // SQLite has one server, so the other endpoint never answers.
    let others = if database.is_postgres() { 2 } else { 0 };
    let mut programs: Vec<_> = (0..others).map(|_| Some(Program::start(&database))).collect();
    let last = Program::start(&database);
    let mut endpoints: Vec<_> =
        programs.iter().flatten().map(|program| format!("http://{}", program.address)).collect();
    if endpoints.is_empty() {
        endpoints.push(format!("http://{}", fixed_address()));
    }
    endpoints.push(format!("http://{}", last.address));
    let client = last.client();
    let (started, go_on) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let handler = {
        let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
        move |_: Context, (): ()| {
            let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
            async move {
                started.add_permits(1);
                go_on.acquire().await.unwrap().forget();
                Ok::<_, Failure>(())
            }
        }
    };
    let worker = Worker::builder(Client::builder(endpoints).build().unwrap()).handle("t", handler).concurrency(4);
    let (stop, stopped) = oneshot::channel::<()>();
    let worker = worker.lease(Duration::from_secs(6)).build().unwrap();
    let working = tokio::spawn(worker.run(async { drop(stopped.await) }));
    for n in 0..=programs.len() {
        client.create_all((0..4).map(|_| NewJob::new("t"))).await.unwrap();
        timeout(PATIENCE, started.acquire_many(4)).await.expect("they are claimed").unwrap().forget();
        // The server that the worker calls: first it is killed, then another one is suspended.
        match programs.get_mut(n).map(Option::take) {
            Some(Some(program)) if n == 0 => program.kill(),
            Some(Some(program)) => {
                program.signal("STOP");
                programs[n] = Some(program);
                // Longer than a lease, which the worker extends at another server meanwhile.
                sleep_until(Instant::now() + Duration::from_secs(7)).await;
            }
            Some(None) | None => {}
        }
        go_on.add_permits(4);
        let done = async {
            while client.statistics(&[]).await.unwrap().counts.unwrap().succeeded < 4 * (n as i64 + 1) {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, done).await.expect("their results are heard of");
    }
    let happened = client.statistics(&[]).await.unwrap().happened.unwrap();
    assert_eq!((happened.lost, happened.failed, happened.started), (0, 0, 4 * (programs.len() as i64 + 1)));
    drop(stop);
    timeout(PATIENCE, working).await.unwrap().unwrap().unwrap();
    drop(programs);
    assert!(last.end_by("TERM").success());
}

async fn a_worker_says_what_it_does_and_what_goes_wrong(database: Database) {
    let address = fixed_address();
    let program = Program::start_on(&address, &database);
    let client = program.client();
    let mut worker = Counter::start(&format!("http://{address}"), &[]);
    let said = Arc::new(Mutex::new(String::new()));
    let mut lines = BufReader::new(worker.0.stderr.take().unwrap());
    let mut until = |words: &[&str]| {
        let mut said = said.lock().unwrap();
        said.clear();
        loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended, and said {said}");
            *said += &line;
            if words.iter().all(|word| line.contains(word)) {
                return;
            }
        }
    };
    until(&["worker started", "count", &address]);
    let id = client.create(NewJob::new("count").payload("no number").unwrap()).await.unwrap().job.id;
    await_kind(&client, &id, JobEventKind::Failed).await;
    until(&["an attempt failed", &id, "INVALID_PAYLOAD", "failures=1"]);
    let since = Instant::now();
    program.kill();
    until(&["no answer", &address]);
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    let program = Program::start_on(&address, &database);
    until(&["connected again"]);
    worker.signal("TERM");
    until(&["stopped claiming"]);
    until(&["worker stopped"]);
    assert!(worker.0.wait().unwrap().success());
    assert!(program.end_by("TERM").success());
}
