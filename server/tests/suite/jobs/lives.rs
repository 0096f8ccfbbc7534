//! Jobs over the wire, with the client crate.

use std::{collections::HashSet, time::Duration};

use chrono::TimeDelta;
use jobledger_client::{
    Client, Error, Follow, Item, Job, JobEvent, JobEventKind, JobStatus, NewJob, Report, RetryPolicy,
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use serde_json::json;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::harness::{Database, TestServer, on_both_databases};

on_both_databases! {
    a_job_lives_from_create_to_success,
    a_failure_is_retried_until_the_budget_is_used_up,
    sixty_four_creates_with_one_key_make_one_job,
    updates_of_one_job_are_decided_one_after_the_other,
    statistics_are_what_counting_gives,
    orgs_see_only_what_is_theirs,
    statistics_list_a_thousand_types_and_count_them_all,
    a_raw_client_speaks_for_the_same_org,
    reads_that_come_at_once_each_get_their_own,
}

async fn history(client: &Client, follow: Follow) -> Vec<JobEvent> {
    let mut events = client.subscribe(follow.after(0).history_only()).await.unwrap();
    let mut history = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            history.push(*event);
        }
    }
    history
}

fn kinds(events: &[JobEvent]) -> Vec<JobEventKind> {
    events.iter().map(JobEvent::kind).collect()
}

async fn a_job_lives_from_create_to_success(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let payload = json!({"path": "cat.jpg", "sizes": [1, 2.5, null, true], "nested": {"ünï": ""}});
    let scheduled_at = SystemClock.now() + TimeDelta::hours(1);
    let job = NewJob::new("thumbnail")
        .payload(&payload)
        .unwrap()
        .priority(-5)
        .idempotency_key("cat@1")
        .requested_by("alice")
        .label("team", "red")
        .max_attempts(3)
        .scheduled_at(scheduled_at);
    let created = client.create(job).await.unwrap();
    assert!(!created.deduplicated);
    let job = created.job;
    assert_eq!(Uuid::parse_str(&job.id).unwrap().get_version_num(), 7);
    assert_eq!((job.status(), job.attempt, job.max_attempts, job.priority), (JobStatus::Queued, 0, 3, -5));
    assert_eq!((job.idempotency_key.as_str(), job.requested_by.as_str()), ("cat@1", "alice"));
    assert_eq!(job.labels.get("team").map(String::as_str), Some("red"));
    assert_eq!((job.org_id.as_str(), job.last_seq), ("00000000-0000-0000-0000-000000000000", 1));
    assert_eq!(job.scheduled_at.unwrap().seconds, scheduled_at.timestamp());
    assert!(job.payload.is_none() && job.started_at.is_none() && job.finished_at.is_none());
    assert_eq!(
        jobledger_client::from_value::<serde_json::Value>(client.get(&job.id).await.unwrap().payload.as_ref()).unwrap(),
        payload
    );

    let started = client.update(Report::start(&job.id).stage("reading")).await.unwrap().job;
    assert_eq!((started.status(), started.attempt, started.stage()), (JobStatus::Running, 1, "reading"));
    assert!(started.started_at.is_some());
    let half = client.update(Report::progress(&job.id).percent(50).message("half way")).await.unwrap().job;
    assert_eq!((half.progress, half.stage()), (Some(50), "reading"));
    let same = client.update(Report::progress(&job.id).percent(50)).await.unwrap().job;
    assert_eq!(same, half, "no news, no event");
    let cleared = client.update(Report::progress(&job.id).stage("")).await.unwrap().job;
    assert_eq!((cleared.stage, cleared.progress), (None, Some(50)));
    let result = json!({"bytes": 4096});
    let done = client.update(Report::succeeded(&job.id).percent(100).result(&result).unwrap()).await.unwrap().job;
    assert_eq!(done.status(), JobStatus::Succeeded);
    assert!(done.finished_at.is_some() && done.result.is_none());

    let read = client.get(&job.id).await.unwrap();
    assert_eq!(jobledger_client::from_value::<serde_json::Value>(read.result.as_ref()).unwrap(), result);
    assert_eq!(Job { payload: None, result: None, ..read }, done);

    let events = history(&client, Follow::job(&job.id)).await;
    use JobEventKind::{Created, Progress, Started, Succeeded};
    assert_eq!(kinds(&events), [Created, Started, Progress, Progress, Succeeded]);
    for (event, n) in events.iter().zip(1..) {
        assert_eq!((event.seq, event.job_seq), (n, n));
        assert_eq!((event.job_id.as_str(), event.job_type.as_str()), (job.id.as_str(), "thumbnail"));
    }
    assert_eq!((events[0].prev_status, events[0].actor.as_str()), (None, "alice"));
    assert_eq!((events[2].stage(), events[2].progress(), events[2].message.as_str()), ("reading", 50, "half way"));
    assert_eq!((events[4].stage.as_deref(), events[4].progress()), (None, 100), "the last event has the whole picture");
    assert!(events[4].result.is_some());
    server.stop().await;
}

