//! Workers and servers in their own processes are stopped, suspended or killed. No worker overwrites another's work,
//! and no job stays undone.

use std::{
    collections::{HashMap, HashSet},
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use jobledger_client::{
    Claim, Client, Follow, Item, JobEventKind, JobStatus, NewJob, Report, RetryPolicy,
    worker::{Context, Worker},
};
use serde_json::json;
use tokio::{
    io::copy,
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    program::example::example,
    support::cluster::{Cluster, Durability},
    support::harness::{Database, PATIENCE, TestServer, await_kind, fixed_address, on_both_databases, short_or_long},
    support::program::Program,
    work::crash::verify,
};

on_both_databases! {
    a_worker_that_stood_still_can_not_overwrite_the_next_one,
    a_completion_whose_answer_was_lost_is_one_completion,
    every_job_ends_once_though_workers_are_killed_all_the_time,
    an_outage_of_the_database_costs_no_healthy_worker_its_lease,
}

/// A counting worker in its own process. Killed when dropped.
struct Counter(Child);

impl Counter {
    fn start(endpoint: &str, concurrency: usize, lease: u64) -> Self {
        let (concurrency, lease) = (concurrency.to_string(), lease.to_string());
        let started = Command::new(example("worker"))
            .args(["--server", endpoint, "--concurrency", &concurrency, "--lease", &lease])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        Self(started.expect("the worker starts"))
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
    let soon = RetryPolicy {
        initial_backoff: Some(jobledger_client::prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
        ..RetryPolicy::default()
    };
    let job = NewJob::new("count").payload(&json!({"to": to, "every_ms": every_ms})).expect("it has a JSON form");
    job.max_lost_attempts(100).retry_policy(soon)
}

async fn a_worker_that_stood_still_can_not_overwrite_the_next_one(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut stalled = Counter::start(&server.endpoint(), 1, 1);
    // The job runs for a minute and reports as it goes.
    let job = client.create(count(600, 100)).await.unwrap().job.id;
    await_kind(&client, &job, JobEventKind::Progress).await;
    stalled.signal("STOP");
    await_kind(&client, &job, JobEventKind::Lost).await;
    let claim = Claim::new("next").wait(Duration::from_secs(60)).lease(Duration::from_secs(60));
    let lease = timeout(PATIENCE, client.claim(claim)).await.unwrap().unwrap().remove(0);
    let done = Report::succeeded(&job).lease(&lease.lease_token).result(&"by the next").unwrap();
    let ended = client.update(done).await.unwrap().job;

    stalled.signal("CONT");
    // The worker learns that the lease is lost and drops the job. Then it takes another.
    let other = client.create(count(1, 1)).await.unwrap().job.id;
    await_kind(&client, &other, JobEventKind::Succeeded).await;
    let mut said = String::new();
    let mut lines = BufReader::new(stalled.0.stdout.take().unwrap());
    while !said.contains(&other) {
        assert!(lines.read_line(&mut said).unwrap() > 0, "{said}");
    }
    let job = client.get(&job).await.unwrap();
    assert_eq!((&job.etag, job.status()), (&ended.etag, JobStatus::Succeeded), "nothing was written since");
    assert_eq!(jobledger_client::from_value::<String>(job.result.as_ref()).unwrap(), "by the next");
    drop(stalled);
    server.stop().await;
    verify(&database, &HashMap::new()).await;
}

/// Relays bytes between callers and a server. Sending `false` discards the answers on all connections from then on.
async fn relay(to: String) -> (String, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound socket").to_string();
    let (answers, answering) = watch::channel(true);
    tokio::spawn(async move {
        while let Ok((mut caller, _)) = listener.accept().await {
            let (to, mut answering) = (to.clone(), answering.clone());
            tokio::spawn(async move {
                let Ok(mut server) = TcpStream::connect(to).await else { return };
                let ((mut from_caller, mut to_caller), (mut from_server, mut to_server)) =
                    (caller.split(), server.split());
                let silence = async {
                    // The sender outlives the test, so this is never an error.
                    let _ = answering.wait_for(|answers| !answers).await;
                };
                let answer = async {
                    tokio::select! {
                        biased;
                        () = silence => {}
                        _ = copy(&mut from_server, &mut to_caller) => return,
                    }
                    let _ = copy(&mut from_server, &mut tokio::io::sink()).await;
                };
                tokio::select! {
                    _ = copy(&mut from_caller, &mut to_server) => {}
                    () = answer => {}
                }
            });
        }
    });
    (address, answers)
}

async fn a_completion_whose_answer_was_lost_is_one_completion(database: Database) {
    let address = fixed_address();
    let program = Program::start_on(&address, &database);
    let direct = program.client();
    let (relay_address, answers) = relay(address.clone()).await;
    let client = Client::builder(format!("http://{relay_address}")).timeout(PATIENCE).build().unwrap();
    let job = client.create(NewJob::new("t")).await.unwrap().job.id;
    let lease = client.claim(Claim::new("w").lease(Duration::from_secs(3_600))).await.unwrap().remove(0);

    answers.send_replace(false);
    let done = Report::succeeded(&job).lease(&lease.lease_token);
    let completing = tokio::spawn({
        let (client, done) = (client.clone(), done.clone());
        async move { client.update(done).await }
    });
    await_kind(&direct, &job, JobEventKind::Succeeded).await;
    assert!(!completing.is_finished(), "nobody told it");
    program.kill();
    answers.send_replace(true);
    let program = Program::start_on(&address, &database);
    let completed = timeout(PATIENCE, completing).await.unwrap().unwrap().unwrap().job;
    assert_eq!((completed.status(), completed.last_seq), (JobStatus::Succeeded, 3));
    assert_eq!(client.update(done).await.unwrap().job.etag, completed.etag);
    let other = Report::failed(&job, "E", "").lease(&lease.lease_token);
    assert!(matches!(client.update(other).await, Err(jobledger_client::Error::LeaseLost)));
    assert!(program.end_by("TERM").success());
    assert_eq!(verify(&database, &HashMap::new()).await.len(), 3);
}

async fn every_job_ends_once_though_workers_are_killed_all_the_time(database: Database) {
    let jobs = short_or_long(600, 10_000);
    let claimers = short_or_long(6, 16);
    let servers: Vec<_> = (0..if database.is_postgres() { 3 } else { 1 }).map(|_| Program::start(&database)).collect();
    let client = servers[0].client();
    let mut created = HashSet::new();
    for _ in 0..jobs / 200 {
        let batch = client.create_all((0..200).map(|_| count(1, 20))).await.unwrap();
        created.extend(batch.into_iter().map(|created| created.unwrap().job.id));
    }
    assert_eq!(created.len(), jobs);
    let start = |n: usize| Counter::start(&format!("http://{}", servers[n % servers.len()].address), 4, 1);
    let mut workers: Vec<_> = (0..claimers).map(start).collect();
    let mut events = client.subscribe(Follow::org().after(0).statuses([JobStatus::Succeeded])).await.unwrap();
    let mut kills = 0;
    let mut next_kill = Instant::now();
    let mut accepted = HashSet::new();
    let all = async {
        while accepted.len() < jobs {
            tokio::select! {
                item = events.next() => if let Item::Event(event) = item.unwrap().unwrap() {
                    assert!(accepted.insert(event.job_id), "accepted once");
                },
                () = sleep_until(next_kill) => {
                    next_kill = Instant::now() + Duration::from_millis(300);
                    // Derived from the state: which worker is killed does not matter.
                    let victim = (accepted.len() * 7 + kills * 13) % claimers;
                    workers[victim] = start(victim + kills);
                    kills += 1;
                }
            }
        }
    };
    timeout(short_or_long(PATIENCE, 10 * PATIENCE), all).await.expect("every job ends");
    assert_eq!(accepted, created);
    workers.clear();
    let counts = client.statistics(&[]).await.unwrap().counts.unwrap();
    assert_eq!((counts.succeeded, counts.running, counts.queued), (jobs as i64, 0, 0));
    for server in servers {
        assert!(server.end_by("TERM").success());
    }
    let history = verify(&database, &HashMap::new()).await;
    let lost = history.iter().filter(|event| event.kind.as_str() == "lost").count();
    println!("{jobs} jobs ended once each, with {kills} kills and {lost} attempts lost");
}

async fn an_outage_of_the_database_costs_no_healthy_worker_its_lease(database: Database) {
    let [lease, outage] = short_or_long([9, 13], [30, 60]).map(Duration::from_secs);
    let cluster: Option<&'static Cluster> =
        if database.is_postgres() { Some(Box::leak(Box::new(Cluster::alone(Durability::Full).await))) } else { None };
    let database = match cluster {
        Some(cluster) => Database::postgres_on(cluster).await,
        None => database,
    };
    let (server, client) = TestServer::on(&database).await;
    let (running, mut most) = watch::channel(0usize);
    let running = Arc::new(running);
    let handler = {
        let running = Arc::clone(&running);
        move |context: Context, ms: u64| {
            let running = Arc::clone(&running);
            async move {
                running.send_modify(|running| *running += 1);
                context.progress(10);
                tokio::time::sleep(Duration::from_millis(ms)).await;
                Ok(())
            }
        }
    };
    let worker = Worker::builder(client.clone()).handle("t", handler).concurrency(40).lease(lease).build().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let working = tokio::spawn(worker.run(async {
        let _ = stopped.await;
    }));
    // Some jobs last longer than the outage, some end during it, some begin after it.
    let long = (lease + outage).as_millis() as u64;
    let works: Vec<u64> = (0..20).map(|n| long + n * 50).chain((0..200).map(|n| 20 + n * 10)).collect();
    let mut ids = Vec::new();
    for created in client.create_all(works.iter().map(|ms| NewJob::new("t").payload(ms).unwrap())).await.unwrap() {
        ids.push(created.unwrap().job.id);
    }
    timeout(PATIENCE, most.wait_for(|running| *running >= 60)).await.unwrap().unwrap();

    let over = Instant::now() + outage;
    match cluster {
        Some(cluster) => {
            cluster.kill();
            sleep_until(over).await;
            cluster.start_again();
        }
        None => {
            let blocked = database.block_writes().await;
            sleep_until(over).await;
            blocked.end().await;
        }
    }
    let mut ends = JoinSet::new();
    for id in ids {
        let client = client.clone();
        ends.spawn(async move {
            let mut events = client.subscribe(Follow::job(&id)).await.unwrap();
            while let Some(item) = events.next().await {
                item.unwrap();
            }
            client.get(&id).await.unwrap()
        });
    }
    for job in timeout(3 * PATIENCE, ends.join_all()).await.expect("all end") {
        assert_eq!((job.status(), job.attempt, job.last_error_code.as_str()), (JobStatus::Succeeded, 1, ""), "{job:?}");
    }
    drop(stop);
    timeout(PATIENCE, working).await.unwrap().unwrap().unwrap();
    server.stop().await;
    verify(&database, &HashMap::new()).await;
}
