//! Calls that their callers reset. A connection ends beyond so many a minute.

use std::time::Duration;

use jobledger_client::{
    NewJob,
    proto::{ClaimJobsRequest, StreamJobEventsRequest, stream_job_events_response::Item},
};
use tokio::time::timeout;

use crate::support::harness::{Database, PATIENCE, TestServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_resets_its_calls_ends_however_it_is_paced() {
    const ALLOWED: usize = 50;
    let database = Database::sqlite();
    let mut config = database.config();
    config.connections.resets = ALLOWED;
    let server = TestServer::start(config).await;
    let client = server.client();
    let mut service = client.raw();
    let mut events = service.stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let wait = jobledger_client::prost_types::Duration { seconds: 20, nanos: 0 };
    let claim = ClaimJobsRequest { worker_id: "w".to_owned(), max_jobs: 1, wait: Some(wait), ..Default::default() };
    let mut reset = async |times: usize| {
        for _ in 0..times {
            let _ = timeout(Duration::from_millis(10), service.claim_jobs(claim.clone())).await;
        }
    };
    reset(ALLOWED - 10).await;
    client.create(NewJob::new("t")).await.unwrap();
    let event = async {
        loop {
            if let Some(Item::Event(event)) = events.message().await.expect("it goes on").unwrap().item {
                return event;
            }
        }
    };
    assert_eq!(timeout(PATIENCE, event).await.unwrap().seq, 1);
    reset(ALLOWED).await;
    let ended = async { while events.message().await.is_ok() {} };
    timeout(PATIENCE, ended).await.expect("the connection ends, and what is on it");
    // A new connection is accepted.
    server.client().create(NewJob::new("t")).await.unwrap();
    server.stop().await;
}
