//! Stopping with work under way, and what a client hears when the database fails in the middle of it.

use std::{sync::Arc, time::Duration};

use jobledger_server::{Config, domain::id::OrgId, store};
use tokio::time::timeout;
use tonic::{Code, Status, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::{
    breaking::{Break, Breaking},
    errors::{assert_error, new_job},
    harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    a_stop_answers_what_was_accepted,
    what_does_not_end_within_the_grace_period_is_cut_off,
    whoever_watches_the_health_is_told_and_does_not_hold_up_a_stop,
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
    // Taken, and not answered: what became of it is not this server's to say.
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
