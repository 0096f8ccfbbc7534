//! What callers may take. Beyond a bound a call is refused with a time to come back, and other callers go on.

use std::time::Duration;

use jobledger_client::{Claim, Client, Error, Follow, NewJob, Report, proto::GetJobRequest};
use jobledger_server::{Config, domain::id::OrgId, store};
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    jobs::errors::{assert_error, new_job},
    support::breaking::Breaking,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::raw::{Answer, frame},
};

on_both_databases! {
    an_org_may_have_so_many_calls_under_way_and_others_go_on,
    an_org_may_call_so_often_and_others_go_on,
    what_follows_on_claims_has_room_where_creates_find_none,
    an_org_may_have_so_many_claims_waiting_and_others_go_on,
    what_has_waited_too_long_is_refused_undecided,
    a_call_takes_no_longer_than_any_may,
}

fn client_of(server: &TestServer, org: u128) -> Client {
    Client::builder(server.endpoint()).org(Uuid::from_u128(org)).timeout(PATIENCE).build().unwrap()
}

/// Asserts that a call was refused because of other calls under way, with a time to come back. Returns the bound's scope.
#[track_caller]
pub(crate) fn assert_overloaded(status: &Status) -> String {
    let facts = assert_error(status, Code::ResourceExhausted, "OVERLOADED");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
    facts.get("scope").cloned().unwrap_or_default()
}

/// A server over a store whose heads tests can lock.
async fn held(config: Config) -> (std::sync::Arc<Breaking>, TestServer) {
    let inner = store::open(&config.database_url, config.open_options()).await.unwrap();
    let store = Breaking::new(inner, &[]);
    let server = TestServer::start_with(config, std::sync::Arc::clone(&store) as _).await;
    (store, server)
}

/// Creates a job, retrying while other calls have the org's slots.
async fn create_once_there_is_room(client: Client) -> Result<(), Status> {
    loop {
        match client.raw().create_job(new_job()).await {
            Err(status) if status.get_details_error_info().is_some_and(|info| info.metadata.contains_key("scope")) => {}
            done => return done.map(|_| ()),
        }
    }
}

/// Reads a job until a call is refused. By then the calls that were made before are under way.
async fn has_no_room(client: &Client) -> Status {
    let request = GetJobRequest { job_id: Uuid::now_v7().to_string(), ..Default::default() };
    let refused = async {
        loop {
            let refused = client.raw().get_job(request.clone()).await.expect_err("there is no such job");
            if refused.code() != Code::NotFound {
                return refused;
            }
        }
    };
    timeout(PATIENCE, refused).await.expect("they are under way")
}

async fn an_org_may_have_so_many_calls_under_way_and_others_go_on(database: Database) {
    let mut config = database.config();
    (config.calls.calls, config.calls.calls_per_org) = (3, 2);
    let (store, server) = held(config).await;
    let head = store.inner.begin(&[OrgId(Uuid::from_u128(1))]).await.unwrap();
    let mut waiting = JoinSet::new();
    let one = client_of(&server, 1);
    // Streams and claims have slots of their own.
    let _stream = one.subscribe(Follow::org()).await.unwrap();
    for _ in 0..2 {
        waiting.spawn(create_once_there_is_room(one.clone()));
    }
    assert_eq!(assert_overloaded(&has_no_room(&one).await), "org");
    assert_eq!(assert_overloaded(&one.raw().create_job(new_job()).await.unwrap_err()), "org");
    let mut other = client_of(&server, 2).raw();
    waiting.spawn(async move { other.create_job(new_job()).await.map(|_| ()) });
    drop(head);
    for done in waiting.join_all().await {
        done.expect("what was let in is done");
    }
    one.create(NewJob::new("t")).await.expect("there is room again");
    server.stop().await;
}

async fn an_org_may_call_so_often_and_others_go_on(database: Database) {
    let mut config = database.config();
    config.calls.rate_per_org = Some(5);
    let server = TestServer::start(config).await;
    let mut service = client_of(&server, 1).raw();
    let refused = async {
        loop {
            if let Err(status) = service.create_job(new_job()).await {
                return status;
            }
        }
    };
    let refused = timeout(PATIENCE, refused).await.expect("it is too often");
    let facts = assert_error(&refused, Code::ResourceExhausted, "RATE_LIMITED");
    assert_eq!(facts["limit"], "5");
    let wait = refused.get_details_retry_info().and_then(|retry| retry.retry_delay).expect("when to come back");
    assert!(wait <= Duration::from_millis(200), "{wait:?}");
    let other = client_of(&server, 2);
    for _ in 0..5 {
        other.create(NewJob::new("t")).await.expect("another org's are not fewer for it");
    }
    let again = async { while service.create_job(new_job()).await.is_err() {} };
    timeout(PATIENCE, again).await.expect("a second later there are more");
    server.stop().await;
}

