//! Leases over the wire: how they last, how they end, and what a worker may do after its lease.

use std::time::Duration;

use jobledger_client::{
    Claim, Client, Error, Follow, HeartbeatRequest, HeartbeatResult, Item, Job, JobEventKind, JobStatus, Lease,
    LeaseHeartbeat, ListJobsRequest, NewJob, Report, RetryPolicy, prost_types, proto::GetStatisticsRequest,
};
use tokio::time::timeout;

use crate::support::harness::{Database, PATIENCE, TestServer, await_kind, on_both_databases};

on_both_databases! {
    a_lost_attempt_is_no_failure_and_the_next_holder_is_not_disturbed,
    attempts_are_lost_as_often_as_the_job_allows_and_counted_everywhere,
    heartbeats_keep_a_lease_and_bring_news_both_ways,
    bad_news_of_one_lease_costs_no_lease_anything,
    a_job_that_is_held_is_canceled_by_its_holder,
    a_job_that_nobody_holds_is_canceled_at_once,
    an_attempt_takes_no_longer_than_it_may,
    a_finished_job_runs_again_once_per_request,
    a_report_on_a_held_job_needs_its_token,
}

const SHORT: Duration = Duration::from_secs(1);

async fn claim_one(client: &Client, lease: Duration) -> (String, Lease) {
    let claim = Claim::new("w").lease(lease).wait(Duration::from_secs(60));
    let mut leases = timeout(PATIENCE, client.claim(claim)).await.unwrap().unwrap();
    assert_eq!(leases.len(), 1);
    let lease = leases.remove(0);
    (lease.job.as_ref().unwrap().id.clone(), lease)
}

async fn beat(client: &Client, beats: Vec<LeaseHeartbeat>, extend_by: Option<i64>) -> Vec<HeartbeatResult> {
    let extend_by = extend_by.map(|seconds| jobledger_client::prost_types::Duration { seconds, nanos: 0 });
    client.heartbeat(HeartbeatRequest { worker_id: "w".to_owned(), leases: beats, extend_by }).await.unwrap()
}

/// Sends heartbeats of worker `w` without news. Panics if a lease is lost.
pub(crate) async fn keep(client: &Client, leases: &[Lease], extend_by: impl Into<Option<i64>>) {
    let answers = beat(client, leases.iter().map(of).collect(), extend_by.into()).await;
    assert!(answers.iter().all(|answer| !answer.lease_lost), "{answers:?}");
}

fn of(lease: &Lease) -> LeaseHeartbeat {
    LeaseHeartbeat { lease_token: lease.lease_token.clone(), ..LeaseHeartbeat::default() }
}

async fn kinds(client: &Client, id: &str) -> Vec<JobEventKind> {
    let mut events = client.subscribe(Follow::job(id).history_only()).await.unwrap();
    let mut kinds = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            kinds.push(event.kind());
        }
    }
    kinds
}

async fn a_lost_attempt_is_no_failure_and_the_next_holder_is_not_disturbed(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let job = client.create(NewJob::new("t")).await.unwrap().job.id;
    let (_, stale) = claim_one(&client, SHORT).await;
    // The first worker sends nothing, so the second gets the job after the backoff.
    let (id, lease) = claim_one(&client, Duration::from_secs(3_600)).await;
    assert_eq!(id, job);
    let lost = client.get(&job).await.unwrap();
    assert_eq!((lost.last_error_code.as_str(), lost.attempt), ("LEASE_EXPIRED", 2));
    assert_eq!((lost.failures, lost.max_attempts, lost.lost_attempts, lost.max_lost_attempts), (0, 1, 1, 3));

    assert!(
        beat(&client, vec![of(&stale), of(&lease)], None)
            .await
            .iter()
            .map(|result| result.lease_lost)
            .eq([true, false])
    );
    for report in [Report::succeeded(&job), Report::progress(&job).percent(9), Report::failed(&job, "E", "")] {
        let refused = client.update(report.lease(&stale.lease_token)).await.unwrap_err();
        assert!(matches!(refused, Error::LeaseLost), "{refused}");
    }
    client.update(Report::succeeded(&job).lease(&lease.lease_token)).await.unwrap();
    let refused = client.update(Report::succeeded(&job).lease(&stale.lease_token)).await.unwrap_err();
    assert!(matches!(refused, Error::LeaseLost), "{refused}");
    client.update(Report::succeeded(&job).lease(&lease.lease_token)).await.expect("its holder may say it again");
    let expected = [
        JobEventKind::Created,
        JobEventKind::Claimed,
        JobEventKind::Lost,
        JobEventKind::Claimed,
        JobEventKind::Succeeded,
    ];
    assert_eq!(kinds(&client, &job).await, expected);
    server.stop().await;
}

