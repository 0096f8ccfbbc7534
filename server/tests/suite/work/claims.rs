//! Claims over the wire: which job a claim gets, and how claims wait.

use std::{collections::HashSet, sync::Arc, time::Duration};

use chrono::TimeDelta;
use jobledger_client::{
    Claim, Client, Error, JobStatus, Lease, NewJob, Report, RetryPolicy, prost_types, proto::ClaimJobsRequest,
};
use jobledger_server::{
    domain::{
        clock::{Clock as _, SystemClock},
        id::OrgId,
    },
    ledger::{self, Limits},
    store::Store,
};
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    faults::link::{Fault, Link, Peer},
    stores::ledger as lanes,
    support::breaking::Breaking,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::program::Program,
    support::raw::{DATA, END_STREAM, Raw, WINDOW_UPDATE, frame},
};

on_both_databases! {
    jobs_are_claimed_by_priority_and_then_by_how_long_they_are_ready,
    of_many_claimers_each_job_goes_to_one,
    the_same_claim_again_gets_the_same_leases,
    a_claim_that_comes_again_takes_the_place_of_the_one_before,
    a_claim_looks_once_more_for_what_the_one_before_has_taken_elsewhere,
    of_jobs_claimed_by_calls_that_are_cut_off_none_fails,
    whatever_makes_a_job_ready_ends_a_wait,
    an_answer_is_cut_by_bytes,
    a_claim_that_waits_for_nothing_ends_empty,
    a_caller_that_goes_away_has_claimed_nothing,
    what_was_claimed_for_a_caller_that_had_gone_is_given_back_at_once,
    what_a_claim_that_came_again_has_taken_is_given_back_too,
    a_caller_that_has_room_for_no_more_than_a_byte_has_taken_nothing,
    a_thousand_claims_that_wait_ask_nothing_and_one_job_wakes_one,
    a_stop_sends_claims_that_wait_away,
}

fn ids(leases: &[Lease]) -> Vec<String> {
    leases.iter().map(|lease| lease.job.as_ref().unwrap().id.clone()).collect()
}

async fn create(client: &Client, job: NewJob) -> String {
    client.create(job).await.unwrap().job.id
}

/// A claim that waits as long as a claim may.
fn waiting(worker: &str) -> Claim {
    Claim::new(worker).wait(Duration::from_secs(60))
}

async fn jobs_are_claimed_by_priority_and_then_by_how_long_they_are_ready(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let first = create(&client, NewJob::new("a").payload(&json!({"n": 1})).unwrap()).await;
    let urgent = create(&client, NewJob::new("b").priority(9)).await;
    let later =
        create(&client, NewJob::new("a").priority(999).scheduled_at(SystemClock.now() + TimeDelta::hours(1))).await;
    let low = create(&client, NewJob::new("a").priority(-1)).await;
    let second = create(&client, NewJob::new("b")).await;

    let only_a = client.claim(Claim::new("w").types(["a", "none"]).max_jobs(1)).await.unwrap();
    assert_eq!(ids(&only_a), [first.as_str()]);
    let job = only_a[0].job.as_ref().unwrap();
    assert_eq!((job.status(), job.attempt, job.worker_id.as_str()), (JobStatus::Running, 1, "w"));
    assert_eq!(jobledger_client::from_value::<serde_json::Value>(job.payload.as_ref()).unwrap(), json!({"n": 1}));
    assert_eq!(job.lease_expires_at, only_a[0].expires_at);
    let rest = client.claim(Claim::new("v").max_jobs(100)).await.unwrap();
    assert_eq!(ids(&rest), [urgent, second, low]);
    assert!(client.claim(Claim::new("v").max_jobs(100)).await.unwrap().is_empty());

    // A job that is given back keeps its ready time, and so its position in claim order.
    let token = &only_a[0].lease_token;
    client.update(Report::released(&first).lease(token)).await.unwrap();
    let again = client.claim(Claim::new("w")).await.unwrap();
    assert_eq!(ids(&again), [first]);
    assert_ne!(again[0].lease_token, *token);
    assert_eq!(again[0].job.as_ref().unwrap().attempt, 2);
    assert_eq!(client.get(later).await.unwrap().status(), JobStatus::Queued);
    server.stop().await;
}

