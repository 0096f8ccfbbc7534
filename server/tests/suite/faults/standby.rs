//! A synchronous standby is down. Nothing that it lacks is acknowledged, and waiting for it uses nothing up.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use jobledger_client::{
    Client, Error, NewJob,
    proto::{CreateJobRequest, CreateJobResponse, CreateTokenRequest, RevokeTokenRequest, Role},
};
use tokio::{
    task::{JoinSet, block_in_place},
    time::timeout,
};
use tonic::Status;
use uuid::Uuid;

use super::failover::Pair;
use crate::support::harness::PATIENCE;
use crate::support::program::Program;

/// Clients of different orgs.
fn clients(program: &Program, orgs: u128) -> Vec<Client> {
    let client =
        |org| Client::builder(format!("http://{}", program.address)).org(Uuid::from_u128(org)).timeout(PATIENCE);
    (1..=orgs).map(|org| client(org).build().expect("a valid endpoint")).collect()
}

fn new_job() -> NewJob {
    NewJob::new("t").idempotency_key("the only one")
}

/// Creates the same job in each org, without the SDK's retries and with a deadline of 4 s. Returns the answers.
async fn try_to_create(clients: &[Client]) -> Vec<Result<CreateJobResponse, Error>> {
    let create = |client: &Client| {
        let mut service = client.raw();
        async move {
            let mut request = tonic::Request::new(CreateJobRequest::from(new_job()));
            request.set_timeout(Duration::from_secs(4));
            service.create_job(request).await.map(tonic::Response::into_inner).map_err(Error::from)
        }
    };
    timeout(PATIENCE, clients.iter().map(create).collect::<JoinSet<_>>().join_all()).await.expect("all are answered")
}

/// The backends whose commits wait for the standby.
async fn waiting(pair: &Pair) -> Vec<i32> {
    let mut admin = pair.database.connect_as("postgres").await;
    let sql = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' ORDER BY pid";
    sqlx::query_scalar(sql).fetch_all(&mut admin).await.expect("a superuser may")
}

/// Calls a PostgreSQL function on a backend, as a superuser.
async fn do_to(pair: &Pair, what: &str, pid: i32) {
    let mut admin = pair.database.connect_as("postgres").await;
    let sql = sqlx::AssertSqlSafe(format!("SELECT {what}({pid})"));
    assert!(sqlx::query_scalar::<_, bool>(sql).fetch_one(&mut admin).await.expect("a superuser may"));
}

fn assert_none_is_acknowledged(answers: &[Result<CreateJobResponse, Error>], when: &str) {
    assert!(answers.iter().all(Result::is_err), "{when}: {answers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_standby_lacks_is_not_acknowledged_however_the_wait_for_it_ends() {
    let mut pair = Pair::start_synchronous(1, &[]).await;
    let clients = clients(&pair.programs[0], 3);
    block_in_place(|| pair.standby.stop());
    let creating = {
        let clients = clients.clone();
        tokio::spawn(async move { try_to_create(&clients).await })
    };
    let all_wait = async {
        loop {
            if let [cancel, terminate, _] = waiting(&pair).await[..] {
                break (cancel, terminate);
            }
        }
    };
    let (cancel, terminate) = timeout(PATIENCE, all_wait).await.expect("commits wait for the standby");
    do_to(&pair, "pg_cancel_backend", cancel).await;
    do_to(&pair, "pg_terminate_backend", terminate).await;
    assert_none_is_acknowledged(&creating.await.unwrap(), "their wait was cut short");
    // Two of the jobs are visible by now. A create with their key must still not acknowledge them.
    assert_none_is_acknowledged(&try_to_create(&clients).await, "they are asked for again");
    block_in_place(|| {
        pair.primary.kill();
        pair.primary.start_again();
    });
    assert_none_is_acknowledged(&try_to_create(&clients).await, "the database was started again");

    block_in_place(|| pair.standby.start_again());
    let mut created = Vec::new();
    for client in &clients {
        created.push(client.create(new_job()).await.expect("it is acknowledged once the standby has it").job.id);
    }
    block_in_place(|| pair.primary.kill());
    pair.take_over();
    for (client, id) in clients.iter().zip(created) {
        client.get(id).await.expect("it is there");
    }
    pair.database.verify().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_a_standby_lacks_are_not_acknowledged() {
    let pair = Pair::start_synchronous(1, &[]).await;
    let client = clients(&pair.programs[0], 1).remove(0);
    let named = |name: &str| CreateTokenRequest {
        name: name.to_owned(),
        roles: vec![Role::Worker.into()],
        ..CreateTokenRequest::default()
    };
    let (token, _) = client.create_token(named("first")).await.unwrap();
    block_in_place(|| pair.standby.stop());
    let (mut making, mut revoking) = (client.raw_server(), client.raw_server());
    let making = async move { making.create_token(named("second")).await.map(drop) };
    let revoking = async move { revoking.revoke_token(RevokeTokenRequest { token_id: token.id }).await.map(drop) };
    type Call = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
    let calls: [Call; 2] = [Box::pin(making), Box::pin(revoking)];
    for call in calls {
        let call = tokio::spawn(call);
        let its_backend = async {
            loop {
                if let [backend] = waiting(&pair).await[..] {
                    break backend;
                }
            }
        };
        let backend = timeout(PATIENCE, its_backend).await.expect("its commit waits for the standby");
        do_to(&pair, "pg_cancel_backend", backend).await;
        let refused = Error::from(call.await.unwrap().unwrap_err());
        assert!(matches!(&refused, Error::Unavailable { reason, .. } if reason == "OUTCOME_UNKNOWN"), "{refused:?}");
    }
    block_in_place(|| pair.standby.start_again());
    client.create_token(named("third")).await.expect("the standby is back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_are_given_up_take_no_more_connections_than_there_are_places() {
    const PLACES: usize = 3;
    let pair = Pair::start_synchronous(1, &["--write-connections", "3"]).await;
    let clients = clients(&pair.programs[0], 8);
    block_in_place(|| pair.standby.stop());
    // The server gives a commit up after 10 s.
    let began = Instant::now();
    let mut most = 0;
    while began.elapsed() < Duration::from_secs(25) {
        assert_none_is_acknowledged(&try_to_create(&clients).await, "the standby is away");
        most = most.max(waiting(&pair).await.len());
        assert!(most <= PLACES, "{most} connections wait for the standby, and there are {PLACES} places");
    }
    assert_eq!(most, PLACES);
    block_in_place(|| pair.standby.start_again());
    for client in &clients {
        client.create(new_job()).await.expect("their places are given back");
    }
    pair.database.verify().await;
}
