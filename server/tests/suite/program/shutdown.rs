//! Stops with work under way, and what a client gets when the database fails in the middle of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jobledger_client::{
    NewJob,
    proto::{ClaimJobsRequest, StreamJobEventsRequest, stream_job_events_response},
};
use jobledger_server::{Config, domain::id::OrgId, store};
use prost::Message as _;
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{Instant, timeout},
};
use tonic::{Code, Status, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::{
    jobs::errors::{assert_error, new_job},
    support::breaking::{Break, Breaking},
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::program::Program,
    support::raw::{DATA, END_STREAM, Raw, frame},
};

on_both_databases! {
    a_stop_answers_what_was_accepted,
    what_does_not_end_within_the_grace_period_is_cut_off,
    whoever_watches_the_health_is_told_and_does_not_hold_up_a_stop,
    whatever_clients_do_it_is_gone_within_its_grace,
    an_unknown_outcome_and_a_full_disk_have_their_codes_on_the_wire,
}

async fn start(config: Config, breaks: &[Break]) -> (Arc<Breaking>, TestServer) {
    let inner = store::open(&config.database_url, config.open_options()).await.unwrap();
    let store = Breaking::new(inner, breaks);
    let server = TestServer::start_with(config, Arc::clone(&store) as _).await;
    (store, server)
}

#[track_caller]
fn assert_retry(status: &Status, code: Code, reason: &str, says_when_to_retry: bool) {
    assert_error(status, code, reason);
    assert_eq!(status.get_details_retry_info().is_some(), says_when_to_retry);
}

async fn a_stop_answers_what_was_accepted(database: Database) {
    let (store, mut server) = start(database.config(), &[]).await;
    let held = store.inner.begin(&[OrgId::DEFAULT]).await.unwrap();
    let mut service = server.client().raw();
    let accepted = tokio::spawn(async move { service.create_job(new_job()).await });
    store.has_begun(1).await;
    server.begin_stop();
    drop(held);
    let job = accepted.await.unwrap().expect("it was accepted").into_inner().job.unwrap();
    server.stop().await;
    let server = TestServer::start(database.config()).await;
    assert_eq!(server.client().get(job.id).await.unwrap().last_seq, 1);
    server.stop().await;
}

async fn what_does_not_end_within_the_grace_period_is_cut_off(database: Database) {
    let mut config = database.config();
    config.shutdown_grace = Duration::from_millis(200);
    let (store, mut server) = start(config, &[]).await;
    let held = store.inner.begin(&[OrgId::DEFAULT]).await.unwrap();
    let mut service = server.client().raw();
    let accepted = tokio::spawn(async move { service.create_job(new_job()).await });
    store.has_begun(1).await;
    server.begin_stop();
    server.stop().await;
    drop(held);
    // The command was taken and not answered, so this server can't tell its outcome.
    let error = accepted.await.unwrap().unwrap_err();
    assert_retry(&error, Code::Unavailable, "OUTCOME_UNKNOWN", true);
}

async fn whoever_watches_the_health_is_told_and_does_not_hold_up_a_stop(database: Database) {
    let mut config = database.config();
    config.shutdown_grace = PATIENCE;
    let mut server = TestServer::start(config).await;
    let channel = Endpoint::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
    let mut watches = Vec::new();
    for service in ["", "jobledger.v1.JobService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut watch = HealthClient::new(channel.clone()).watch(request).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        watches.push(watch);
    }
    server.begin_stop();
    for mut watch in watches {
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        let end = timeout(PATIENCE / 2, watch.message()).await.expect("long before the grace period is over");
        assert!(end.unwrap().is_none(), "that was the last");
    }
    timeout(PATIENCE / 2, server.stop()).await.expect("and so is the stop");
}

async fn an_unknown_outcome_and_a_full_disk_have_their_codes_on_the_wire(database: Database) {
    let mut config = database.config();
    config.limits.resolve_within = Duration::from_millis(200);
    let (store, server) = start(config, &[Break::Full, Break::Away]).await;
    let mut service = server.client().raw();
    let full = service.create_job(new_job()).await.unwrap_err();
    assert_retry(&full, Code::ResourceExhausted, "STORAGE_FULL", false);
    let unknown = service.create_job(new_job()).await.unwrap_err();
    assert_retry(&unknown, Code::Unavailable, "OUTCOME_UNKNOWN", true);
    let away = service.create_job(new_job()).await.unwrap_err();
    assert_retry(&away, Code::Unavailable, "DATABASE_UNAVAILABLE", true);
    store.come_back().await;
    service.create_job(new_job()).await.expect("the service heals by itself");
    server.stop().await;
}

async fn whatever_clients_do_it_is_gone_within_its_grace(database: Database) {
    const GRACE: Duration = Duration::from_secs(4);
    let program = Program::start_with(&database, &["--shutdown-grace", "4"]);
    let client = program.client();
    let address: SocketAddr = program.address.parse().unwrap();
    for _ in 0..50 {
        client.create(NewJob::new("t").payload(&"x".repeat(100_000)).unwrap()).await.unwrap();
    }
    // Clients that behave: a subscriber, and a worker that waits.
    let mut stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let bookmark = stream.message().await.unwrap().expect("where it begins");
    let waiting = tokio::spawn({
        let client = client.clone();
        let claim = ClaimJobsRequest {
            worker_id: "w".to_owned(),
            types: vec!["none".to_owned()],
            wait: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
            ..Default::default()
        };
        async move { client.raw().claim_jobs(claim).await.map(|_| ()) }
    });
    // Clients that don't: they send nothing, or half a request in either protocol, or read nothing of an answer.
    let silent = TcpStream::connect(address).await.unwrap();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{").await.unwrap();
    let mut idle = Raw::over(TcpStream::connect(address).await.unwrap()).await;
    idle.is_served().await;
    let mut receiving = Raw::over(TcpStream::connect(address).await.unwrap()).await;
    receiving.is_served().await;
    let call = receiving.call("/jobledger.v1.JobService/CreateJob", 0).await.unwrap();
    receiving.send(DATA, 0, call, &[0, 0, 0, 1]).await.unwrap();
    // SETTINGS_INITIAL_WINDOW_SIZE is 0 (RFC 9113, 6.5.2).
    let mut unread = Raw::with_settings(TcpStream::connect(address).await.unwrap(), &[0, 4, 0, 0, 0, 0]).await;
    unread.is_served().await;
    let from_the_beginning = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() };
    let call = unread.call("/jobledger.v1.JobService/StreamJobEvents", 0).await.unwrap();
    unread.send(DATA, END_STREAM, call, &frame(&from_the_beginning.encode_to_vec())).await.unwrap();
    unread.is_served().await;

    let began = Instant::now();
    let ended = tokio::task::spawn_blocking(move || program.end_by("TERM"));
    let mut last = None;
    let status = loop {
        match timeout(PATIENCE, stream.message()).await.expect("it is told") {
            Ok(message) => last = message.and_then(|message| message.item),
            Err(status) => break status,
        }
    };
    assert_retry(&status, Code::Unavailable, "DRAINING", true);
    assert!(matches!(last, Some(stream_job_events_response::Item::Bookmark(_))), "{bookmark:?}, then {last:?}");
    assert_retry(&waiting.await.unwrap().unwrap_err(), Code::Unavailable, "DRAINING", true);
    assert!(ended.await.unwrap().success(), "a stop is no failure");
    let took = began.elapsed();
    assert!(took < GRACE + Duration::from_secs(1), "{took:?}");
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens");
    drop((silent, half, idle, receiving, unread));
    let server = TestServer::start(database.config()).await;
    assert_eq!(server.client().list(Default::default()).await.unwrap().jobs.len(), 50);
    server.stop().await;
}
