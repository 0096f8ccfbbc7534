//! What every store must do, whichever database it is on.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jobledger_server::{
    domain::{
        event::{EventKind, JobError, JobEvent, Position},
        id::{Digest, JobId},
        job::{Ended, Idempotency, Job, JobSpec},
        json::Json,
        lease::Lease,
        retry::RetryPolicy,
        status::JobStatus,
    },
    store::{Changed, Changes, EventFilter, EventQuery, Head, Needs, NewPayload, StatisticsQuery, Store, StoreError},
};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    support::factory::{all, counts, event, fill, head, job, load, load_in, org, tallies, time, write, write_in},
    support::harness::Database,
};

/// Runs every case on SQLite, and on the oldest and the newest PostgreSQL at hand. A case that is not listed is dead
/// code, and so a compile error.
macro_rules! contract {
    ($($case:ident,)*) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $case() {
                let database = super::Database::sqlite();
                super::$case(database.open().await).await;
            })*
        }

        mod postgres {
            $(#[tokio::test]
            async fn $case() {
                let database = super::Database::postgres().await;
                super::$case(database.open().await).await;
            })*
        }

        mod postgres_newest {
            $(#[tokio::test]
            async fn $case() {
                let database = super::Database::postgres_on(crate::support::cluster::newest().await).await;
                super::$case(database.open().await).await;
            })*
        }
    };
}

pub(crate) use contract;

contract! {
    a_log_that_was_never_written_is_empty,
    what_is_written_is_read_back_whole,
    jobs_are_found_by_id_and_by_key,
    a_result_of_null_is_a_result,
    a_batch_dropped_before_its_commit_never_was,
    a_head_is_held_until_its_batch_ends,
    orgs_share_nothing,
    a_key_held_by_two_jobs_is_refused_and_nothing_is_written,
    a_batch_of_any_size_is_written_whole,
    a_batch_of_all_kinds_of_jobs_is_read_back_whole,
    counters_add_up_by_type_and_status,
    a_type_that_was_asked_for_and_not_created_is_not_there,
    the_longest_wait_is_found_among_ready_jobs,
}

async fn a_log_that_was_never_written_is_empty(store: Arc<dyn Store>) {
    let org = org();
    let needs = Needs {
        jobs: vec![JobId(Uuid::now_v7())],
        keys: vec!["k".into()],
        types: vec!["t".into()],
        ..Needs::default()
    };
    let loaded = load(&*store, org, needs).await;
    assert_eq!(loaded.head, Head::EMPTY);
    assert!(loaded.jobs.is_empty() && loaded.types.is_empty());
    let page = store.events(org, &all(0)).await.unwrap();
    assert_eq!((page.events.len(), page.head, page.floor, page.through), (0, 0, 1, 0));
    let statistics = store.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!((statistics.as_of_seq, statistics.types.len()), (0, 0));
    assert_eq!(store.job(org, JobId(Uuid::now_v7())).await.unwrap(), None);
}