async fn a_failure_is_retried_until_the_budget_is_used_up(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let policy = RetryPolicy {
        initial_backoff: Some(Duration::from_millis(1).try_into().unwrap()),
        multiplier: Some(1.0),
        max_backoff: None,
    };
    let id = client.create(NewJob::new("t").max_attempts(2).retry_policy(policy)).await.unwrap().job.id;
    client.update(Report::start(&id)).await.unwrap();
    let retried = client.update(Report::failed(&id, "FLAKY", "try again").result(&1).unwrap()).await.unwrap().job;
    assert_eq!((retried.status(), retried.attempt), (JobStatus::Queued, 1));
    assert_eq!((retried.last_error_code.as_str(), retried.last_error_message.as_str()), ("FLAKY", "try again"));
    assert!(retried.scheduled_at.is_some() && retried.finished_at.is_none());
    assert!(client.get(&id).await.unwrap().result.is_some(), "the result stays until the next attempt begins");
    client.update(Report::start(&id)).await.unwrap();
    assert!(client.get(&id).await.unwrap().result.is_none());
    let dead = client.update(Report::failed(&id, "FLAKY", "again")).await.unwrap().job;
    assert_eq!((dead.status(), dead.attempt), (JobStatus::DeadLetter, 2));
    let again = client.update(Report::failed(&id, "FLAKY", "again")).await.unwrap().job;
    assert_eq!(again, dead, "the same outcome again writes nothing");
    let other = client.update(Report::succeeded(&id)).await.unwrap_err();
    assert!(matches!(other, Error::InvalidTransition { current: JobStatus::DeadLetter }), "{other}");

    use JobEventKind::{Created, DeadLettered, Failed, RetryScheduled, Started};
    let events = history(&client, Follow::job(&id)).await;
    assert_eq!(kinds(&events), [Created, Started, Failed, RetryScheduled, Started, Failed, DeadLettered]);

    let id = client.create(NewJob::new("t").max_attempts(5)).await.unwrap().job.id;
    client.update(Report::start(&id)).await.unwrap();
    let failed = client.update(Report::failed(&id, "BAD_INPUT", "").permanent()).await.unwrap().job;
    assert_eq!(failed.status(), JobStatus::Failed, "what is permanent is not retried");

    let id = client.create(NewJob::new("t")).await.unwrap().job.id;
    client.update(Report::start(&id)).await.unwrap();
    let released = client.update(Report::released(&id).retry_after(Duration::from_secs(60))).await.unwrap().job;
    assert_eq!((released.status(), released.last_error_code.as_str()), (JobStatus::Queued, ""));
    server.stop().await;
}

async fn sixty_four_creates_with_one_key_make_one_job(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other_connection = server.client();
    let mut creates = JoinSet::new();
    for n in 0..64 {
        let client = if n % 2 == 0 { client.clone() } else { other_connection.clone() };
        let job =
            NewJob::new("t").payload(&json!({"n": 1})).unwrap().label("b", "2").label("a", "1").idempotency_key("once");
        creates.spawn(async move { client.create(job).await.unwrap() });
    }
    let created = creates.join_all().await;
    let ids: HashSet<_> = created.iter().map(|created| created.job.id.as_str()).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(created.iter().filter(|created| !created.deduplicated).count(), 1);
    assert_eq!(kinds(&history(&client, Follow::org()).await), [JobEventKind::Created]);

    let error =
        client.create(NewJob::new("t").payload(&json!({"n": 2})).unwrap().idempotency_key("once")).await.unwrap_err();
    match error {
        Error::IdempotencyKeyReused { existing_job_id } => assert_eq!(existing_job_id, created[0].job.id),
        other => panic!("{other}"),
    }
    // A repeated create gets the job as it is at that time.
    client.update(Report::start(&created[0].job.id)).await.unwrap();
    let job =
        NewJob::new("t").payload(&json!({"n": 1})).unwrap().label("a", "1").label("b", "2").idempotency_key("once");
    let again = client.create(job).await.unwrap();
    assert_eq!((again.deduplicated, again.job.status()), (true, JobStatus::Running));
    server.stop().await;
}

async fn updates_of_one_job_are_decided_one_after_the_other(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let id = client.create(NewJob::new("t")).await.unwrap().job.id;
    let etag = client.update(Report::start(&id)).await.unwrap().job.etag;
    let mut updates = JoinSet::new();
    for n in 0..32 {
        let (client, id, etag) = (client.clone(), id.clone(), etag.clone());
        updates.spawn(async move { client.update(Report::progress(id).percent(n + 1).etag(etag)).await });
    }
    let results = updates.join_all().await;
    let won: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
    assert_eq!(won.len(), 1, "of those that hold the same etag, one wins");
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        assert!(matches!(error, Error::EtagMismatch { current_etag } if *current_etag == won[0].job.etag), "{error}");
    }
    server.stop().await;
}