async fn what_follows_on_claims_has_room_where_creates_find_none(database: Database) {
    let mut config = database.config();
    (config.calls.calls, config.calls.calls_per_org) = (2, 2);
    let (store, server) = held(config).await;
    let client = client_of(&server, 1);
    let job = client.create(NewJob::new("t")).await.unwrap().job.id;
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0).lease_token;
    let head = store.inner.begin(&[OrgId(Uuid::from_u128(1))]).await.unwrap();
    let mut waiting = JoinSet::new();
    for _ in 0..2 {
        waiting.spawn(create_once_there_is_room(client.clone()));
    }
    assert_overloaded(&has_no_room(&client).await);
    // The report is let in, and waits for the head like the creates.
    let report = Report::succeeded(&job).lease(lease);
    let mut reporting = Box::pin(client.update(report));
    assert!(timeout(Duration::from_millis(200), &mut reporting).await.is_err());
    drop(head);
    reporting.await.expect("it was let in");
    for done in waiting.join_all().await {
        done.unwrap();
    }
    server.stop().await;

    // Rates are counted apart, too.
    let mut config = database.config();
    config.calls.rate_per_org = Some(5);
    let server = TestServer::start(config).await;
    let client = client_of(&server, 2);
    client.create(NewJob::new("t")).await.unwrap();
    let mut service = client.raw();
    let spent = async { while service.create_job(new_job()).await.is_ok() {} };
    timeout(PATIENCE, spent).await.unwrap();
    let claim = jobledger_client::proto::ClaimJobsRequest { worker_id: "w".to_owned(), ..Default::default() };
    let lease = service.claim_jobs(claim).await.expect("claims have a rate of their own").into_inner().leases.remove(0);
    let report: jobledger_client::proto::UpdateJobStatusRequest =
        Report::succeeded(lease.job.unwrap().id).lease(lease.lease_token).into();
    service.update_job_status(report).await.expect("and so have reports");
    server.stop().await;
}

async fn an_org_may_have_so_many_claims_waiting_and_others_go_on(database: Database) {
    let mut config = database.config();
    (config.limits.claims, config.limits.claims_per_org) = (3, 2);
    let server = TestServer::start(config).await;
    let mut waiting = JoinSet::new();
    let claim = |org| {
        let client = client_of(&server, org);
        async move {
            loop {
                // The claims that test whether there is room take it for a moment.
                match client.claim(Claim::new("w").wait(PATIENCE)).await {
                    Err(Error::Exhausted { .. }) => {}
                    claimed => return claimed,
                }
            }
        }
    };
    for _ in 0..2 {
        waiting.spawn(claim(1));
    }
    let refused = async {
        loop {
            let once = jobledger_client::proto::ClaimJobsRequest { worker_id: "w".to_owned(), ..Default::default() };
            if let Err(status) = client_of(&server, 1).raw().claim_jobs(once).await {
                return status;
            }
        }
    };
    assert_overloaded(&timeout(PATIENCE, refused).await.expect("both wait by then"));
    waiting.spawn(claim(2));
    for org in [1, 1, 2] {
        client_of(&server, org).create(NewJob::new("t")).await.unwrap();
    }
    for claimed in waiting.join_all().await {
        assert_eq!(claimed.expect("it was let in").len(), 1);
    }
    server.stop().await;
}

async fn what_has_waited_too_long_is_refused_undecided(database: Database) {
    let mut config = database.config();
    config.limits.queued_within = Duration::from_millis(50);
    config.calls.calls_per_org = 2;
    let (store, server) = held(config).await;
    let org = OrgId(Uuid::from_u128(1));
    let head = store.inner.begin(&[org]).await.unwrap();
    let client = client_of(&server, 1);
    let mut service = client.raw();
    let taken = tokio::spawn(async move { service.create_job(new_job()).await });
    store.has_begun(1).await;
    let late = tokio::spawn(create_once_there_is_room(client.clone()));
    has_no_room(&client).await;
    let since = std::time::Instant::now();
    while since.elapsed() < Duration::from_millis(60) {
        tokio::task::yield_now().await;
    }
    drop(head);
    taken.await.unwrap().expect("what was taken is decided, however long it took");
    assert_overloaded(&late.await.unwrap().expect_err("it has waited too long"));
    assert_eq!(client.list(Default::default()).await.unwrap().jobs.len(), 1, "it never happened");
    server.stop().await;
}

async fn a_call_takes_no_longer_than_any_may(database: Database) {
    let mut config = database.config();
    config.calls.call_within = Duration::from_millis(100);
    let (store, server) = held(config).await;
    let head = store.inner.begin(&[OrgId::DEFAULT]).await.unwrap();
    let message = frame(&prost::Message::encode_to_vec(&new_job()));
    for deadline in [None, Some("1H")] {
        let mut headers = Vec::new();
        headers.extend(deadline.map(|deadline| ("grpc-timeout", deadline)));
        let answer = Answer::to(&server, "jobledger.v1.JobService/CreateJob", &headers, message.clone()).await;
        assert_error(&answer.status(), Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
    drop(head);
    server.stop().await;
}