async fn attempts_are_lost_as_often_as_the_job_allows_and_counted_everywhere(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let soon = RetryPolicy {
        initial_backoff: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
        ..RetryPolicy::default()
    };
    let once = client.create(NewJob::new("once").max_lost_attempts(0)).await.unwrap().job.id;
    let job = NewJob::new("often").max_attempts(2).max_lost_attempts(2).retry_policy(soon);
    let often = client.create(job).await.unwrap().job.id;
    let claim = |name: &str| Claim::new("w").types([name]).lease(SHORT).wait(Duration::from_secs(60));
    client.claim(claim("once")).await.unwrap();
    await_kind(&client, &once, JobEventKind::Failed).await;
    // Two attempts are lost, then the others fail, up to the budget.
    for _ in 0..4 {
        assert_eq!(client.claim(claim("often")).await.unwrap().len(), 1);
    }
    await_kind(&client, &often, JobEventKind::DeadLettered).await;
    use JobEventKind::{Claimed, Created, DeadLettered, Failed, Lost, RetryScheduled};
    assert_eq!(kinds(&client, &once).await, [Created, Claimed, Failed]);
    let expected =
        [Created, Claimed, Lost, Claimed, Lost, Claimed, Failed, RetryScheduled, Claimed, Failed, DeadLettered];
    assert_eq!(kinds(&client, &often).await, expected);

    let counts = |job: &Job| (job.status(), job.attempt, job.failures, job.lost_attempts);
    let listed = client.list(ListJobsRequest::default()).await.unwrap().jobs;
    let expected = [(JobStatus::DeadLetter, 4, 2, 2), (JobStatus::Failed, 1, 1, 0)];
    assert_eq!(listed.iter().map(counts).collect::<Vec<_>>(), expected);
    let window = Some(prost_types::Duration { seconds: 3_600, nanos: 0 });
    let request = GetStatisticsRequest { types: Vec::new(), window, series: true };
    let statistics = client.statistics_of(request).await.unwrap();
    let happened = statistics.happened.unwrap();
    assert_eq!((happened.started, happened.failed, happened.lost), (5, 3, 2));
    assert!(statistics.per_minute.unwrap().lost > 0.0);
    let of_points = statistics.series[0].points.iter().filter_map(|point| point.happened);
    assert_eq!(of_points.map(|happened| happened.lost).sum::<i64>(), 2);
    let again = client.retry(&often).await.unwrap();
    assert_eq!(counts(&again), (JobStatus::Queued, 4, 0, 0), "a fresh budget of both");
    server.stop().await;
    database.verify().await;
}

async fn heartbeats_keep_a_lease_and_bring_news_both_ways(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let [kept, dropped] = [(); 2].map(|()| client.create(NewJob::new("t").max_attempts(2)));
    let (kept, dropped) = (kept.await.unwrap().job.id, dropped.await.unwrap().job.id);
    let (first, held) = claim_one(&client, SHORT).await;
    let (second, lost) = claim_one(&client, SHORT).await;
    assert_eq!((&first, &second), (&kept, &dropped));

    let news = LeaseHeartbeat {
        stage: Some("scaling".to_owned()),
        progress: Some(40),
        message: "half way".to_owned(),
        ..of(&held)
    };
    let nobodys = LeaseHeartbeat { lease_token: "nobody's".to_owned(), ..LeaseHeartbeat::default() };
    let results = beat(&client, vec![nobodys, news], Some(3_600)).await;
    assert!(results[0].lease_lost && results[0].expires_at.is_none());
    assert!(
        !results[1].lease_lost && results[1].expires_at.unwrap().seconds > held.expires_at.unwrap().seconds + 3_000
    );
    let job = client.get(&kept).await.unwrap();
    assert_eq!(
        (job.stage.as_deref(), job.progress, job.lease_expires_at),
        (Some("scaling"), Some(40), results[1].expires_at)
    );

    // The second lease is not extended, and expires. By then the first would have expired, too.
    await_kind(&client, &dropped, JobEventKind::Lost).await;
    assert_eq!(client.get(&kept).await.unwrap().status(), JobStatus::Running);
    let results = beat(&client, vec![of(&lost), of(&held)], None).await;
    assert_eq!(results[1].expires_at, job.lease_expires_at, "a heartbeat never shortens a lease");
    assert!(results[0].lease_lost);

    client.cancel(&kept, "no longer wanted").await.unwrap();
    let results = beat(&client, vec![of(&held)], None).await;
    assert!(results[0].cancel_requested && !results[0].lease_lost);
    server.stop().await;
}

