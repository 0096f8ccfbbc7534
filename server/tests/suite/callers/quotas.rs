//! Quotas. An org at its quota can't create, other orgs have room, and running jobs come to their end.

use std::time::Duration;

use jobledger_client::{
    Claim, Client, NewJob, Report,
    proto::{
        BatchCreateJobsRequest, ClaimJobsRequest, CreateJobRequest, GetJobRequest, HeartbeatRequest, LeaseHeartbeat,
        RetryJobRequest, UpdateJobStatusRequest, wait_reason::Reason,
    },
};
use jobledger_server::domain::status::JobStatus;
use serde_json::json;
use tokio::time::timeout;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::{
    jobs::errors::assert_error,
    stores::retention::keep,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    an_org_has_so_many_jobs_and_no_more,
    an_org_has_so_many_bytes_and_what_runs_comes_to_its_end,
    what_an_org_has_is_known_to_a_server_that_is_new,
}

#[track_caller]
fn assert_quota(refused: &Status, quota: &str, limit: u64) {
    let metadata = assert_error(refused, Code::ResourceExhausted, "QUOTA_EXCEEDED");
    let expected = [("limit".to_owned(), limit.to_string()), ("quota".to_owned(), quota.to_owned())];
    assert_eq!(Vec::from_iter(metadata), expected);
}

async fn create(client: &Client, job: NewJob) -> Result<String, Status> {
    let created = client.raw().create_job(CreateJobRequest::from(job)).await?;
    Ok(created.into_inner().job.expect("it has a job").id)
}

async fn an_org_has_so_many_jobs_and_no_more(database: Database) {
    let mut config = database.config();
    config.limits.jobs_per_org = Some(4);
    // Long enough for the checks that need these jobs.
    config.retention = keep(JobStatus::Canceled, Duration::from_millis(500));
    let server = TestServer::start(config).await;
    let client = server.client();
    let keyed = || NewJob::new("t").idempotency_key("one").payload(&json!({ "n": 1 })).unwrap();
    let first = create(&client, keyed()).await.unwrap();
    let mut service = client.raw();
    let of_batch = service
        .batch_create_jobs(BatchCreateJobsRequest { requests: (0..4).map(|_| NewJob::new("t").into()).collect() });
    let results = of_batch.await.unwrap().into_inner().results;
    let refused: Vec<_> = results.iter().filter_map(|result| result.error.as_ref()).collect();
    assert_eq!((results.len(), refused.len()), (4, 1), "as many as there is room for");
    assert_eq!(refused[0].code, Code::ResourceExhausted as i32, "{refused:?}");
    assert_quota(&create(&client, NewJob::new("t")).await.unwrap_err(), "jobs", 4);
    assert_eq!(create(&client, keyed()).await.unwrap(), first, "it is there already");
    let mut request = tonic::Request::new(CreateJobRequest::from(NewJob::new("t")));
    request.metadata_mut().insert("x-org-id", Uuid::new_v4().to_string().parse().unwrap());
    client.raw().create_job(request).await.expect("another org has room of its own");

    // A removed job makes room for another.
    client
        .raw()
        .cancel_job(jobledger_client::proto::CancelJobRequest { job_id: first, ..Default::default() })
        .await
        .unwrap();
    let comes = async {
        while let Err(refused) = create(&client, NewJob::new("t")).await {
            assert_quota(&refused, "jobs", 4);
        }
    };
    timeout(PATIENCE, comes).await.expect("retention makes room");
    server.stop().await;
    database.verify().await;
}

