//! The contract's error table on the wire, row by row.

use std::collections::BTreeMap;

use hyper_util::rt::TokioExecutor;
use jobledger_client::proto::{
    CreateJobRequest, GetJobRequest, GetStatisticsRequest, StreamJobEventsRequest, UpdateJobStatusRequest,
    job_service_client::JobServiceClient,
};
use jobledger_server::ledger::StreamLimits;
use prost_types::{Value, value::Kind};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::support::harness::{Database, PATIENCE, TestServer, on_both_databases};

on_both_databases! {
    an_unknown_job_is_not_found,
    a_key_with_another_request_names_the_existing_job,
    what_the_state_machine_forbids_names_the_status,
    checks_run_in_order_repetition_lease_etag_transition,
    cursors_outside_of_the_log_are_out_of_range,
    too_many_types_and_too_many_commands_are_exhaustion,
    too_many_streams_are_exhaustion_until_one_ends,
    streams_are_bounded_by_org_and_by_connection_too,
    what_the_database_refuses_is_internal_and_says_nothing_of_the_database,
    a_database_that_does_not_answer_is_unavailable_and_comes_back,
    a_passed_deadline_is_deadline_exceeded,
}

pub(crate) type Service = jobledger_client::RawClient;

/// Asserts an error's code and reason, and returns the metadata of its ErrorInfo.
#[track_caller]
pub(crate) fn assert_error(status: &Status, code: Code, reason: &str) -> BTreeMap<String, String> {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!((status.code(), info.reason.as_str(), info.domain.as_str()), (code, reason, "jobledger"), "{status:?}");
    assert!(!status.message().is_empty());
    assert!(status.details().len() < 4_096, "details travel in trailers");
    info.metadata.into_iter().collect()
}

#[track_caller]
pub(crate) fn assert_fields(status: &Status, fields: &[&str]) {
    assert_error(status, Code::InvalidArgument, "INVALID_FIELD");
    let violations = status.get_details_bad_request().expect("a BadRequest").field_violations;
    let found: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(found, fields, "{status:?}");
}

