//! Jobs that a server has written and cached, seen over the wire: the server answers as if it had read them.

use std::time::{Duration, SystemTime};

use jobledger_client::{
    Claim, Client, Error, HeartbeatRequest, Job, JobStatus, LeaseHeartbeat, ListJobsRequest, NewJob, Report,
    RetryPolicy,
};
use jobledger_server::{
    Config,
    domain::clock::{Clock as _, SystemClock},
};
use tokio::time::timeout;

use crate::{
    faults::link::{Fault, Link, Peer},
    support::cluster::SERVER,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    work::leases::keep,
};

on_both_databases! {
    what_is_answered_is_what_is_stored,
    what_waits_again_keeps_its_stage,
}

const JOBS: usize = 6;
const STEPS: u64 = 400;

/// All jobs as the database has them, in the order of their creation, without what a list leaves out.
async fn stored(client: &Client) -> Vec<Job> {
    let mut jobs = client.list(ListJobsRequest::default()).await.unwrap().jobs;
    jobs.reverse();
    jobs
}

async fn what_is_answered_is_what_is_stored(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let short = jobledger_client::prost_types::Duration { seconds: 0, nanos: 1_000_000 };
    let policy = RetryPolicy { initial_backoff: Some(short), max_backoff: Some(short), ..RetryPolicy::default() };
    let mut ids = Vec::new();
    for _ in 0..JOBS {
        let job = NewJob::new("t").max_attempts(100).retry_policy(policy).label("team", "red");
        let job = job.priority(ids.len() as i32 % 3);
        ids.push(client.create(job).await.unwrap().job.id);
    }
    let mut tokens = vec![String::new(); JOBS];
    let (mut answered, mut claimed, mut random) = (0, 0, 7_u64);
    for step in 0..STEPS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (n, what) = ((random >> 33) as usize % JOBS, (random >> 43) % 12);
        let (id, token) = (ids[n].clone(), tokens[n].clone());
        let beat = async |beat: LeaseHeartbeat| {
            let beat = LeaseHeartbeat { lease_token: token.clone(), ..beat };
            let extend_by = Some(jobledger_client::prost_types::Duration { seconds: 60 + step as i64, nanos: 0 });
            let request = HeartbeatRequest { worker_id: "w".to_owned(), leases: vec![beat], extend_by };
            client.heartbeat(request).await.map(|_| None)
        };
        let report = async |report: Report| client.update(report.lease(&token)).await.map(|updated| Some(updated.job));
        let answer = match what {
            0..3 => {
                let before = stored(&client).await;
                let is_ready = |job: &&Job| job.status() == JobStatus::Queued && job.scheduled_at.is_none();
                let first = before.iter().filter(is_ready).map(|job| job.priority).max();
                let claim = Claim::new("w").types(["t"]).lease(Duration::from_secs(60));
                let leases = client.claim(claim).await.unwrap();
                assert!(first.is_none() || leases.len() == 1, "step {step}: one is left behind");
                for lease in leases {
                    let job = lease.job.expect("it comes with its job");
                    assert!(first.is_none_or(|first| job.priority >= first), "step {step}: one comes before it");
                    claimed += 1;
                    let n = ids.iter().position(|id| *id == job.id).expect("it is one of these");
                    tokens[n] = lease.lease_token;
                }
                Ok(None)
            }
            3 => beat(LeaseHeartbeat::default()).await,
            4 => beat(LeaseHeartbeat { stage: Some(format!("stage {step}")), ..LeaseHeartbeat::default() }).await,
            5 => report(Report::progress(&id).percent((step % 100) as i32).message("on")).await,
            6 => report(Report::succeeded(&id).result(&step).unwrap()).await,
            7 => report(Report::failed(&id, "E", "x".repeat(if step % 2 == 0 { 3_000 } else { 3 }))).await,
            8 => report(Report::failed(&id, "E", "for good").permanent()).await,
            9 => report(Report::released(&id)).await,
            10 => client.cancel(&id, "why").await.map(Some),
            _ => client.retry(&id).await.map(Some),
        };
        let stored = stored(&client).await;
        if let Ok(Some(answer)) = answer {
            answered += 1;
            assert_eq!(Job { payload: None, result: None, ..answer }, stored[n], "step {step}: {what}");
        }
        // GetJob and ListJobs show the same.
        let read = client.get(&ids[n]).await.unwrap();
        assert_eq!(Job { payload: None, result: None, ..read }, stored[n], "step {step}: {what}");
    }
    assert!(answered > 40 && claimed > 15, "{answered}, {claimed}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_remembered_is_no_answer_where_the_database_gives_none() {
    let database = Database::postgres().await;
    let link = Link::to(Peer::Postgres(database.socket())).await;
    let url = format!("postgres://{SERVER}@{}/{}", link.address, database.name());
    let server = TestServer::start(Config::new(url.parse().unwrap())).await;
    let (other, elsewhere) = TestServer::on(&database).await;
    let client = server.client();
    for _ in 0..3 {
        let id = client.create(NewJob::new("t")).await.unwrap().job.id;
        let first = client.claim(Claim::new("first")).await.unwrap().remove(0);
        // At another server the job is given back and claimed again. Here the cached job still has the first lease.
        elsewhere.update(Report::released(&id).lease(&first.lease_token)).await.unwrap();
        let second = elsewhere.claim(Claim::new("second")).await.unwrap().remove(0);
        link.set(Fault::Cut);
        let report = Report::succeeded(&id).lease(&second.lease_token);
        match timeout(Duration::from_secs(2), client.update(report.clone())).await {
            Err(_) | Ok(Ok(_) | Err(Error::Unavailable { .. })) => {}
            Ok(Err(error)) => panic!("its holder is told: {error}"),
        }
        link.set(Fault::None);
        client.update(report).await.unwrap();
    }
    server.stop().await;
    other.stop().await;
    database.verify().await;
}