async fn statistics_are_what_counting_gives(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let empty = client.statistics(&[]).await.unwrap();
    assert_eq!((empty.as_of_seq, empty.counts.unwrap(), empty.types.len()), (0, Default::default(), 0));
    assert!(empty.oldest_queued_age.is_none());
    for n in 0..12 {
        let id = client.create(NewJob::new(if n % 3 == 0 { "a" } else { "b" })).await.unwrap().job.id;
        if n % 2 == 0 {
            client.update(Report::start(&id)).await.unwrap();
        }
        if n % 4 == 0 {
            client.update(Report::succeeded(&id)).await.unwrap();
        }
    }
    let later = NewJob::new("later").scheduled_at(SystemClock.now() + TimeDelta::hours(1));
    client.create(later).await.unwrap();
    let statistics = client.statistics(&[]).await.unwrap();
    let counts = statistics.counts.unwrap();
    assert_eq!((counts.queued, counts.running, counts.succeeded, counts.failed), (7, 3, 3, 0));
    assert_eq!(statistics.as_of_seq, 13 + 6 + 3);
    assert!(statistics.oldest_queued_age.is_some());
    let a = &client.statistics(&["a"]).await.unwrap();
    let counts = a.counts.unwrap();
    assert_eq!((a.types.len(), counts.queued, counts.running, counts.succeeded), (1, 2, 1, 1));
    let later = client.statistics(&["later"]).await.unwrap();
    assert_eq!((later.counts.unwrap().queued, later.oldest_queued_age), (1, None), "its time is yet to come");
    server.stop().await;
}

async fn reads_that_come_at_once_each_get_their_own(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = Client::builder(server.endpoint()).org(Uuid::new_v4()).build().unwrap();
    let mut known = Vec::new();
    for (n, client) in [&client, &other].into_iter().cycle().take(30).enumerate() {
        // Some payloads are too large to be read together with others.
        let payload = "x".repeat(if n % 5 == 0 { 200_000 } else { n });
        let job = client.create(NewJob::new("t").payload(&payload).unwrap()).await.unwrap().job;
        known.push((client.clone(), job.id, Some(payload)));
        known.push((client.clone(), Uuid::now_v7().to_string(), None));
    }
    let mut reads = JoinSet::new();
    for (client, id, payload) in known.iter().cycle().take(600).cloned() {
        reads.spawn(async move {
            match (client.get(&id).await, payload) {
                (Ok(job), Some(payload)) => {
                    assert_eq!(job.id, id);
                    let read: String = jobledger_client::from_value(job.payload.as_ref()).unwrap();
                    assert!(read == payload, "{} characters instead of {}", read.len(), payload.len());
                }
                (Err(Error::JobNotFound { job_id }), None) => assert_eq!(job_id, id),
                (answer, _) => panic!("{id}: {answer:?}"),
            }
        });
    }
    while let Some(read) = reads.join_next().await {
        read.unwrap();
    }
    server.stop().await;
}

async fn orgs_see_only_what_is_theirs(database: Database) {
    let (server, default) = TestServer::on(&database).await;
    let org = Uuid::new_v4();
    let ours = Client::builder(server.endpoint()).org(org).build().unwrap();
    let job = ours.create(NewJob::new("t").idempotency_key("k")).await.unwrap().job;
    assert_eq!((job.org_id, job.last_seq), (org.to_string(), 1));
    let not_found = |error| assert!(matches!(error, Error::JobNotFound { job_id } if job_id == job.id));
    not_found(default.get(&job.id).await.unwrap_err());
    not_found(default.update(Report::start(&job.id)).await.unwrap_err());
    not_found(default.subscribe(Follow::job(&job.id)).await.unwrap_err());
    assert_eq!(default.statistics(&[]).await.unwrap().as_of_seq, 0);
    assert!(history(&default, Follow::org()).await.is_empty());
    let theirs = default.create(NewJob::new("u").idempotency_key("k")).await.unwrap();
    assert!(!theirs.deduplicated, "a key belongs to its org");
    assert_eq!(theirs.job.last_seq, 1, "and so does the log");
    server.stop().await;
}

async fn statistics_list_a_thousand_types_and_count_them_all(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut creates = JoinSet::new();
    for n in 0..1_001 {
        let client = client.clone();
        creates.spawn(async move { client.create(NewJob::new(format!("type-{n:04}"))).await.unwrap() });
    }
    creates.join_all().await;
    let statistics = client.statistics(&[]).await.unwrap();
    assert_eq!((statistics.types.len(), statistics.types_truncated), (1_000, true));
    assert_eq!(statistics.counts.unwrap().queued, 1_001);
    let last = client.statistics(&["type-1000"]).await.unwrap();
    assert_eq!((last.counts.unwrap().queued, last.types_truncated), (1, false));
    server.stop().await;
}

async fn a_raw_client_speaks_for_the_same_org(database: Database) {
    let (server, _) = TestServer::on(&database).await;
    let org = Uuid::new_v4();
    let client = Client::builder(server.endpoint()).org(org).build().unwrap();
    let request = jobledger_client::proto::CreateJobRequest { r#type: "t".to_owned(), ..Default::default() };
    let job = client.raw().create_job(request).await.unwrap().into_inner().job.unwrap();
    assert_eq!(job.org_id, org.to_string());
    server.stop().await;
}