pub(crate) fn new_job() -> CreateJobRequest {
    CreateJobRequest { r#type: "t".to_owned(), ..Default::default() }
}

pub(crate) fn text(length: usize) -> Option<Value> {
    Some(Value { kind: Some(Kind::StringValue("x".repeat(length))) })
}

pub(crate) async fn create(service: &mut Service) -> String {
    service.create_job(new_job()).await.unwrap().into_inner().job.unwrap().id
}

pub(crate) async fn running(service: &mut Service) -> String {
    let job_id = create(service).await;
    service
        .update_job_status(UpdateJobStatusRequest { job_id: job_id.clone(), status: Some(2), ..Default::default() })
        .await
        .unwrap();
    job_id
}

async fn an_unknown_job_is_not_found(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let job_id = "01890a5d-ac96-774b-bcce-b302099a8057".to_owned();
    let expected = BTreeMap::from([("job_id".to_owned(), job_id.clone())]);
    let get = service.get_job(GetJobRequest { job_id: job_id.clone(), ..Default::default() }).await.unwrap_err();
    assert_eq!(assert_error(&get, Code::NotFound, "JOB_NOT_FOUND"), expected);
    let update = UpdateJobStatusRequest { job_id: job_id.clone(), etag: "1".to_owned(), ..Default::default() };
    let update = service.update_job_status(update).await.unwrap_err();
    assert_eq!(assert_error(&update, Code::NotFound, "JOB_NOT_FOUND"), expected);
    let stream = StreamJobEventsRequest { job_id, after_seq: Some(5), ..Default::default() };
    let stream = service.stream_job_events(stream).await.unwrap_err();
    assert_eq!(assert_error(&stream, Code::NotFound, "JOB_NOT_FOUND"), expected);
    server.stop().await;
}

async fn a_key_with_another_request_names_the_existing_job(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let keyed = CreateJobRequest { idempotency_key: "k".to_owned(), payload: text(1), ..new_job() };
    let id = service.create_job(keyed.clone()).await.unwrap().into_inner().job.unwrap().id;
    let again = service.create_job(keyed.clone()).await.unwrap().into_inner();
    assert_eq!((again.deduplicated, again.job.unwrap().id), (true, id.clone()));
    // A request that spells out a default is another request: requests are compared as sent.
    for other in [
        CreateJobRequest { payload: text(2), ..keyed.clone() },
        CreateJobRequest { max_attempts: 1, ..keyed.clone() },
        CreateJobRequest { labels: BTreeMap::from([("a".to_owned(), String::new())]), ..keyed },
    ] {
        let error = service.create_job(other).await.unwrap_err();
        let metadata = assert_error(&error, Code::AlreadyExists, "IDEMPOTENCY_KEY_REUSED");
        assert_eq!(metadata, BTreeMap::from([("existing_job_id".to_owned(), id.clone())]));
    }
    server.stop().await;
}

async fn what_the_state_machine_forbids_names_the_status(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let queued = create(&mut service).await;
    let running = running(&mut service).await;
    for (job_id, status, current) in
        [(&queued, 3, "JOB_STATUS_QUEUED"), (&queued, 1, "JOB_STATUS_QUEUED"), (&running, 5, "JOB_STATUS_RUNNING")]
    {
        let update = UpdateJobStatusRequest { job_id: job_id.clone(), status: Some(status), ..Default::default() };
        let error = service.update_job_status(update).await.unwrap_err();
        let metadata = assert_error(&error, Code::FailedPrecondition, "INVALID_TRANSITION");
        assert_eq!(metadata, BTreeMap::from([("current_status".to_owned(), current.to_owned())]));
    }
    server.stop().await;
}

async fn checks_run_in_order_repetition_lease_etag_transition(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let job_id = running(&mut service).await;
    let end = UpdateJobStatusRequest { job_id, status: Some(3), ..Default::default() };
    let etag = service.update_job_status(end.clone()).await.unwrap().into_inner().job.unwrap().etag;
    let stale = UpdateJobStatusRequest { etag: "0".to_owned(), ..end.clone() };
    service.update_job_status(stale.clone()).await.expect("the same outcome again, whatever the etag");
    let other = UpdateJobStatusRequest { status: Some(4), ..stale };
    let leased = UpdateJobStatusRequest { lease_token: "nonsense".to_owned(), ..other.clone() };
    let error = service.update_job_status(leased).await.unwrap_err();
    assert_error(&error, Code::FailedPrecondition, "LEASE_LOST");
    let error = service.update_job_status(other.clone()).await.unwrap_err();
    let metadata = assert_error(&error, Code::Aborted, "ETAG_MISMATCH");
    assert_eq!(metadata, BTreeMap::from([("current_etag".to_owned(), etag.clone())]));
    let error = service.update_job_status(UpdateJobStatusRequest { etag, ..other }).await.unwrap_err();
    assert_error(&error, Code::FailedPrecondition, "INVALID_TRANSITION");
    server.stop().await;
}

async fn cursors_outside_of_the_log_are_out_of_range(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let job_id = create(&mut service).await;
    for _ in 0..4 {
        create(&mut service).await;
    }
    let after = |seq| StreamJobEventsRequest { after_seq: Some(seq), history_only: true, ..Default::default() };
    let expected = |oldest: &str| {
        BTreeMap::from([("head_seq".to_owned(), "5".to_owned()), ("oldest_seq".to_owned(), oldest.to_owned())])
    };
    let error = service.stream_job_events(after(6)).await.unwrap_err();
    assert_eq!(assert_error(&error, Code::OutOfRange, "CURSOR_AHEAD"), expected("1"));
    service.stream_job_events(after(5)).await.expect("the head is a cursor");

    database.tamper("UPDATE org_head SET floor_seq = 4").await;
    for expired in [0, 2] {
        let error = service.stream_job_events(after(expired)).await.unwrap_err();
        assert_eq!(assert_error(&error, Code::OutOfRange, "CURSOR_EXPIRED"), expected("4"));
    }
    service.stream_job_events(after(3)).await.expect("what comes after it is kept");
    let of_job = StreamJobEventsRequest { job_id, ..after(0) };
    service.stream_job_events(of_job).await.expect("a job that exists has its whole history");
    server.stop().await;
}

async fn too_many_types_and_too_many_commands_are_exhaustion(database: Database) {
    let mut config = database.config();
    config.limits.types_per_org = 2;
    config.limits.queued_bytes = 100_000;
    let server = TestServer::start(config).await;
    let mut service = server.client().raw();
    let of_type = |job_type: &str| CreateJobRequest { r#type: job_type.to_owned(), ..Default::default() };
    service.create_job(of_type("a")).await.unwrap();
    service.create_job(of_type("b")).await.unwrap();
    let error = service.create_job(of_type("c")).await.unwrap_err();
    let metadata = assert_error(&error, Code::ResourceExhausted, "TOO_MANY_TYPES");
    assert_eq!(metadata, BTreeMap::from([("limit".to_owned(), "2".to_owned())]));
    service.create_job(of_type("a")).await.expect("a known type is fine");
    let mut request = Request::new(of_type("c"));
    request.metadata_mut().insert("x-org-id", "00000000-0000-0000-0000-000000000001".parse().unwrap());
    service.create_job(request).await.expect("each org has its own");

    let large = CreateJobRequest { payload: text(200_000), ..of_type("a") };
    let error = service.create_job(large).await.unwrap_err();
    assert_error(&error, Code::ResourceExhausted, "OVERLOADED");
    assert!(error.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()));
    server.stop().await;
}

async fn too_many_streams_are_exhaustion_until_one_ends(database: Database) {
    let mut config = database.config();
    config.limits.streams.in_all = 2;
    let server = TestServer::start(config).await;
    let mut service = server.client().raw();
    let request = StreamJobEventsRequest::default();
    let first = service.stream_job_events(request.clone()).await.unwrap();
    let _second = service.stream_job_events(request.clone()).await.unwrap();
    let error = service.stream_job_events(request.clone()).await.unwrap_err();
    assert_error(&error, Code::ResourceExhausted, "TOO_MANY_STREAMS");
    assert!(error.get_details_retry_info().is_some());
    drop(first);
    // The server learns of the end on its connection, which takes a moment.
    let again = async { while service.stream_job_events(request.clone()).await.is_err() {} };
    tokio::time::timeout(PATIENCE, again).await.expect("a place is free again");
    server.stop().await;
}

async fn streams_are_bounded_by_org_and_by_connection_too(database: Database) {
    let mut config = database.config();
    config.limits.streams = StreamLimits { in_all: 6, per_org: 3, per_connection: 4 };
    let server = TestServer::start(config).await;
    let org = |client: jobledger_client::Client, org: u128| {
        let org = Uuid::from_u128(org).to_string();
        async move {
            let mut request = Request::new(StreamJobEventsRequest::default());
            request.metadata_mut().insert("x-org-id", org.parse().unwrap());
            client.raw().stream_job_events(request).await
        }
    };
    let scope = |refused: Result<(), Status>| {
        let error = refused.expect_err("it is refused");
        assert_error(&error, Code::ResourceExhausted, "TOO_MANY_STREAMS");
        assert!(error.get_details_retry_info().is_some());
        let metadata = error.get_details_error_info().unwrap().metadata;
        (metadata["scope"].clone(), metadata["limit"].clone())
    };
    let (one, other) = (server.client(), server.client());
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(org(one.clone(), 1).await.unwrap());
    }
    assert_eq!(scope(org(other.clone(), 1).await.map(drop)), ("org".to_owned(), "3".to_owned()));
    open.push(org(one.clone(), 2).await.unwrap());
    assert_eq!(scope(org(one.clone(), 3).await.map(drop)), ("connection".to_owned(), "4".to_owned()));
    for _ in 0..2 {
        open.push(org(other.clone(), 3).await.unwrap());
    }
    assert_eq!(scope(org(other.clone(), 4).await.map(drop)), ("server".to_owned(), "6".to_owned()));
    // The end of a stream frees its slot, and a refused stream takes none.
    let ahead = StreamJobEventsRequest { after_seq: Some(9), ..Default::default() };
    open.truncate(5);
    let again = async {
        loop {
            let refused = other.raw().stream_job_events(ahead.clone()).await.unwrap_err();
            if refused.code() == Code::OutOfRange {
                break org(other.clone(), 4).await.unwrap();
            }
        }
    };
    open.push(tokio::time::timeout(PATIENCE, again).await.expect("a place is free again"));
    drop(open);
    let all = async { while org(one.clone(), 1).await.is_err() {} };
    tokio::time::timeout(PATIENCE, all).await.expect("all are free again");
    server.stop().await;
}