/// Whichever server makes a job ready and whichever gets the claim: the most urgent job comes first, and none is passed over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_becomes_ready_at_one_server_is_claimed_at_another() {
    let database = Database::postgres().await;
    let (a, on_a) = TestServer::on(&database).await;
    let (b, on_b) = TestServer::on(&database).await;
    let clients = [&on_a, &on_b];
    let claim = async |client: &Client| {
        let found = client.claim(Claim::new("w").max_jobs(1).lease(Duration::from_secs(600))).await.unwrap();
        found.into_iter().next()
    };
    for client in clients {
        assert!(claim(client).await.is_none(), "both know that there is none");
    }
    for round in 0..20 {
        let (here, there) = (clients[round % 2], clients[(round / 2) % 2]);
        // Each server makes some of these ready.
        let soon = SystemTime::from(SystemClock.now()) + Duration::from_millis(50);
        let scheduled = here.create(NewJob::new("t").priority(1).scheduled_at(soon)).await.unwrap().job.id;
        let urgent = here.create(NewJob::new("u").priority(3)).await.unwrap().job.id;
        let plain = there.create(NewJob::new("t")).await.unwrap().job.id;
        assert_eq!(claim(there).await.unwrap().job.unwrap().id, urgent);
        let ready = async { while here.statistics(&["t"]).await.unwrap().types[0].scheduled > 0 {} };
        timeout(PATIENCE, ready).await.expect("its time comes");
        for (client, expected) in [(there, scheduled), (here, plain)] {
            let lease = claim(client).await.unwrap();
            assert_eq!(lease.job.as_ref().unwrap().id, expected, "{round}");
            if round % 3 == 0 {
                let job = lease.job.unwrap().id;
                let back = Report::failed(&job, "E", "again").lease(&lease.lease_token);
                client.update(back).await.unwrap();
            }
        }
        assert!(claim(here).await.is_none() && claim(there).await.is_none(), "{round}");
    }
    a.stop().await;
    b.stop().await;
    database.verify().await;
}

/// A server with a cached job also sees a lease that another server extended and folded into the row. Otherwise it
/// would end the lease too early.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_was_extended_at_a_server_that_is_gone_is_not_lost() {
    let database = Database::postgres().await;
    let mut config = database.config();
    config.fold_after = Duration::ZERO;
    let (a, b) = (TestServer::start(config.clone()).await, TestServer::start(config).await);
    let (on_a, on_b) = (a.client(), b.client());
    for _ in 0..2 {
        on_b.create(NewJob::new("t").max_lost_attempts(3)).await.unwrap();
    }
    let leases = on_b.claim(Claim::new("w").max_jobs(2).lease(Duration::from_secs(2))).await.unwrap();
    let kept = leases[0].job.as_ref().unwrap().id.clone();
    // B has the rows cached.
    on_b.create(NewJob::new("u")).await.unwrap();
    keep(&on_a, &leases[..1], 600).await;
    // This folds the extension into the row. Another row is behind then, so that B has something to catch up with.
    on_a.create(NewJob::new("u")).await.unwrap();
    on_a.claim(Claim::new("w").types(["u"]).lease(Duration::from_secs(600))).await.unwrap();
    a.stop().await;
    let lost = async {
        loop {
            let jobs = on_b.list(ListJobsRequest::default()).await.unwrap().jobs;
            if jobs.iter().any(|job| job.lost_attempts == 1) {
                break jobs;
            }
        }
    };
    let jobs = timeout(PATIENCE, lost).await.expect("the other lease ends");
    let kept = jobs.iter().find(|job| job.id == kept).unwrap();
    assert_eq!((kept.status(), kept.lost_attempts), (JobStatus::Running, 0));
    b.stop().await;
    database.verify().await;
}

/// A job that waits again keeps its stage until it is claimed, wherever a server has it cached.
async fn what_waits_again_keeps_its_stage(database: Database) {
    let short = jobledger_client::prost_types::Duration { seconds: 0, nanos: 1_000_000 };
    let policy = RetryPolicy { initial_backoff: Some(short), max_backoff: Some(short), ..RetryPolicy::default() };
    let (server, client) = TestServer::on(&database).await;
    let id = client.create(NewJob::new("t").max_attempts(3).retry_policy(policy)).await.unwrap().job.id;
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0).lease_token;
    client.update(Report::progress(&id).lease(&lease).stage("on it").percent(40)).await.unwrap();
    client.update(Report::failed(&id, "E", "again").lease(&lease)).await.unwrap();
    let ready = async { while client.statistics(&["t"]).await.unwrap().types[0].scheduled > 0 {} };
    timeout(PATIENCE, ready).await.expect("its time comes");
    client.create(NewJob::new("t").priority(1)).await.unwrap();
    server.stop().await;

    let (server, client) = TestServer::on(&database).await;
    let first = client.claim(Claim::new("w").max_jobs(1)).await.unwrap().remove(0).job.unwrap();
    assert_ne!(first.id, id);
    let canceled = client.cancel(&id, "").await.unwrap();
    assert_eq!((canceled.stage.as_deref(), canceled.progress), (Some("on it"), Some(40)));
    assert_eq!(client.get(&id).await.unwrap(), canceled);
    server.stop().await;
}