async fn of_many_claimers_each_job_goes_to_one(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create_all((0..500).map(|n| NewJob::new(format!("t{}", n % 3)))).await.unwrap();
    let mut claimers = JoinSet::new();
    for n in 0..16 {
        let client = client.clone();
        claimers.spawn(async move {
            let mut mine = Vec::new();
            loop {
                let types: &[&str] = if n % 2 == 0 { &[] } else { &["t0", "t1", "t2"] };
                let claim = Claim::new(format!("w{n}")).max_jobs(1 + n % 7).types(types.iter().copied());
                let leases = client.claim(claim).await.unwrap();
                assert!(leases.len() <= 1 + n as usize % 7, "no more than were asked for");
                if leases.is_empty() {
                    return mine;
                }
                mine.extend(ids(&leases));
            }
        });
    }
    let claimed = claimers.join_all().await.concat();
    assert_eq!(claimed.len(), 500);
    assert_eq!(claimed.into_iter().collect::<HashSet<_>>().len(), 500);
    server.stop().await;
}

async fn the_same_claim_again_gets_the_same_leases(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for _ in 0..5 {
        create(&client, NewJob::new("t")).await;
    }
    let claim = Claim::new("w").max_jobs(2).request_id("r");
    let first = client.claim(claim.clone()).await.unwrap();
    let again = client.claim(claim.clone()).await.unwrap();
    let tokens = |leases: &[Lease]| leases.iter().map(|lease| lease.lease_token.clone()).collect::<HashSet<_>>();
    assert_eq!((first.len(), tokens(&again)), (2, tokens(&first)));
    // As long as one of the leases lives, the repeated claim gets that one.
    let [ended, held] = &first[..] else { panic!("two leases") };
    client.update(Report::succeeded(&ended.job.as_ref().unwrap().id).lease(&ended.lease_token)).await.unwrap();
    assert_eq!(tokens(&client.claim(claim.clone()).await.unwrap()), HashSet::from([held.lease_token.clone()]));
    client.update(Report::succeeded(&held.job.as_ref().unwrap().id).lease(&held.lease_token)).await.unwrap();
    let fresh = client.claim(claim).await.unwrap();
    assert!(fresh.len() == 2 && tokens(&fresh).is_disjoint(&tokens(&first)));
    server.stop().await;
}

async fn a_claim_that_comes_again_takes_the_place_of_the_one_before(database: Database) {
    let program = Program::start(&database);
    let link = Link::to(Peer::Tcp(program.address.clone())).await;
    let behind = Client::builder(format!("http://{}", link.address)).timeout(PATIENCE).build().unwrap();
    let client = program.client();
    behind.statistics(&[]).await.unwrap();
    let claim = || Claim::new("w").wait(Duration::from_secs(60)).request_id("r");
    let request: ClaimJobsRequest = claim().into();
    let older = tokio::spawn({
        let mut service = behind.raw();
        async move { service.claim_jobs(request).await }
    });
    // The server takes calls on one connection in order, so the older claim waits by now.
    behind.statistics(&[]).await.unwrap();
    // The older claim's caller is gone, and the server gets no sign of it.
    link.set(Fault::BlackHole);
    let newer = tokio::spawn(async move { client.claim(claim()).await });
    let other = program.client();
    // A claim that came after the newer one was answered, so the newer one waits, too.
    assert!(other.claim(Claim::new("v").types(["none"])).await.unwrap().is_empty());
    let job = create(&other, NewJob::new("t")).await;
    let leases = timeout(Duration::from_secs(20), newer).await.expect("it is woken").unwrap().unwrap();
    assert_eq!(ids(&leases), [job.as_str()]);
    let token = &leases[0].lease_token;
    other.update(Report::succeeded(&job).lease(token)).await.unwrap();
    assert_eq!(other.get(&job).await.unwrap().attempt, 1, "nobody else had it");
    older.abort();
    assert!(program.end_by("TERM").success());
}

async fn a_claim_looks_once_more_for_what_the_one_before_has_taken_elsewhere(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    // On PostgreSQL the later claim goes to another server, which has no knowledge of the earlier one.
    let other = if database.is_postgres() { Some(TestServer::start(database.config()).await) } else { None };
    let elsewhere = other.as_ref().map_or_else(|| client.clone(), TestServer::client);
    client.statistics(&[]).await.unwrap();
    let claim = |seconds| Claim::new("w").wait(Duration::from_secs(seconds)).request_id("r").types(["t"]);
    let request: ClaimJobsRequest = claim(60).into();
    let mut service = client.raw();
    let earlier = tokio::spawn(async move { service.claim_jobs(request).await });
    client.statistics(&[]).await.unwrap();
    let later = tokio::spawn(async move { elsewhere.claim(claim(3)).await });
    let job = create(&client, NewJob::new("t")).await;
    let leases = timeout(PATIENCE, later).await.unwrap().unwrap().unwrap();
    assert_eq!(ids(&leases), [job.as_str()], "whoever took it, the later call has it");
    client.update(Report::succeeded(&job).lease(&leases[0].lease_token)).await.unwrap();
    earlier.abort();
    if let Some(other) = other {
        other.stop().await;
    }
    server.stop().await;
}