async fn an_org_has_so_many_bytes_and_what_runs_comes_to_its_end(database: Database) {
    const LIMIT: u64 = 100_000;
    let mut config = database.config();
    config.limits.bytes_per_org = Some(LIMIT);
    let server = TestServer::start(config).await;
    let client = server.client();
    let mut service = client.raw();
    let running = create(&client, NewJob::new("t").max_attempts(2)).await.unwrap();
    let ended = create(&client, NewJob::new("ends")).await.unwrap();
    let waits = create(&client, NewJob::new("waits")).await.unwrap();
    let of_type = |name: &str| Claim::new("w").types([name]);
    let lease = client.claim(of_type("t")).await.unwrap().remove(0);
    let other = client.claim(of_type("ends")).await.unwrap().remove(0);
    client.update(Report::failed(&ended, "broken", "it broke").permanent().lease(&other.lease_token)).await.unwrap();

    let large = || NewJob::new("t").payload(&json!({ "text": "x".repeat(30_000) })).unwrap();
    for _ in 0..3 {
        create(&client, large()).await.unwrap();
    }
    assert_quota(&create(&client, large()).await.unwrap_err(), "bytes", LIMIT);
    create(&client, NewJob::new("t")).await.expect("a small one has room");

    // Progress may use a quarter more than the limit. Meanwhile nothing is created, retried, claimed or started.
    let mut reports = 0;
    let refused = loop {
        let report = Report::progress(&running).message("y".repeat(1_000)).lease(&lease.lease_token);
        match service.update_job_status(UpdateJobStatusRequest::from(report)).await {
            Ok(_) => reports += 1,
            Err(refused) => break refused,
        }
        assert!(reports < 100, "it ends");
    };
    assert_quota(&refused, "bytes", LIMIT);
    assert!((15..40).contains(&reports), "a quarter of the limit is for {reports}");
    assert_quota(&create(&client, NewJob::new("t")).await.unwrap_err(), "bytes", LIMIT);
    let again = RetryJobRequest { job_id: ended, ..Default::default() };
    assert_quota(&service.retry_job(again).await.unwrap_err(), "bytes", LIMIT);
    let claim = ClaimJobsRequest { worker_id: "w".to_owned(), types: vec!["waits".to_owned()], ..Default::default() };
    assert_quota(&service.claim_jobs(claim).await.unwrap_err(), "bytes", LIMIT);
    let explained = client.explain(&waits).await.unwrap();
    let reason = explained.reasons.iter().find_map(|reason| match reason.reason.as_ref()? {
        Reason::OverQuota(over) => Some((over.quota.clone(), over.limit)),
        _ => None,
    });
    assert_eq!((reason, explained.next), (Some(("bytes".to_owned(), LIMIT as i64)), false));
    let start = UpdateJobStatusRequest::from(Report::start(waits));
    assert_quota(&service.update_job_status(start).await.unwrap_err(), "bytes", LIMIT);

    // The lease is extended, and the job's outcome is accepted.
    let beat = LeaseHeartbeat { lease_token: lease.lease_token.clone(), progress: Some(77), ..Default::default() };
    let request = HeartbeatRequest { worker_id: "w".to_owned(), leases: vec![beat], ..Default::default() };
    let results = service.heartbeat(request).await.unwrap().into_inner().results;
    assert!(results[0].expires_at.is_some(), "{results:?}");
    let get = || GetJobRequest { job_id: running.clone(), ..Default::default() };
    let job = service.get_job(get()).await.unwrap().into_inner().job.unwrap();
    assert_ne!(job.progress, Some(77), "what it tells has no room");
    client.update(Report::succeeded(&running).result(&"done").unwrap().lease(&lease.lease_token)).await.unwrap();
    server.stop().await;
    database.verify().await;
}

async fn what_an_org_has_is_known_to_a_server_that_is_new(database: Database) {
    let limited = |jobs| {
        let mut config = database.config();
        config.limits.jobs_per_org = Some(jobs);
        TestServer::start(config)
    };
    let server = limited(10).await;
    for _ in 0..3 {
        create(&server.client(), NewJob::new("t")).await.unwrap();
    }
    server.stop().await;
    let server = limited(4).await;
    create(&server.client(), NewJob::new("t")).await.unwrap();
    assert_quota(&create(&server.client(), NewJob::new("t")).await.unwrap_err(), "jobs", 4);
    server.stop().await;
    database.verify().await;
}