async fn bad_news_of_one_lease_costs_no_lease_anything(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create_all((0..3).map(|_| NewJob::new("t"))).await.unwrap();
    let leases = client.claim(Claim::new("w").max_jobs(3).lease(Duration::from_secs(2))).await.unwrap();
    let mut beats: Vec<_> = leases.iter().map(of).collect();
    beats[0].progress = Some(10);
    beats[1].stage = Some("x".repeat(120));
    beats[1].progress = Some(101);
    beats[2].message = "\0".to_owned();
    let endless = LeaseHeartbeat { lease_token: "x".repeat(300), ..LeaseHeartbeat::default() };
    beats.push(endless);
    let results = beat(&client, beats, Some(3_600)).await;
    let fields = |n: usize| match results[n].error.clone().map(Error::from) {
        Some(Error::InvalidRequest { violations, .. }) => {
            violations.into_iter().map(|violation| violation.field).collect()
        }
        Some(other) => panic!("{other}"),
        None => Vec::new(),
    };
    assert!(fields(0).is_empty());
    assert_eq!(fields(1), ["leases[1].stage", "leases[1].progress"]);
    assert_eq!(fields(2), ["leases[2].message"]);
    assert_eq!(fields(3), ["leases[3].lease_token"]);
    for (lease, result) in leases.iter().zip(&results) {
        assert!(!result.lease_lost && result.expires_at.unwrap().seconds > lease.expires_at.unwrap().seconds + 3_000);
        let job = client.get(&lease.job.as_ref().unwrap().id).await.unwrap();
        assert_eq!((job.status(), job.lease_expires_at), (JobStatus::Running, result.expires_at));
        assert_eq!(job.stage, None, "of refused news nothing is kept");
    }
    assert!(!results[3].lease_lost && results[3].expires_at.is_none());
    server.stop().await;
}

async fn a_job_that_is_held_is_canceled_by_its_holder(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let create = || async { client.create(NewJob::new("t").max_attempts(5)).await.unwrap().job.id };
    let job = create().await;
    let (_, lease) = claim_one(&client, Duration::from_secs(60)).await;
    let early = client.update(Report::canceled(&job).lease(&lease.lease_token)).await.unwrap_err();
    assert!(matches!(early, Error::InvalidTransition { current: JobStatus::Running }), "{early}");
    for _ in 0..2 {
        let asked = client.cancel(&job, "changed my mind").await.unwrap();
        assert_eq!((asked.status(), asked.cancel_requested), (JobStatus::Running, true));
    }
    let told = client.update(Report::progress(&job).percent(1).lease(&lease.lease_token)).await.unwrap();
    assert!(told.cancel_requested);
    // Any end but a success cancels the job. The error is kept.
    let failed = Report::failed(&job, "INTERRUPTED", "stopped half way").lease(&lease.lease_token);
    let ended = client.update(failed).await.unwrap().job;
    assert_eq!((ended.status(), ended.last_error_code.as_str()), (JobStatus::Canceled, "INTERRUPTED"));
    assert_eq!(client.cancel(&job, "").await.unwrap().etag, ended.etag);

    // A worker that was done before it learned of the request has succeeded.
    let job = create().await;
    let (_, lease) = claim_one(&client, Duration::from_secs(60)).await;
    client.cancel(&job, "").await.unwrap();
    let ended = client.update(Report::succeeded(&job).lease(&lease.lease_token)).await.unwrap().job;
    assert_eq!(ended.status(), JobStatus::Succeeded);
    let late = client.cancel(&job, "").await.unwrap_err();
    assert!(matches!(late, Error::InvalidTransition { current: JobStatus::Succeeded }), "{late}");

    // A worker that sends nothing more: the job is canceled all the same, and not retried.
    let job = create().await;
    claim_one(&client, SHORT).await;
    client.cancel(&job, "").await.unwrap();
    await_kind(&client, &job, JobEventKind::Canceled).await;
    let job = client.get(&job).await.unwrap();
    assert_eq!((job.status(), job.last_error_code.as_str()), (JobStatus::Canceled, "LEASE_EXPIRED"));
    server.stop().await;
}

