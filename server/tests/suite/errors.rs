//! The contract's error table, row by row, on the wire.

use std::collections::BTreeMap;

use hyper_util::rt::TokioExecutor;
use jobledger_client::proto::{
    CreateJobRequest, GetJobRequest, GetStatisticsRequest, RetryPolicy, StreamJobEventsRequest, UpdateJobStatusRequest,
    job_service_client::JobServiceClient,
};
use prost_types::{ListValue, Struct, Value, value::Kind};
use sqlx::Executor as _;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::harness::{Database, PATIENCE, TestServer};

type Service = jobledger_client::RawClient;

/// Asserts an error's code and reason, and returns the metadata of its ErrorInfo.
#[track_caller]
fn assert_error(status: &Status, code: Code, reason: &str) -> BTreeMap<String, String> {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!((status.code(), info.reason.as_str(), info.domain.as_str()), (code, reason, "jobledger"), "{status:?}");
    assert!(!status.message().is_empty());
    assert!(status.details().len() < 4_096, "details travel in trailers");
    info.metadata.into_iter().collect()
}

#[track_caller]
fn assert_fields(status: &Status, fields: &[&str]) {
    assert_error(status, Code::InvalidArgument, "INVALID_FIELD");
    let violations = status.get_details_bad_request().expect("a BadRequest").field_violations;
    let found: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(found, fields, "{status:?}");
}