async fn what_is_written_is_read_back_whole(store: Arc<dyn Store>) {
    let org = org();
    let text = "ünï\"\\\n\u{1F980}\u{7f}";
    let mut full = job(org, text, 1);
    full.spec = Arc::new(JobSpec {
        job_type: text.into(),
        priority: -7,
        max_attempts: 9,
        max_lost_attempts: 7,
        retry_policy: RetryPolicy {
            initial_backoff: Duration::from_micros(1_500_001),
            multiplier: 1.7,
            max_backoff: Duration::from_secs(77),
        },
        idempotency: Some(Idempotency { key: text.into(), digest: Some(Digest([7; 32])) }),
        requested_by: text.into(),
        labels: Arc::new(BTreeMap::from([("a".to_owned(), text.to_owned()), (text.to_owned(), String::new())])),
        run_timeout: Some(Duration::from_micros(3_000_001)),
        payload_bytes: 1 << 20,
    });
    full.status = JobStatus::Failed;
    (full.attempt, full.failures, full.lost_attempts) = (3, 2, 5);
    (full.stage, full.progress) = (Some(text.into()), Some(100));
    full.result_at = Some(Position { seq: 1, recorded_at: time(1) });
    full.last_error = Some(JobError { code: "".into(), message: "".into() });
    full.cancel_requested = true;
    full.outcome = Some(Ended { digest: Digest([255; 32]), nonce: Some(i64::MAX) });
    full.lease = Some(Lease {
        worker: text.into(),
        granted: Duration::from_micros(4_000_001),
        expires_at: time(21),
        request: Some(text.into()),
        is_confirmed: true,
    });
    (full.lease_nonce, full.retry_request, full.due_at) = (i64::MAX - 1, Some(text.into()), Some(time(22)));
    full.started_at = Some(time(11));
    full.attempt_started_at = Some(time(12));
    full.finished_at = Some(time(13));
    full.scheduled_at = Some(time(-14));
    full.payload_recorded_at = Some(time(1));
    full.ready_at = time(15);
    // The result is written as PostgreSQL prints JSON: jsonb keeps the value, not the spaces.
    let record = JobEvent {
        kind: EventKind::Failed,
        prev_status: Some(JobStatus::Running),
        actor: text.into(),
        stage: full.stage.clone(),
        progress: full.progress,
        message: text.into(),
        result: Some(Json::from_trusted("{\"a\": [1, 2.5, null, \"\\u0001x\"]}")),
        error: full.last_error.clone(),
        scheduled_at: full.scheduled_at,
        ..event(&full, 1)
    };
    let payload = Json::from_trusted("[\"payload\", {}]");
    let changes = Changes {
        head: head(1),
        created: vec![full.clone()],
        payloads: vec![NewPayload { job: full.id, json: payload.clone(), seq: Some(1) }],
        events: vec![Arc::new(record.clone())],
        ..Changes::default()
    };
    write(&*store, org, &changes).await.unwrap();

    let loaded = load(&*store, org, Needs { jobs: vec![full.id], ..Needs::default() }).await;
    assert_eq!(loaded.head, changes.head.unwrap());
    assert_eq!(loaded.jobs, [full.clone()]);
    let found = store.job(org, full.id).await.unwrap().expect("the job exists");
    assert_eq!((&found.job, &found.contents.payload, &found.contents.result), (&full, &Some(payload), &record.result));
    let page = store.events(org, &all(0)).await.unwrap();
    assert_eq!(page.of_jobs().next().map(|event| &**event), Some(&record));

    // The write replaces what changed and leaves the rest alone. The event has no details.
    let mut later = full.clone();
    later.status = JobStatus::Queued;
    (later.stage, later.progress, later.last_error, later.result_at) = (None, None, None, None);
    (later.lease, later.due_at, later.retry_request) = (None, None, None);
    (later.outcome, later.finished_at, later.scheduled_at, later.cancel_requested) = (None, None, None, false);
    (later.last_job_seq, later.last_seq, later.last_recorded_at) = (2, 2, time(2));
    let quiet = JobEvent { kind: EventKind::Requeued, prev_status: Some(JobStatus::Failed), ..event(&later, 2) };
    let changes = Changes {
        head: head(2),
        changed: vec![later.clone().into()],
        events: vec![Arc::new(quiet.clone())],
        ..Changes::default()
    };
    write(&*store, org, &changes).await.unwrap();
    let found = store.job(org, full.id).await.unwrap().expect("the job exists");
    assert_eq!((found.job, found.contents.result), (later, None));
    assert!(found.contents.payload.is_some());
    let page = store.events(org, &all(1)).await.unwrap();
    assert_eq!(page.of_jobs().next().map(|event| &**event), Some(&quiet));
}