async fn a_job_that_nobody_holds_is_canceled_at_once(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let scheduled = std::time::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    for (job, is_running) in
        [(NewJob::new("t"), false), (NewJob::new("t").scheduled_at(scheduled), false), (NewJob::new("t"), true)]
    {
        let created = client.create(job).await.unwrap().job;
        if is_running {
            client.update(Report::start(&created.id)).await.unwrap();
        } else {
            let request = jobledger_client::proto::CancelJobRequest {
                job_id: created.id.clone(),
                etag: "0".to_owned(),
                ..Default::default()
            };
            let stale = Error::from(client.raw().cancel_job(request).await.unwrap_err());
            assert!(matches!(stale, Error::EtagMismatch { current_etag } if current_etag == created.etag));
        }
        let canceled = client.cancel(&created.id, "why").await.unwrap();
        assert_eq!((canceled.status(), canceled.cancel_requested), (JobStatus::Canceled, false));
        assert!(canceled.finished_at.is_some());
    }
    assert!(client.claim(Claim::new("w")).await.unwrap().is_empty());
    let unknown = client.cancel("00000000-0000-0000-0000-000000000001", "").await.unwrap_err();
    assert!(matches!(unknown, Error::JobNotFound { .. }));
    server.stop().await;
}

async fn an_attempt_takes_no_longer_than_it_may(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let job = || client.create(NewJob::new("t").run_timeout(SHORT));
    let (held, reported) = (job().await.unwrap().job, job().await.unwrap().job);
    assert_eq!(held.run_timeout.unwrap().seconds, 1);
    let (id, lease) = claim_one(&client, Duration::from_secs(3_600)).await;
    assert_eq!(id, held.id);
    client.update(Report::start(&reported.id)).await.unwrap();
    for id in [&held.id, &reported.id] {
        await_kind(&client, id, JobEventKind::Failed).await;
        let job = client.get(id).await.unwrap();
        assert_eq!((job.status(), job.last_error_code.as_str()), (JobStatus::Failed, "RUN_TIMEOUT"));
        assert!(job.worker_id.is_empty() && job.lease_expires_at.is_none());
    }
    assert!(beat(&client, vec![of(&lease)], None).await[0].lease_lost);
    server.stop().await;
}

async fn a_finished_job_runs_again_once_per_request(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let job = client.create(NewJob::new("t").max_attempts(1)).await.unwrap().job.id;
    let queued = client.retry(&job).await.unwrap_err();
    assert!(matches!(queued, Error::InvalidTransition { current: JobStatus::Queued }), "{queued}");
    let mut service = client.raw();
    let mut retry = async |request: &str| {
        let request = jobledger_client::proto::RetryJobRequest {
            job_id: job.clone(),
            request_id: request.to_owned(),
            ..Default::default()
        };
        service.retry_job(request).await.map(|answer| answer.into_inner().job.unwrap()).map_err(Error::from)
    };
    for (request, attempt) in [("a", 1), ("b", 2)] {
        let (_, lease) = claim_one(&client, Duration::from_secs(60)).await;
        client.update(Report::failed(&job, "E", "").lease(&lease.lease_token)).await.unwrap();
        let requeued = retry(request).await.unwrap();
        assert_eq!((requeued.status(), requeued.attempt, requeued.finished_at), (JobStatus::Queued, attempt, None));
        assert_eq!(retry(request).await.unwrap().etag, requeued.etag);
    }
    assert!(matches!(retry("a").await.unwrap_err(), Error::InvalidTransition { .. }), "that was another time");
    client.cancel(&job, "").await.unwrap();
    assert_eq!(client.retry(&job).await.unwrap().status(), JobStatus::Queued);
    server.stop().await;
}

async fn a_report_on_a_held_job_needs_its_token(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let [job, other] = [(); 2].map(|()| client.create(NewJob::new("t")));
    let (job, other) = (job.await.unwrap().job.id, other.await.unwrap().job.id);
    let (_, lease) = claim_one(&client, Duration::from_secs(60)).await;
    let (_, others) = claim_one(&client, Duration::from_secs(60)).await;
    let tokens = ["", "nonsense", &others.lease_token, &lease.lease_token.to_uppercase()];
    for token in tokens {
        for report in [Report::succeeded(&job), Report::start(&job), Report::progress(&job), Report::released(&job)] {
            let refused = client.update(report.lease(token)).await.unwrap_err();
            assert!(matches!(refused, Error::LeaseLost), "{token}: {refused}");
        }
    }
    client.update(Report::released(&other).lease(&others.lease_token)).await.unwrap();
    // The job has no lease: a client may start it without a token, and no token is accepted.
    let refused = client.update(Report::start(&other).lease(&others.lease_token)).await.unwrap_err();
    assert!(matches!(refused, Error::LeaseLost), "{refused}");
    client.update(Report::start(&other)).await.unwrap();
    client.update(Report::released(&other).lease(&others.lease_token)).await.expect("its own outcome again");
    server.stop().await;
}