async fn of_jobs_claimed_by_calls_that_are_cut_off_none_fails(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    let soon = RetryPolicy {
        initial_backoff: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
        ..RetryPolicy::default()
    };
    client.create_all((0..600).map(|_| NewJob::new("t").retry_policy(soon))).await.unwrap();
    // Callers without a `request_id` that wait only for milliseconds, so most answers reach nobody.
    let mut cut_off = JoinSet::new();
    for n in 0..8u64 {
        let mut service = program.client().raw();
        cut_off.spawn(async move {
            let lease = Some(prost_types::Duration { seconds: 1, nanos: 0 });
            let claim = ClaimJobsRequest {
                worker_id: "gone".to_owned(),
                max_jobs: 5,
                lease_duration: lease,
                ..Default::default()
            };
            for round in 0..40 {
                let patience = Duration::from_millis(2 + (n * 40 + round) * 7 % 49);
                drop(timeout(patience, service.claim_jobs(claim.clone())).await);
            }
        });
    }
    cut_off.join_all().await;
    let mut done = HashSet::new();
    let all = async {
        while done.len() < 600 {
            let claim = Claim::new("w").max_jobs(100).wait(Duration::from_secs(10));
            for lease in client.claim(claim).await.unwrap() {
                let id = lease.job.unwrap().id;
                client.update(Report::succeeded(&id).lease(&lease.lease_token)).await.unwrap();
                done.insert(id);
            }
        }
    };
    timeout(PATIENCE, all).await.unwrap();
    let statistics = client.statistics(&[]).await.unwrap();
    let (counts, happened) = (statistics.counts.unwrap(), statistics.happened.unwrap());
    assert_eq!((counts.succeeded, counts.failed, happened.failed), (600, 0, 0));
    println!("{} attempts were lost, {} given back", happened.lost, happened.started - 600 - happened.lost);
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

async fn whatever_makes_a_job_ready_ends_a_wait(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    // On PostgreSQL the claim waits on another server than the one that gets the calls.
    let other = if database.is_postgres() { Some(TestServer::start(database.config()).await) } else { None };
    let claimer = other.as_ref().map_or_else(|| client.clone(), TestServer::client);
    let wait = || {
        let claimer = claimer.clone();
        tokio::spawn(async move { timeout(PATIENCE, claimer.claim(waiting("w").types(["t"]))).await.unwrap().unwrap() })
    };

    let waiting = wait();
    let job = create(&client, NewJob::new("t").max_attempts(2)).await;
    let leases = waiting.await.unwrap();
    assert_eq!(ids(&leases), [job.as_str()]);

    let waiting = wait();
    client.update(Report::released(&job).lease(&leases[0].lease_token)).await.unwrap();
    let leases = waiting.await.unwrap();

    let waiting = wait();
    let soon = Report::failed(&job, "E", "").retry_after(Duration::from_millis(300)).lease(&leases[0].lease_token);
    client.update(soon).await.unwrap();
    let leases = waiting.await.unwrap();
    assert_eq!(leases[0].job.as_ref().unwrap().attempt, 3);

    let waiting = wait();
    client.update(Report::failed(&job, "E", "").permanent().lease(&leases[0].lease_token)).await.unwrap();
    client.retry(&job).await.unwrap();
    assert_eq!(ids(&waiting.await.unwrap()), [job]);

    let waiting = wait();
    let scheduled =
        create(&client, NewJob::new("t").scheduled_at(SystemClock.now() + TimeDelta::milliseconds(500))).await;
    create(&client, NewJob::new("other")).await;
    let leases = waiting.await.unwrap();
    assert_eq!(ids(&leases), [scheduled.as_str()]);
    let job = client.get(scheduled).await.unwrap();
    let [scheduled_at, started_at] = [job.scheduled_at, job.started_at].map(|time| time.unwrap());
    assert!((started_at.seconds, started_at.nanos) >= (scheduled_at.seconds, scheduled_at.nanos));
    for server in other.into_iter().chain([server]) {
        server.stop().await;
    }
}

async fn an_answer_is_cut_by_bytes(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let large = "x".repeat((1 << 20) - 16);
    for _ in 0..8 {
        create(&client, NewJob::new("t").payload(&large).unwrap()).await;
    }
    let mut claimed = 0;
    for expected in [3, 3, 2, 0] {
        let leases = client.claim(Claim::new("w").max_jobs(100)).await.unwrap();
        assert_eq!(leases.len(), expected);
        claimed += leases.len();
    }
    assert_eq!(claimed, 8);
    server.stop().await;
}

async fn a_claim_that_waits_for_nothing_ends_empty(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let since = Instant::now();
    let wait = Duration::from_millis(300);
    assert!(client.claim(Claim::new("w").wait(wait)).await.unwrap().is_empty());
    assert!(since.elapsed() >= wait);
    server.stop().await;
}

async fn a_caller_that_goes_away_has_claimed_nothing(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    // Connects first, so that the claim is really sent.
    client.statistics(&[]).await.unwrap();
    let gone = timeout(Duration::from_millis(100), client.claim(waiting("gone"))).await;
    assert!(gone.is_err());
    let job = create(&client, NewJob::new("t")).await;
    let leases = timeout(Duration::from_secs(10), client.claim(waiting("w"))).await.unwrap().unwrap();
    assert_eq!(ids(&leases), [job.as_str()]);
    assert_eq!(client.get(job).await.unwrap().attempt, 1, "nobody had it before");
    server.stop().await;
}

fn claim(worker: &str, types: &[&str]) -> ledger::Claim {
    ledger::Claim {
        worker: worker.into(),
        types: types.iter().map(|name| Arc::from(*name)).collect(),
        max_jobs: 1,
        lease: Duration::from_secs(3_600),
        request: Some(worker.into()),
    }
}

async fn what_was_claimed_for_a_caller_that_had_gone_is_given_back_at_once(database: Database) {
    let (store, ledger) = lanes::breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let work = lanes::Work { ledger: &ledger, org };
    let job = work.create().await;
    let lease_of = async || ledger.job(org, job).await.unwrap().0.job.lease.clone();
    for is_repeated in [false, true] {
        let held = store.inner.begin(&[org]).await.unwrap();
        let before = store.begun();
        {
            let mut gone = Box::pin(ledger.claim(org, claim("gone", &[]), Duration::ZERO));
            assert!(lanes::poll_once(&mut gone).is_pending());
            // The batch waits for the head: the claim was taken and will be decided.
            store.has_begun(before + 1).await;
        }
        // This claim is in the next batch, before the command that gives the job back.
        let mut again = Box::pin(ledger.claim(org, claim(if is_repeated { "gone" } else { "w" }, &[]), PATIENCE));
        assert!(lanes::poll_once(&mut again).is_pending());
        drop(held);
        let leases = again.await.unwrap();
        let claimed = &leases.jobs()[0].job;
        if is_repeated {
            assert_eq!((claimed.id, claimed.attempt), (job, 4), "what the first one took");
            leases.deliver();
            // This claim is decided after the give-back, which must have left the job alone.
            assert_eq!(ledger.claim(org, claim("v", &[]), Duration::ZERO).await.unwrap().jobs().len(), 0);
            assert_eq!(&*lease_of().await.unwrap().worker, "gone");
        } else {
            assert_eq!((claimed.id, claimed.attempt), (job, 2));
            // Nobody takes these leases either.
            drop(leases);
            let leases = ledger.claim(org, claim("x", &[]), PATIENCE).await.unwrap();
            assert_eq!(leases.jobs()[0].job.attempt, 3);
            drop(leases);
            let given_back = async { while lease_of().await.is_some() {} };
            timeout(PATIENCE, given_back).await.unwrap();
        }
    }
}

async fn what_a_claim_that_came_again_has_taken_is_given_back_too(database: Database) {
    let (_, ledger) = lanes::breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let job = lanes::Work { ledger: &ledger, org }.create().await;
    let first = ledger.claim(org, claim("w", &[]), Duration::ZERO).await.unwrap();
    let second = ledger.claim(org, claim("w", &[]), Duration::ZERO).await.unwrap();
    assert_eq!(first.jobs()[0].job.lease_token(), second.jobs()[0].job.lease_token());
    // Both answers are lost, the later one first.
    drop(second);
    drop(first);
    let next =
        timeout(PATIENCE, ledger.claim(org, claim("v", &[]), PATIENCE)).await.expect("it is free again").unwrap();
    assert_eq!((next.jobs()[0].job.id, next.jobs()[0].job.attempt), (job, 2));
    next.deliver();
}

async fn a_caller_that_has_room_for_no_more_than_a_byte_has_taken_nothing(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let job = create(&client, NewJob::new("t").payload(&"x".repeat(900_000)).unwrap()).await;
    for room in [1u32, 30_000] {
        let stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
        let mut raw = Raw::without_window(stream).await;
        let request = ClaimJobsRequest { worker_id: "gone".to_owned(), ..Default::default() };
        let stream = raw.call("/jobledger.v1.JobService/ClaimJobs", 0).await.unwrap();
        raw.send(DATA, END_STREAM, stream, &frame(&prost::Message::encode_to_vec(&request))).await.unwrap();
        raw.send(WINDOW_UPDATE, 0, stream, &room.to_be_bytes()).await.unwrap();
        let taken = async { while client.get(&job).await.unwrap().status() != JobStatus::Running {} };
        timeout(PATIENCE, taken).await.expect("it is claimed");
        // The caller receives what its window has room for, and then disconnects.
        let mut came = 0;
        while came < room as usize {
            came += match timeout(PATIENCE, raw.receive()).await.expect("as much comes") {
                Some((DATA, _, _, payload)) => payload.len(),
                Some(_) => 0,
                None => panic!("the connection is open"),
            };
        }
        drop(raw);
        let back = async { while client.get(&job).await.unwrap().status() != JobStatus::Queued {} };
        timeout(PATIENCE, back).await.expect("it is given back");
        assert_eq!(client.get(&job).await.unwrap().lost_attempts, 0);
    }
    server.stop().await;
}

async fn a_thousand_claims_that_wait_ask_nothing_and_one_job_wakes_one(database: Database) {
    let store = Breaking::new(database.open().await, &[]);
    let ledger = lanes::start(&(Arc::clone(&store) as Arc<dyn Store>), Limits::default());
    let org = OrgId::DEFAULT;
    let (found, mut finds) = tokio::sync::mpsc::unbounded_channel();
    let mut claims = JoinSet::new();
    for n in 0..1_000 {
        let (ledger, found) = (ledger.clone(), found.clone());
        claims.spawn(async move {
            let leases = ledger.claim(org, claim(&format!("w{n}"), &["t"]), PATIENCE).await.unwrap();
            found.send(leases.jobs().len()).unwrap();
            leases.deliver();
        });
    }
    // Each claim queries once, many in one batch, and waits.
    let all_wait = async {
        while ledger.waiting_claims() < 1_000 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, all_wait).await.unwrap();
    let work = lanes::Work { ledger: &ledger, org };
    let before = store.looks_for_work();
    for n in 0..5 {
        work.create_of("other").await;
        assert_eq!(store.looks_for_work(), before + n, "nobody wants these");
        work.create_of("t").await;
        assert_eq!(timeout(PATIENCE, finds.recv()).await.unwrap(), Some(1));
        assert_eq!(store.looks_for_work(), before + n + 1, "one was woken, and found it");
    }
    // Many jobs created at once wake as many claims.
    let mut created = JoinSet::new();
    for _ in 0..50 {
        let ledger = ledger.clone();
        created.spawn(async move { lanes::Work { ledger: &ledger, org }.create_of("t").await });
    }
    created.join_all().await;
    for _ in 0..50 {
        assert_eq!(timeout(PATIENCE, finds.recv()).await.unwrap(), Some(1));
    }
    // A claim that is woken and canceled passes the wake on.
    claims.abort_all();
    while claims.join_next().await.is_some() {}
    work.create_of("t").await;
    assert_eq!(ledger.claim(org, claim("last", &["t"]), PATIENCE).await.unwrap().jobs().len(), 1);
}

async fn a_stop_sends_claims_that_wait_away(database: Database) {
    let (mut server, client) = TestServer::on(&database).await;
    client.statistics(&[]).await.unwrap();
    let mut service = client.raw();
    let claim: jobledger_client::proto::ClaimJobsRequest = waiting("w").into();
    let waiting = tokio::spawn(async move { service.claim_jobs(claim).await });
    // The server takes calls on one connection in order: once this job, which the claim can't take, is created, the claim waits.
    create(&client, NewJob::new("t").scheduled_at(SystemClock.now() + TimeDelta::hours(1))).await;
    server.begin_stop();
    let sent_away = timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap().unwrap_err();
    let error = Error::from(sent_away);
    assert!(error.is_unavailable(), "{error}");
    server.stop().await;
}