async fn a_result_of_null_is_a_result(store: Arc<dyn Store>) {
    let org = org();
    let mut ended = job(org, "t", 1);
    ended.result_at = Some(Position { seq: 1, recorded_at: time(1) });
    let null = Some(Json::from_trusted("null"));
    let record = JobEvent { result: null.clone(), ..event(&ended, 1) };
    let changes = Changes {
        head: head(1),
        created: vec![ended.clone()],
        events: vec![Arc::new(record.clone())],
        ..Changes::default()
    };
    write(&*store, org, &changes).await.unwrap();
    let page = store.events(org, &all(0)).await.unwrap();
    assert_eq!(page.of_jobs().next().map(|event| &**event), Some(&record));
    assert_eq!(store.job(org, ended.id).await.unwrap().unwrap().contents.result, null);
}

async fn jobs_are_found_by_id_and_by_key(store: Arc<dyn Store>) {
    let org = org();
    let plain = fill(&*store, org, "t", 3).await;
    let mut keyed = job(org, "t", 4);
    keyed.spec = Arc::new(JobSpec {
        idempotency: Some(Idempotency { key: "key".into(), digest: Some(Digest([1; 32])) }),
        ..(*keyed.spec).clone()
    });
    let events = vec![Arc::new(event(&keyed, 4))];
    let changes = Changes { head: head(4), created: vec![keyed.clone()], events, ..Changes::default() };
    write(&*store, org, &changes).await.unwrap();
    let needs = Needs {
        jobs: vec![plain[1].id, keyed.id, JobId(Uuid::now_v7())],
        keys: vec!["key".into(), "other".into()],
        types: vec!["t".into(), "u".into()],
        ..Needs::default()
    };
    let mut loaded = load(&*store, org, needs).await;
    loaded.jobs.sort_by_key(|job| job.last_seq);
    assert_eq!(loaded.jobs, [plain[1].clone(), keyed], "each once, also one named twice");
    assert_eq!(loaded.types, ["t"]);
}

async fn a_batch_dropped_before_its_commit_never_was(store: Arc<dyn Store>) {
    let org = org();
    let lost = job(org, "t", 1);
    let changes = Changes {
        head: head(1),
        created: vec![lost.clone()],
        events: vec![Arc::new(event(&lost, 1))],
        ..Changes::default()
    };
    let mut batch = store.begin(&[org]).await.unwrap();
    write_in(&mut *batch, org, &changes).await.unwrap();
    drop(batch);
    assert_eq!(load(&*store, org, Needs::default()).await.head, Head::EMPTY);
    assert_eq!(store.job(org, lost.id).await.unwrap(), None);
    write(&*store, org, &changes).await.expect("the same can be written afterwards");
}

async fn a_head_is_held_until_its_batch_ends(store: Arc<dyn Store>) {
    let org = org();
    let held = store.begin(&[org]).await.unwrap();
    let early = timeout(Duration::from_millis(50), store.begin(&[org])).await;
    assert!(early.is_err(), "the head was given away twice");
    drop(held);
    timeout(Duration::from_secs(5), store.begin(&[org])).await.expect("the head is free again").unwrap();
}

async fn orgs_share_nothing(store: Arc<dyn Store>) {
    let (ours, theirs) = (org(), org());
    let secret = fill(&*store, theirs, "t", 2).await;
    let needs = Needs { jobs: vec![secret[0].id], keys: vec![], types: vec!["t".into()], ..Needs::default() };
    let loaded = load(&*store, ours, needs).await;
    assert_eq!(loaded.head, Head::EMPTY);
    assert!(loaded.jobs.is_empty() && loaded.types.is_empty());
    assert_eq!(store.job(ours, secret[0].id).await.unwrap(), None);
    assert_eq!(store.events(ours, &all(0)).await.unwrap().head, 0);
    let filter = EventFilter { job: Some(secret[0].id), ..EventFilter::default() };
    let page = store.events(ours, &EventQuery { filter, ..all(0) }).await.unwrap();
    assert!(page.events.is_empty() && page.job_status.is_none());
    assert!(store.statistics(ours, &StatisticsQuery::of(&[])).await.unwrap().types.is_empty());
    fill(&*store, ours, "t", 1).await;
    assert_eq!(load(&*store, theirs, Needs::default()).await.head.seq, 2);
}

