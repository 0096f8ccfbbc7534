//! Batch calls: many jobs, or many reports, in one call.

use jobledger_client::{
    Claim, Error, JobStatus, NewJob, Report,
    proto::{BatchCreateJobsRequest, BatchUpdateJobStatusRequest, HeartbeatRequest, LeaseHeartbeat},
};
use tonic::Code;

use crate::support::harness::{Database, TestServer, on_both_databases};

on_both_databases! {
    a_thousand_jobs_live_in_three_calls_each,
    one_bad_item_does_not_fail_the_others,
    too_many_items_are_refused_as_a_whole,
}

async fn a_thousand_jobs_live_in_three_calls_each(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let created = client.create_all((0..1_000).map(|_| NewJob::new("t"))).await.unwrap();
    let jobs: Vec<_> = created.into_iter().map(|created| created.unwrap().job).collect();
    assert_eq!(jobs.iter().map(|job| job.last_seq).collect::<Vec<_>>(), (1..=1_000).collect::<Vec<_>>(), "in order");
    assert!(jobs[0].r#type.is_empty() && jobs[0].created_at.is_some() && jobs[0].etag == "1");
    let mut reports = Vec::new();
    loop {
        let leases = client.claim(Claim::new("w").max_jobs(100)).await.unwrap();
        if leases.is_empty() {
            break;
        }
        reports
            .extend(leases.into_iter().map(|lease| Report::succeeded(lease.job.unwrap().id).lease(lease.lease_token)));
    }
    assert_eq!(reports.len(), 1_000);
    for _ in 0..2 {
        let ended = client.update_all(reports.clone()).await.unwrap();
        assert!(ended.into_iter().all(|ended| ended.unwrap().job.status() == JobStatus::Succeeded));
    }
    let statistics = client.statistics(&[]).await.unwrap();
    assert_eq!((statistics.counts.unwrap().succeeded, statistics.as_of_seq), (1_000, 3_000));
    server.stop().await;
}

async fn one_bad_item_does_not_fail_the_others(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let keyed = |priority| NewJob::new("t").idempotency_key("k").priority(priority);
    let jobs = [keyed(1), NewJob::new(""), keyed(1), keyed(2), NewJob::new("t").priority(9_999)];
    let created = client.create_all(jobs).await.unwrap();
    let [first, empty, again, other, far] = &created[..] else { panic!("five results") };
    let first = first.as_ref().unwrap();
    assert!(
        !first.deduplicated && again.as_ref().is_ok_and(|again| again.deduplicated && again.job.id == first.job.id)
    );
    assert!(matches!(empty, Err(Error::InvalidRequest { violations, .. }) if violations[0].field == "type"));
    assert!(matches!(other, Err(Error::IdempotencyKeyReused { existing_job_id }) if *existing_job_id == first.job.id));
    assert!(matches!(far, Err(Error::InvalidRequest { violations, .. }) if violations[0].field == "priority"));

    let id = &first.job.id;
    let reports = [
        Report::start(id),
        Report::progress("nonsense"),
        Report::progress("00000000-0000-0000-0000-000000000001"),
        Report::canceled(id),
        Report::succeeded(id),
        Report::failed(id, "E", ""),
    ];
    let updated = client.update_all(reports).await.unwrap();
    let [started, nonsense, unknown, canceled, succeeded, failed] = &updated[..] else { panic!("six results") };
    assert!(started.as_ref().is_ok_and(|started| started.job.status() == JobStatus::Running));
    assert!(matches!(nonsense, Err(Error::InvalidRequest { .. })));
    assert!(matches!(unknown, Err(Error::JobNotFound { .. })));
    assert!(matches!(canceled, Err(Error::InvalidTransition { current: JobStatus::Running })));
    assert!(succeeded.as_ref().is_ok_and(|succeeded| succeeded.job.status() == JobStatus::Succeeded));
    assert!(matches!(failed, Err(Error::InvalidTransition { current: JobStatus::Succeeded })));
    server.stop().await;
}

async fn too_many_items_are_refused_as_a_whole(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut service = client.raw();
    for n in [0, 1_001] {
        let requests = vec![NewJob::new("t").into(); n];
        let refused = service.batch_create_jobs(BatchCreateJobsRequest { requests }).await.unwrap_err();
        assert_eq!((refused.code(), Error::from(refused).is_unavailable()), (Code::InvalidArgument, false));
        let updates = vec![Report::start("x").into(); n];
        let refused = service.batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let leases = vec![LeaseHeartbeat::default(); n];
        let beat = HeartbeatRequest { worker_id: "w".to_owned(), leases, extend_by: None };
        assert_eq!(service.heartbeat(beat).await.unwrap_err().code(), Code::InvalidArgument);
    }
    assert_eq!(client.statistics(&[]).await.unwrap().as_of_seq, 0);
    server.stop().await;
}