async fn what_the_database_refuses_is_internal_and_says_nothing_of_the_database(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    database.refuse_jobs_of_type(&new_job().r#type).await;
    let error = client.raw().create_job(new_job()).await.unwrap_err();
    assert_error(&error, Code::Internal, "REFUSED_BY_DATABASE");
    assert!(!error.message().contains("poison"));
    server.stop().await;
}

async fn a_database_that_does_not_answer_is_unavailable_and_comes_back(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    // Longer than the server waits for another writer.
    let blocked = database.block_writes().await;
    let error = service.create_job(new_job()).await.unwrap_err();
    assert_error(&error, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert!(error.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()));
    assert!(!error.message().contains("lock"), "the database's words stay in the log: {}", error.message());
    service.get_statistics(GetStatisticsRequest::default()).await.expect("reads go on");
    blocked.end().await;
    service.create_job(new_job()).await.expect("and writes when it is back");
    server.stop().await;
}

async fn a_passed_deadline_is_deadline_exceeded(database: Database) {
    let (server, _) = TestServer::on(&database).await;
    // A transport that ignores `grpc-timeout`: tonic's own would give up by itself.
    let transport = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let mut service = JobServiceClient::with_origin(transport, server.endpoint().parse().unwrap());
    let blocked = database.block_writes().await;
    for timeout in ["1n", "999u", "1m", "2m", "5m", "20m", "50m", "100m"] {
        let mut request = Request::new(new_job());
        request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        let error = service.create_job(request).await.unwrap_err();
        assert_error(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
    blocked.end().await;
    server.stop().await;
}