async fn a_key_held_by_two_jobs_is_refused_and_nothing_is_written(store: Arc<dyn Store>) {
    let (first, other) = (org(), org());
    let keyed = |org, seq| {
        let mut keyed = job(org, "t", seq);
        let idempotency = Some(Idempotency { key: "key".into(), digest: Some(Digest([1; 32])) });
        keyed.spec = Arc::new(JobSpec { idempotency, ..(*keyed.spec).clone() });
        keyed
    };
    let changes = |jobs: Vec<Job>| Changes {
        head: head(2),
        events: jobs.iter().map(|job| Arc::new(event(job, job.last_seq))).collect(),
        created: jobs,
        ..Changes::default()
    };
    let refused = write(&*store, first, &changes(vec![keyed(first, 1), keyed(first, 2)])).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert_eq!(load(&*store, first, Needs::default()).await.head, Head::EMPTY);
    write(&*store, first, &changes(vec![keyed(first, 1), job(first, "t", 2)])).await.unwrap();
    write(&*store, other, &changes(vec![keyed(other, 1), job(other, "t", 2)]))
        .await
        .expect("another org's key is free");
}

async fn a_batch_of_any_size_is_written_whole(store: Arc<dyn Store>) {
    let org = org();
    let mut written = Vec::new();
    // Sizes around every chunk size of a statement.
    for n in [1, 2, 7, 8, 9, 63, 64, 65, 137, 512] {
        written.extend(fill(&*store, org, "t", n).await.into_iter().map(|job| job.id));
    }
    let page = store.events(org, &all(0)).await.unwrap();
    assert_eq!(page.of_jobs().map(|event| event.job_id).collect::<Vec<_>>(), written);
    let dense = page.events.iter().zip(1..).all(|(event, seq)| event.seq() == seq);
    assert!(dense && page.head == written.len() as i64);
    let loaded = load(&*store, org, Needs { jobs: written.clone(), ..Needs::default() }).await;
    assert_eq!(loaded.jobs.len(), written.len());
    let statistics = store.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!(statistics.types[0].counts, counts(JobStatus::Queued, written.len() as i64));
}

async fn a_batch_of_all_kinds_of_jobs_is_read_back_whole(store: Arc<dyn Store>) {
    // A column that is equal in all rows may be written in another way, so each difference is tried alone, then all together.
    type Change = fn(&mut Job);
    fn spec(job: &mut Job) -> &mut JobSpec {
        Arc::make_mut(&mut job.spec)
    }
    let changes: [Change; 12] = [
        |_| {},
        |job| spec(job).job_type = "other".into(),
        |job| spec(job).priority = 5,
        |job| spec(job).requested_by = "somebody".into(),
        |job| spec(job).labels = Arc::new(BTreeMap::from([("k".to_owned(), "v".to_owned())])),
        |job| spec(job).retry_policy.multiplier = 1.5,
        |job| {
            spec(job).idempotency =
                Some(Idempotency { key: job.id.0.to_string().into(), digest: Some(Digest([3; 32])) })
        },
        |job| {
            job.scheduled_at = Some(time(1_000_000));
            job.ready_at = time(1_000_000);
        },
        |job| job.scheduled_at = Some(time(-5)),
        |job| job.created_at = time(-5),
        |job| {
            (job.status, job.attempt, job.last_job_seq) = (JobStatus::Running, 1, 2);
            (job.started_at, job.attempt_started_at) = (Some(time(7)), Some(time(7)));
        },
        |job| job.last_error = Some(JobError { code: "E".into(), message: "m".into() }),
    ];
    let batch = async |changes: &[Change]| {
        let org = org();
        let jobs: Vec<_> = [&changes[..1], changes]
            .concat()
            .iter()
            .zip(1..)
            .map(|(change, seq)| {
                let mut made =
                    Job { created_at: time(1), updated_at: time(1), ready_at: time(1), ..job(org, "t", seq) };
                made.last_recorded_at = time(1);
                change(&mut made);
                made
            })
            .collect();
        let kind = |job: &Job| if job.attempt > 0 { EventKind::Started } else { EventKind::Created };
        let record =
            |job: &Job| JobEvent { kind: kind(job), recorded_at: time(1), ts: time(1), ..event(job, job.last_seq) };
        let events: Vec<_> = jobs.iter().map(|job| Arc::new(record(job))).collect();
        let written = Changes { head: head(jobs.len() as i64), events, created: jobs.clone(), ..Changes::default() };
        write(&*store, org, &written).await.unwrap();
        let needs = Needs { jobs: jobs.iter().map(|job| job.id).collect(), ..Needs::default() };
        let mut found = load(&*store, org, needs).await.jobs;
        found.sort_by_key(|job| job.last_seq);
        assert_eq!(found, jobs);
        assert_eq!(store.events(org, &all(0)).await.unwrap().events, written.log());
    };
    for change in changes {
        batch(&[change]).await;
    }
    batch(&changes).await;
}

