//! Connections that reach their maximum age. A client that reconnects finds servers that were added since.

use std::time::Duration;

use jobledger_client::{
    Client, Follow, Item, NewJob,
    proto::{StreamJobEventsRequest, stream_job_events_response::Item as RawItem},
};
use tokio::time::{sleep, timeout};
use tonic::Code;

use crate::{
    faults::link::{Link, Peer},
    support::harness::{Database, PATIENCE, TestServer},
};

async fn start(database: &Database, age: Duration) -> TestServer {
    let mut config = database.config();
    config.connections.age = age;
    TestServer::start(config).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_server_behind_a_balancer_gets_its_connections_and_no_call_fails() {
    const AGE: Duration = Duration::from_secs(1);
    let databases = [Database::sqlite(), Database::sqlite()];
    let (first, second) = (start(&databases[0], AGE).await, start(&databases[1], AGE).await);
    let there = second.client().create(NewJob::new("t")).await.unwrap().job.id;
    let link = Link::to(Peer::Tcp(first.address.to_string())).await;
    let clients: Vec<_> = (0..12)
        .map(|_| Client::builder(format!("http://{}", link.address)).timeout(PATIENCE).build().unwrap())
        .collect();
    for client in &clients {
        client.create(NewJob::new("t")).await.unwrap();
    }
    link.lead_to(Peer::Tcp(second.address.to_string()));
    let moved = async {
        for client in &clients {
            while client.get(&there).await.is_err() {
                client.create(NewJob::new("t")).await.unwrap();
                sleep(Duration::from_millis(20)).await;
            }
        }
    };
    timeout(PATIENCE, moved).await.expect("each has a connection to the second");
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_outlives_its_connection_is_told_where_it_was() {
    let database = Database::sqlite();
    let server = start(&database, Duration::from_secs(1)).await;
    let client = server.client();
    client.create(NewJob::new("t")).await.unwrap();
    let mut resuming = client.subscribe(Follow::org().after(0)).await.unwrap();
    let mut stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let (mut last, mut bookmark) = (0, 0);
    let writing = tokio::spawn({
        let client = client.clone();
        async move {
            for _ in 0..200 {
                client.create(NewJob::new("t")).await.unwrap();
                sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let error = loop {
        match timeout(PATIENCE, stream.message()).await.expect("it ends") {
            Ok(message) => match message.expect("not without a word").item.unwrap() {
                RawItem::Event(event) => last = event.seq,
                RawItem::Bookmark(found) => bookmark = found.seq,
                RawItem::Snapshot(_) | RawItem::OrgEvent(_) => panic!("there is none"),
            },
            Err(error) => break error,
        }
    };
    assert_eq!((error.code(), bookmark), (Code::Unavailable, last), "{error:?}");
    writing.await.unwrap();
    // The SDK resumes where it was.
    let mut expected = 1;
    while expected <= 201 {
        if let Item::Event(event) = timeout(PATIENCE, resuming.next()).await.unwrap().unwrap().unwrap() {
            assert_eq!(event.seq, expected);
            expected += 1;
        }
    }
    server.stop().await;
}
