//! The bounds of request fields: every bound of every field, and which violations are reported.

use std::collections::BTreeMap;

use jobledger_client::proto::{
    CreateJobRequest, GetJobRequest, GetStatisticsRequest, RetryPolicy, StreamJobEventsRequest, UpdateJobStatusRequest,
};
use prost_types::{ListValue, Struct, Value, value::Kind};
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::{
    jobs::errors::{assert_error, assert_fields, new_job, running, text},
    support::harness::{Database, TestServer, on_both_databases},
};

on_both_databases! {
    bad_fields_of_a_create_are_all_named,
    bad_fields_of_an_update_are_all_named,
    bad_fields_of_reads_streams_and_metadata_are_named,
    fields_are_checked_before_existence,
    a_value_over_the_limit_is_told_its_size,
    what_is_stored_can_be_read_however_deep_it_is,
    a_message_that_is_too_large_or_garbage_is_told_so,
}

async fn bad_fields_of_a_create_are_all_named(database: Database) {
    let (server, client) = TestServer::on(&database).await;
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
        run_timeout: Some(prost_types::Duration { seconds: 0, nanos: 999_999_999 }),
        max_lost_attempts: Some(101),
    };
    let all = [
        "idempotency_key",
        "type",
        "requested_by",
        "labels",
        "labels[]",
        "priority",
        "max_attempts",
        "max_lost_attempts",
        "retry_policy.initial_backoff",
        "retry_policy.max_backoff",
        "retry_policy.multiplier",
        "scheduled_at",
        "run_timeout",
        "payload",
    ];
    assert_fields(&refused(request).await, &all);
    for bad in [
        CreateJobRequest { r#type: "x".repeat(101), ..new_job() },
        CreateJobRequest { r#type: "a\0".to_owned(), ..new_job() },
    ] {
        assert_fields(&refused(bad).await, &["type"]);
    }
    for lost in [-1, i32::MAX] {
        let request = CreateJobRequest { max_lost_attempts: Some(lost), ..new_job() };
        assert_fields(&refused(request).await, &["max_lost_attempts"]);
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

    // Values on their bounds are accepted.
    let labels = (0..32).map(|n| (format!("{n:0>63}"), "é".repeat(63))).collect();
    let most = CreateJobRequest {
        r#type: "é".repeat(100),
        priority: -1_000,
        idempotency_key: "é".repeat(255),
        requested_by: "é".repeat(255),
        labels,
        max_attempts: 100,
        max_lost_attempts: Some(100),
        ..new_job()
    };
    service.create_job(most).await.unwrap();
    server.stop().await;
}

async fn bad_fields_of_an_update_are_all_named(database: Database) {
    let (server, client) = TestServer::on(&database).await;
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

async fn bad_fields_of_reads_streams_and_metadata_are_named(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let get = service.get_job(GetJobRequest { job_id: String::new(), ..Default::default() }).await.unwrap_err();
    assert_fields(&get, &["job_id"]);
    let types = vec![String::new(); 101];
    let statistics = service.get_statistics(GetStatisticsRequest { types, ..Default::default() }).await.unwrap_err();
    assert_error(&statistics, Code::InvalidArgument, "INVALID_FIELD");
    let request = StreamJobEventsRequest {
        job_id: "x".to_owned(),
        types: vec!["a\tb".to_owned()],
        statuses: vec![0, 7],
        after_seq: Some(-1),
        labels: BTreeMap::from([(String::new(), String::new())]),
        include_snapshot: true,
        log_id: "x".to_owned(),
        ..Default::default()
    };
    let stream = service.stream_job_events(request).await.unwrap_err();
    assert_fields(
        &stream,
        &["job_id", "types", "statuses", "statuses", "labels", "after_seq", "include_snapshot", "log_id"],
    );
    let request = StreamJobEventsRequest { statuses: vec![1; 200_000], ..Default::default() };
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

async fn fields_are_checked_before_existence(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let job_id = "01890a5d-ac96-774b-bcce-b302099a8057".to_owned();
    let update = UpdateJobStatusRequest { job_id, progress: Some(101), ..Default::default() };
    assert_fields(&client.raw().update_job_status(update).await.unwrap_err(), &["progress"]);
    server.stop().await;
}

async fn a_value_over_the_limit_is_told_its_size(database: Database) {
    let (server, client) = TestServer::on(&database).await;
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
    let read = service
        .get_job(GetJobRequest { job_id: end.job_id, ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .job
        .unwrap();
    assert_eq!(read.result, most);
    server.stop().await;
}

/// `depth` nested lists.
fn nested(depth: usize) -> Option<Value> {
    let mut value = Value { kind: Some(Kind::BoolValue(true)) };
    for _ in 0..depth {
        value = Value { kind: Some(Kind::ListValue(ListValue { values: vec![value] })) };
    }
    Some(value)
}

/// `depth` nested objects, each of which takes three nested messages.
fn nested_objects(depth: usize) -> Option<Value> {
    let mut value = Value { kind: Some(Kind::BoolValue(true)) };
    for _ in 0..depth {
        let fields = BTreeMap::from([("a".to_owned(), value)]);
        value = Value { kind: Some(Kind::StructValue(Struct { fields })) };
    }
    Some(value)
}

async fn what_is_stored_can_be_read_however_deep_it_is(database: Database) {
    let (server, client) = TestServer::on(&database).await;
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
        let read =
            service.get_job(GetJobRequest { job_id: job_id.clone(), ..Default::default() }).await.unwrap().into_inner();
        assert_eq!(read.job.unwrap().result, most);
        let stream = StreamJobEventsRequest { job_id, ..Default::default() };
        let mut stream = service.stream_job_events(stream).await.unwrap().into_inner();
        while stream.message().await.expect("each message can be decoded").is_some() {}
        let created =
            service.create_job(CreateJobRequest { payload: most.clone(), ..new_job() }).await.unwrap().into_inner();
        let job_id = created.job.unwrap().id;
        assert_eq!(
            service
                .get_job(GetJobRequest { job_id, ..Default::default() })
                .await
                .unwrap()
                .into_inner()
                .job
                .unwrap()
                .payload,
            most
        );
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

async fn a_message_that_is_too_large_or_garbage_is_told_so(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    let error = service.create_job(CreateJobRequest { payload: text(5 << 20), ..new_job() }).await.unwrap_err();
    let metadata = assert_error(&error, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    assert_eq!(metadata, BTreeMap::from([("limit".to_owned(), "4194304".to_owned())]));

    // A request of another shape: field 1 is a number where the service expects text.
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