async fn counters_add_up_by_type_and_status(store: Arc<dyn Store>) {
    let org = org();
    fill(&*store, org, "b", 4).await;
    fill(&*store, org, "a", 2).await;
    let mut moved = counts(JobStatus::Queued, -3);
    moved.add(JobStatus::DeadLetter, 3);
    let head = Some(load(&*store, org, Needs::default()).await.head);
    let changes = Changes { head, tallies: tallies("b", moved), ..Changes::default() };
    write(&*store, org, &changes).await.unwrap();
    let statistics = store.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!(statistics.as_of_seq, 6);
    let found: Vec<_> = statistics.types.iter().map(|of_type| (of_type.job_type.as_str(), of_type.counts)).collect();
    let mut b = counts(JobStatus::Queued, 1);
    b.add(JobStatus::DeadLetter, 3);
    assert_eq!(found, [("a", counts(JobStatus::Queued, 2)), ("b", b)], "in the order of their names");
    let one = store.statistics(org, &StatisticsQuery::of(&["a".to_owned(), "none".to_owned()])).await.unwrap();
    assert_eq!((one.types.len(), one.types[0].job_type.as_str(), one.as_of_seq), (1, "a", 6));
    let none = store.statistics(org, &StatisticsQuery::of(&["none".to_owned()])).await.unwrap();
    assert_eq!((none.types.len(), none.as_of_seq), (0, 6));
}

async fn a_type_that_was_asked_for_and_not_created_is_not_there(store: Arc<dyn Store>) {
    let org = org();
    fill(&*store, org, "t", 1).await;
    let needs = || Needs { types: vec!["t".into(), "u".into()], ..Needs::default() };
    for next_retention in [None, Some(time(0))] {
        let mut batch = store.begin(&[org]).await.unwrap();
        assert_eq!(load_in(&mut *batch, org, needs()).await.unwrap().types, ["t"]);
        write_in(&mut *batch, org, &Changes { next_retention, ..Changes::default() }).await.unwrap();
        batch.commit().await.unwrap();
    }
    assert_eq!(load(&*store, org, needs()).await.types, ["t"]);
}

async fn the_longest_wait_is_found_among_ready_jobs(store: Arc<dyn Store>) {
    let org = org();
    let mut jobs = fill(&*store, org, "t", 3).await;
    jobs[0].status = JobStatus::Running;
    jobs[1].ready_at = time(99);
    let mut moved = counts(JobStatus::Queued, -1);
    moved.add(JobStatus::Running, 1);
    let third_ready_at = jobs[2].ready_at;
    let tallies = tallies("t", moved);
    let head = Some(load(&*store, org, Needs::default()).await.head);
    write(
        &*store,
        org,
        &Changes { head, changed: jobs.into_iter().map(Changed::from).collect(), tallies, ..Changes::default() },
    )
    .await
    .unwrap();
    let statistics = store.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!(statistics.types[0].oldest_ready_at, Some(third_ready_at));
}