fn new_job() -> CreateJobRequest {
    CreateJobRequest { r#type: "t".to_owned(), ..Default::default() }
}

fn text(length: usize) -> Option<Value> {
    Some(Value { kind: Some(Kind::StringValue("x".repeat(length))) })
}

async fn create(service: &mut Service) -> String {
    service.create_job(new_job()).await.unwrap().into_inner().job.unwrap().id
}

async fn running(service: &mut Service) -> String {
    let job_id = create(service).await;
    service
        .update_job_status(UpdateJobStatusRequest { job_id: job_id.clone(), status: Some(2), ..Default::default() })
        .await
        .unwrap();
    job_id
}

#[tokio::test]
async fn bad_fields_of_a_create_are_all_named() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let mut refused = async |request: CreateJobRequest| service.create_job(request).await.unwrap_err();
    assert_fields(&refused(CreateJobRequest::default()).await, &["type"]);
    let long = "é".repeat(256);
    let request = CreateJobRequest {
        r#type: "a\nb".to_owned(),
        payload: Some(Value { kind: Some(Kind::NumberValue(f64::NAN)) }),
        priority: 1_001,
        idempotency_key: long.clone(),
        requested_by: long.clone(),
        labels: BTreeMap::from([(String::new(), "x".repeat(64))]),
        scheduled_at: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
        max_attempts: 101,
        retry_policy: Some(RetryPolicy {
            initial_backoff: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            multiplier: Some(0.5),
            max_backoff: Some(prost_types::Duration { seconds: 8 * 24 * 3_600, nanos: 0 }),
        }),
    };
    let all = [
        "idempotency_key",
        "type",
        "requested_by",
        "labels",
        "labels[]",
        "priority",
        "max_attempts",
        "retry_policy.initial_backoff",
        "retry_policy.max_backoff",
        "retry_policy.multiplier",
        "scheduled_at",
        "payload",
    ];
    assert_fields(&refused(request).await, &all);
    for bad in [
        CreateJobRequest { r#type: "x".repeat(101), ..new_job() },
        CreateJobRequest { r#type: "a\0".to_owned(), ..new_job() },
    ] {
        assert_fields(&refused(bad).await, &["type"]);
    }
    for priority in [-1_001, i32::MIN, i32::MAX] {
        assert_fields(&refused(CreateJobRequest { priority, ..new_job() }).await, &["priority"]);
    }
    let nul = Some(Value { kind: Some(Kind::StringValue("\0".to_owned())) });
    assert_fields(&refused(CreateJobRequest { payload: nul, ..new_job() }).await, &["payload"]);
    let none = Some(Value { kind: None });
    assert_fields(&refused(CreateJobRequest { payload: none, ..new_job() }).await, &["payload"]);
    let labels = (0..33).map(|n| (n.to_string(), String::new())).collect();
    assert_fields(&refused(CreateJobRequest { labels, ..new_job() }).await, &["labels"]);

    // On their bounds all are fine.
    let labels = (0..32).map(|n| (format!("{n:0>63}"), "é".repeat(63))).collect();
    let most = CreateJobRequest {
        r#type: "é".repeat(100),
        priority: -1_000,
        idempotency_key: "é".repeat(255),
        requested_by: "é".repeat(255),
        labels,
        max_attempts: 100,
        ..new_job()
    };
    service.create_job(most).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn bad_fields_of_an_update_are_all_named() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let job_id = running(&mut service).await;
    let update = UpdateJobStatusRequest { job_id, ..Default::default() };
    let mut refused = async |request: UpdateJobStatusRequest| service.update_job_status(request).await.unwrap_err();
    assert_fields(&refused(UpdateJobStatusRequest::default()).await, &["job_id"]);
    assert_fields(&refused(UpdateJobStatusRequest { job_id: "7".to_owned(), ..Default::default() }).await, &["job_id"]);
    for status in [0, 6, 99, -1] {
        assert_fields(&refused(UpdateJobStatusRequest { status: Some(status), ..update.clone() }).await, &["status"]);
    }
    let request = UpdateJobStatusRequest {
        stage: Some("é".repeat(101)),
        progress: Some(101),
        message: "x".repeat(4_097),
        result: text(1),
        error_code: "x".repeat(101),
        error_message: "x".repeat(4_097),
        retryable: Some(true),
        retry_after: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        ..update.clone()
    };
    let all = [
        "stage",
        "progress",
        "message",
        "result",
        "error_code",
        "error_message",
        "retryable",
        "retry_after",
        "error_code",
        "error_message",
        "retry_after",
    ];
    assert_fields(&refused(request).await, &all);
    assert_fields(&refused(UpdateJobStatusRequest { progress: Some(-1), ..update.clone() }).await, &["progress"]);
    for (status, field) in [(3, "error_code"), (1, "error_code")] {
        let request = UpdateJobStatusRequest { status: Some(status), error_code: "E".to_owned(), ..update.clone() };
        assert_fields(&refused(request).await, &[field]);
    }
    let most = UpdateJobStatusRequest {
        stage: Some("é".repeat(100)),
        progress: Some(100),
        message: "x".repeat(4_096),
        ..update
    };
    service.update_job_status(most).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn bad_fields_of_reads_streams_and_metadata_are_named() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let get = service.get_job(GetJobRequest { job_id: String::new() }).await.unwrap_err();
    assert_fields(&get, &["job_id"]);
    let types = vec![String::new(); 101];
    let statistics = service.get_statistics(GetStatisticsRequest { types }).await.unwrap_err();
    assert_error(&statistics, Code::InvalidArgument, "INVALID_FIELD");
    let request = StreamJobEventsRequest {
        job_id: "x".to_owned(),
        types: vec!["a\tb".to_owned()],
        statuses: vec![0, 7],
        after_seq: Some(-1),
        history_only: false,
    };
    let stream = service.stream_job_events(request).await.unwrap_err();
    assert_fields(&stream, &["job_id", "types", "statuses", "statuses", "after_seq"]);
    let request = StreamJobEventsRequest { statuses: vec![1; 1_000_000], ..Default::default() };
    assert_fields(&service.stream_job_events(request).await.unwrap_err(), &["statuses"]);
    let request = StreamJobEventsRequest { types: vec![String::new(); 1_000], ..Default::default() };
    let error = service.stream_job_events(request).await.unwrap_err();
    assert_eq!(error.get_details_bad_request().unwrap().field_violations.len(), 16, "not one for each");
    let mut request = Request::new(GetStatisticsRequest::default());
    request.metadata_mut().insert("x-org-id", "acme".parse().unwrap());
    assert_fields(&service.get_statistics(request).await.unwrap_err(), &["x-org-id"]);
    let mut request = Request::new(GetStatisticsRequest::default());
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    assert_fields(&service.get_statistics(request).await.unwrap_err(), &["grpc-timeout"]);
    server.stop().await;
}

#[tokio::test]
async fn a_value_over_the_limit_is_told_its_size() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let job_id = running(&mut service).await;
    // A string Value takes one byte for the tag and three for a length of this size.
    let (most, over) = (text((1 << 20) - 4), text((1 << 20) - 3));
    let expected = |field: &str| {
        BTreeMap::from(
            [("field", field), ("limit", "1048576"), ("size", "1048577")]
                .map(|(key, value)| (key.to_owned(), value.to_owned())),
        )
    };
    let error = service.create_job(CreateJobRequest { payload: over.clone(), ..new_job() }).await.unwrap_err();
    assert_eq!(assert_error(&error, Code::InvalidArgument, "PAYLOAD_TOO_LARGE"), expected("payload"));
    let end = UpdateJobStatusRequest { job_id, status: Some(3), ..Default::default() };
    let error = service.update_job_status(UpdateJobStatusRequest { result: over, ..end.clone() }).await.unwrap_err();
    assert_eq!(assert_error(&error, Code::InvalidArgument, "PAYLOAD_TOO_LARGE"), expected("result"));
    service.create_job(CreateJobRequest { payload: most.clone(), ..new_job() }).await.unwrap();
    service.update_job_status(UpdateJobStatusRequest { result: most.clone(), ..end.clone() }).await.unwrap();
    let read = service.get_job(GetJobRequest { job_id: end.job_id }).await.unwrap().into_inner().job.unwrap();
    assert_eq!(read.result, most);
    server.stop().await;
}

/// `depth` lists in each other.
fn nested(depth: usize) -> Option<Value> {
    let mut value = Value { kind: Some(Kind::BoolValue(true)) };
    for _ in 0..depth {
        value = Value { kind: Some(Kind::ListValue(ListValue { values: vec![value] })) };
    }
    Some(value)
}

/// `depth` objects in each other, each of which takes three nested messages.
fn nested_objects(depth: usize) -> Option<Value> {
    let mut value = Value { kind: Some(Kind::BoolValue(true)) };
    for _ in 0..depth {
        let fields = BTreeMap::from([("a".to_owned(), value)]);
        value = Value { kind: Some(Kind::StructValue(Struct { fields })) };
    }
    Some(value)
}

#[tokio::test]
async fn what_is_stored_can_be_read_however_deep_it_is() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    for most in [nested(32), nested_objects(32)] {
        let job_id = running(&mut service).await;
        let end = UpdateJobStatusRequest {
            job_id: job_id.clone(),
            status: Some(3),
            result: most.clone(),
            ..Default::default()
        };
        service.update_job_status(end).await.unwrap();
        let read = service.get_job(GetJobRequest { job_id: job_id.clone() }).await.unwrap().into_inner();
        assert_eq!(read.job.unwrap().result, most);
        let stream = StreamJobEventsRequest { job_id, ..Default::default() };
        let mut stream = service.stream_job_events(stream).await.unwrap().into_inner();
        while stream.message().await.expect("each message can be decoded").is_some() {}
        let created =
            service.create_job(CreateJobRequest { payload: most.clone(), ..new_job() }).await.unwrap().into_inner();
        let job_id = created.job.unwrap().id;
        assert_eq!(service.get_job(GetJobRequest { job_id }).await.unwrap().into_inner().job.unwrap().payload, most);
    }
    for over in [nested(33), nested_objects(33)] {
        let error = service.create_job(CreateJobRequest { payload: over, ..new_job() }).await.unwrap_err();
        assert_fields(&error, &["payload"]);
    }
    for far_over in [nested(90), nested_objects(90)] {
        let error = service.create_job(CreateJobRequest { payload: far_over, ..new_job() }).await.unwrap_err();
        assert_fields(&error, &["(message)"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_message_that_is_too_large_or_garbage_is_told_so() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let error = service.create_job(CreateJobRequest { payload: text(5 << 20), ..new_job() }).await.unwrap_err();
    let metadata = assert_error(&error, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    assert_eq!(metadata, BTreeMap::from([("limit".to_owned(), "4194304".to_owned())]));

    // A request of another shape: field 1 as a number where the service wants text.
    let mut raw =
        tonic::client::Grpc::new(tonic::transport::Endpoint::from_shared(server.endpoint()).unwrap().connect_lazy());
    raw.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<prost_types::Duration, GetJobRequest>::default();
    let path = http::uri::PathAndQuery::from_static("/jobledger.v1.JobService/GetJob");
    let garbage = Request::new(prost_types::Duration { seconds: 7, nanos: 0 });
    let error = raw.unary(garbage, path, codec).await.unwrap_err();
    assert_fields(&error, &["(message)"]);
    server.stop().await;
}

#[tokio::test]
async fn fields_are_checked_before_existence() {
    let (_database, server, client) = TestServer::fresh().await;
    let job_id = "01890a5d-ac96-774b-bcce-b302099a8057".to_owned();
    let update = UpdateJobStatusRequest { job_id, progress: Some(101), ..Default::default() };
    assert_fields(&client.raw().update_job_status(update).await.unwrap_err(), &["progress"]);
    server.stop().await;
}

#[tokio::test]
async fn an_unknown_job_is_not_found() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let job_id = "01890a5d-ac96-774b-bcce-b302099a8057".to_owned();
    let expected = BTreeMap::from([("job_id".to_owned(), job_id.clone())]);
    let get = service.get_job(GetJobRequest { job_id: job_id.clone() }).await.unwrap_err();
    assert_eq!(assert_error(&get, Code::NotFound, "JOB_NOT_FOUND"), expected);
    let update = UpdateJobStatusRequest { job_id: job_id.clone(), etag: "1".to_owned(), ..Default::default() };
    let update = service.update_job_status(update).await.unwrap_err();
    assert_eq!(assert_error(&update, Code::NotFound, "JOB_NOT_FOUND"), expected);
    let stream = StreamJobEventsRequest { job_id, after_seq: Some(5), ..Default::default() };
    let stream = service.stream_job_events(stream).await.unwrap_err();
    assert_eq!(assert_error(&stream, Code::NotFound, "JOB_NOT_FOUND"), expected);
    server.stop().await;
}

#[tokio::test]
async fn a_key_with_another_request_names_the_existing_job() {
    let (_database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let keyed = CreateJobRequest { idempotency_key: "k".to_owned(), payload: text(1), ..new_job() };
    let id = service.create_job(keyed.clone()).await.unwrap().into_inner().job.unwrap().id;
    let again = service.create_job(keyed.clone()).await.unwrap().into_inner();
    assert_eq!((again.deduplicated, again.job.unwrap().id), (true, id.clone()));
    // Also one that spells out a default: requests are compared as they came.
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

#[tokio::test]
async fn what_the_state_machine_forbids_names_the_status() {
    let (_database, server, client) = TestServer::fresh().await;
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

#[tokio::test]
async fn checks_run_in_order_repetition_lease_etag_transition() {
    let (_database, server, client) = TestServer::fresh().await;
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

#[tokio::test]
async fn cursors_outside_of_the_log_are_out_of_range() {
    let (database, server, client) = TestServer::fresh().await;
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

    database.connect().await.execute("UPDATE org_head SET floor_seq = 4").await.unwrap();
    for expired in [0, 2] {
        let error = service.stream_job_events(after(expired)).await.unwrap_err();
        assert_eq!(assert_error(&error, Code::OutOfRange, "CURSOR_EXPIRED"), expected("4"));
    }
    service.stream_job_events(after(3)).await.expect("what comes after it is kept");
    let of_job = StreamJobEventsRequest { job_id, ..after(0) };
    service.stream_job_events(of_job).await.expect("a job that exists has its whole history");
    server.stop().await;
}

#[tokio::test]
async fn too_many_types_and_too_many_commands_are_exhaustion() {
    let database = Database::new();
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

#[tokio::test]
async fn too_many_streams_are_exhaustion_until_one_ends() {
    let database = Database::new();
    let mut config = database.config();
    config.limits.streams = 2;
    let server = TestServer::start(config).await;
    let mut service = server.client().raw();
    let request = StreamJobEventsRequest::default();
    let first = service.stream_job_events(request.clone()).await.unwrap();
    let _second = service.stream_job_events(request.clone()).await.unwrap();
    let error = service.stream_job_events(request.clone()).await.unwrap_err();
    assert_error(&error, Code::ResourceExhausted, "TOO_MANY_STREAMS");
    assert!(error.get_details_retry_info().is_some());
    drop(first);
    // The server hears of it on its connection, which takes a moment.
    let again = async { while service.stream_job_events(request.clone()).await.is_err() {} };
    tokio::time::timeout(PATIENCE, again).await.expect("a place is free again");
    server.stop().await;
}

#[tokio::test]
async fn what_the_database_refuses_is_internal_and_says_nothing_of_the_database() {
    let (database, server, client) = TestServer::fresh().await;
    let trigger = "CREATE TRIGGER poison BEFORE INSERT ON job BEGIN SELECT RAISE(ABORT, 'secret'); END";
    database.connect().await.execute(trigger).await.unwrap();
    let error = client.raw().create_job(new_job()).await.unwrap_err();
    assert_error(&error, Code::Internal, "REFUSED_BY_DATABASE");
    assert!(!error.message().contains("secret"));
    server.stop().await;
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_unavailable_and_comes_back() {
    let (database, server, client) = TestServer::fresh().await;
    let mut service = client.raw();
    let mut other = database.connect().await;
    // Longer than the server waits for another writer.
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let error = service.create_job(new_job()).await.unwrap_err();
    assert_error(&error, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert!(error.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()));
    assert!(!error.message().contains("lock"), "the database's words stay in the log: {}", error.message());
    service.get_statistics(GetStatisticsRequest::default()).await.expect("reads go on");
    other.execute("ROLLBACK").await.unwrap();
    service.create_job(new_job()).await.expect("and writes when it is back");
    server.stop().await;
}

#[tokio::test]
async fn a_passed_deadline_is_deadline_exceeded() {
    let (database, server, _) = TestServer::fresh().await;
    // A transport that leaves `grpc-timeout` alone: tonic's own would give up by itself.
    let transport = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let mut service = JobServiceClient::with_origin(transport, server.endpoint().parse().unwrap());
    let mut other = database.connect().await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    for timeout in ["1n", "999u", "1m", "2m", "5m", "20m", "50m", "100m"] {
        let mut request = Request::new(new_job());
        request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        let error = service.create_job(request).await.unwrap_err();
        assert_error(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
    other.execute("ROLLBACK").await.unwrap();
    server.stop().await;
}
