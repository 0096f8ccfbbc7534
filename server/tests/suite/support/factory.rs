//! Jobs, events and batches for tests of a store.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
    time::Duration,
};

use chrono::TimeDelta;
use jobledger_server::{
    domain::{
        clock::{Clock as _, SystemClock, Time},
        event::{EventKind, JobEvent},
        id::{JobId, OrgId},
        job::{Idempotency, Job, JobSpec},
        lease::Lease,
        status::JobStatus,
    },
    store::{
        self, Batch, Changed, Changes, Differs, EventFilter, EventQuery, Head, Needs, Ready, RecordId, StatusCounts,
        Store, StoreError, Tally,
    },
};
use uuid::Uuid;

/// A time `micros` microseconds after a base that all cases share. The base is in this month, for which every database has room.
pub(crate) fn time(micros: i64) -> Time {
    static BASE: LazyLock<Time> = LazyLock::new(|| SystemClock.now());
    *BASE + TimeDelta::microseconds(micros)
}

pub(crate) fn org() -> OrgId {
    OrgId(Uuid::new_v4())
}

pub(crate) fn job(org: OrgId, job_type: &str, seq: i64) -> Job {
    Job {
        id: JobId(Uuid::now_v7()),
        org_id: org,
        spec: Arc::new(JobSpec::of_type(job_type)),
        status: JobStatus::Queued,
        attempt: 0,
        failures: 0,
        lost_attempts: 0,
        stage: None,
        progress: None,
        result_at: None,
        payload_recorded_at: None,
        erased_at: None,
        last_error: None,
        cancel_requested: false,
        outcome: None,
        lease: None,
        lease_nonce: 0,
        retry_request: None,
        due_at: None,
        created_seq: seq,
        created_at: time(seq),
        updated_at: time(seq),
        started_at: None,
        attempt_started_at: None,
        finished_at: None,
        scheduled_at: None,
        ready_at: time(seq),
        last_job_seq: 1,
        last_seq: seq,
        last_recorded_at: time(seq),
    }
}

pub(crate) fn event(job: &Job, seq: i64) -> JobEvent {
    JobEvent {
        org_id: job.org_id,
        seq,
        job_id: job.id,
        job_seq: job.last_job_seq,
        ts: time(seq),
        recorded_at: time(seq),
        kind: EventKind::Created,
        prev_status: None,
        next_status: job.status,
        attempt: job.attempt,
        actor: "".into(),
        job_type: Arc::clone(&job.spec.job_type),
        labels: Arc::clone(&job.spec.labels),
        stage: None,
        progress: None,
        message: "".into(),
        result: None,
        error: None,
        scheduled_at: None,
        origin: None,
        is_past: false,
        bulk_operation: None,
        edit: None,
    }
}

pub(crate) fn head(seq: i64) -> Option<Head> {
    Some(Head { seq, recorded_at: Some(time(seq)), ..Head::EMPTY })
}

pub(crate) fn counts(status: JobStatus, n: i64) -> StatusCounts {
    let mut counts = StatusCounts::default();
    counts.add(status, n);
    counts
}

/// The tally of one type in which only the counts change.
pub(crate) fn tallies(job_type: &str, counts: StatusCounts) -> BTreeMap<Arc<str>, Tally> {
    BTreeMap::from([(Arc::from(job_type), Tally { counts, ..Tally::default() })])
}

/// Loads what one org needs in a batch.
pub(crate) async fn load_in(batch: &mut dyn Batch, org: OrgId, needs: Needs) -> Result<store::Loaded, StoreError> {
    Ok(batch.load(&[(org, needs)]).await?.remove(0))
}

/// Writes one org's changes in a batch; returns the batch record.
pub(crate) async fn write_in(
    batch: &mut dyn Batch,
    org: OrgId,
    changes: &Changes,
) -> Result<Option<RecordId>, StoreError> {
    Ok(batch.write(&[(org, changes)]).await?.remove(0))
}

pub(crate) async fn write(store: &dyn Store, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
    let mut batch = store.begin(&[org]).await?;
    write_in(&mut *batch, org, changes).await?;
    batch.commit().await
}

/// Creates `n` jobs of a type at the end of the org's log.
pub(crate) async fn fill(store: &dyn Store, org: OrgId, job_type: &str, n: i64) -> Vec<Job> {
    let before = load(store, org, Needs { types: vec![job_type.into()], ..Needs::default() }).await;
    let first = before.head.seq + 1;
    let jobs: Vec<_> = (first..first + n).map(|seq| job(org, job_type, seq)).collect();
    let changes = Changes {
        head: Some(Head {
            seq: first + n - 1,
            recorded_at: Some(time(first + n - 1)),
            types: before.head.types + i64::from(before.types.is_empty()),
            ..before.head
        }),
        events: jobs.iter().map(|job| Arc::new(event(job, job.last_seq))).collect(),
        tallies: tallies(job_type, counts(JobStatus::Queued, n)),
        created: jobs.clone(),
        ..Changes::default()
    };
    write(store, org, &changes).await.expect("the batch is written");
    jobs
}

/// Creates a job and claims it, in two batches; returns the job as it is then.
pub(crate) async fn hold_one(store: &dyn Store, org: OrgId) -> Job {
    create(store, org, false, 1).await;
    let mut batch = store.begin(&[org]).await.expect("the head is free");
    let needs = Needs { ready: Ready { all: 1, ..Ready::default() }, ..Needs::default() };
    let loaded = load_in(&mut *batch, org, needs).await.expect("it loads");
    let mut job = batch.ready_jobs(&[(org, loaded.ready.jobs[0].id)]).await.expect("it loads").remove(0);
    let (now, seq) = (batch.now(), loaded.head.seq + 1);
    (job.status, job.attempt, job.lease_nonce) = (JobStatus::Running, 1, 1);
    (job.last_job_seq, job.last_seq, job.last_recorded_at, job.updated_at) = (2, seq, now, now);
    let expires_at = now + TimeDelta::minutes(1);
    let (worker, granted) = ("w".into(), Duration::from_secs(60));
    job.lease = Some(Lease { worker, granted, expires_at, request: None, is_confirmed: false });
    job.due_at = Some(expires_at);
    let prev_status = Some(JobStatus::Queued);
    let event = JobEvent { ts: now, recorded_at: now, kind: EventKind::Claimed, prev_status, ..event(&job, seq) };
    let changes = Changes {
        head: Some(Head { seq, recorded_at: Some(now), ..loaded.head }),
        changed: vec![job.clone().into()],
        events: vec![Arc::new(event)],
        ..Changes::default()
    };
    write_in(&mut *batch, org, &changes).await.expect("it is written");
    batch.commit().await.expect("it is committed");
    job
}

/// The changes of a progress report on a job, at the end of a log with this head.
pub(crate) fn progress(job: &Job, head: &Head) -> Changes {
    let (now, seq) = (job.last_recorded_at, head.seq + 1);
    let (last_job_seq, progress) = (job.last_job_seq + 1, Some(50));
    let job = Job { last_job_seq, progress, last_seq: seq, ..job.clone() };
    let event = JobEvent { ts: now, recorded_at: now, kind: EventKind::Progress, progress, ..event(&job, seq) };
    Changes {
        head: Some(Head { seq, recorded_at: Some(now), ..*head }),
        changed: vec![Changed { job, differs: Differs::Nowhere }],
        events: vec![Arc::new(event)],
        ..Changes::default()
    }
}

/// Creates `n` jobs in one batch, as the ledger does.
pub(crate) async fn create(store: &dyn Store, org: OrgId, is_keyed: bool, n: usize) {
    batch_of(store, org, is_keyed, n).await.commit().await.expect("it is committed");
}

/// As [`create`], but without the commit.
pub(crate) async fn begin_create(store: &dyn Store, org: OrgId, n: usize) -> Box<dyn Batch> {
    batch_of(store, org, false, n).await
}

/// As [`begin_create`], but from the cached state alone. `None` if the store can't.
pub(crate) async fn recall_create(store: &dyn Store, org: OrgId, n: usize) -> Option<Box<dyn Batch>> {
    recall_keyed(store, org, &[], n).await
}

/// As [`recall_create`], with these idempotency keys on the first jobs.
pub(crate) async fn recall_keyed(store: &dyn Store, org: OrgId, keys: &[&str], n: usize) -> Option<Box<dyn Batch>> {
    let keys: Vec<Arc<str>> = keys.iter().map(|key| Arc::from(*key)).collect();
    let needs = Needs { keys: keys.clone(), types: vec!["t".into()], ..Needs::default() };
    Some(create_in(store.begin_cached(&[(org, needs, n)])?, org, keys, n).await)
}

async fn batch_of(store: &dyn Store, org: OrgId, is_keyed: bool, n: usize) -> Box<dyn Batch> {
    let batch = store.begin(&[org]).await.expect("the head is free");
    // Random keys, and so new ones.
    let keys = (0..n).filter(|_| is_keyed).map(|_| Arc::from(Uuid::new_v4().to_string())).collect();
    create_in(batch, org, keys, n).await
}

async fn create_in(mut batch: Box<dyn Batch>, org: OrgId, keys: Vec<Arc<str>>, n: usize) -> Box<dyn Batch> {
    let needs = Needs { keys: keys.clone(), types: vec!["t".into()], ..Needs::default() };
    let before = load_in(&mut *batch, org, needs).await.expect("it loads");
    let first = before.head.seq + 1;
    let last = first + n as i64 - 1;
    let now = batch.now();
    let made =
        |seq| Job { created_at: now, updated_at: now, ready_at: now, last_recorded_at: now, ..job(org, "t", seq) };
    let mut jobs: Vec<_> = (first..=last).map(made).collect();
    for (job, key) in jobs.iter_mut().zip(keys) {
        let idempotency = Some(Idempotency { key, digest: None });
        job.spec = Arc::new(JobSpec { idempotency, ..(*job.spec).clone() });
    }
    let types = before.head.types + i64::from(before.types.is_empty());
    let record = |job: &Job| JobEvent { ts: now, recorded_at: now, ..event(job, job.last_seq) };
    let changes = Changes {
        head: Some(Head { seq: last, recorded_at: Some(now), types, ..before.head }),
        events: jobs.iter().map(|job| Arc::new(record(job))).collect(),
        tallies: tallies("t", counts(JobStatus::Queued, n as i64)),
        created: jobs,
        ..Changes::default()
    };
    write_in(&mut *batch, org, &changes).await.expect("it is written");
    batch
}

pub(crate) async fn load(store: &dyn Store, org: OrgId, needs: Needs) -> store::Loaded {
    let mut batch = store.begin(&[org]).await.expect("the head is free");
    load_in(&mut *batch, org, needs).await.expect("the batch loads")
}

pub(crate) fn all(after: i64) -> EventQuery {
    EventQuery { filter: EventFilter::default(), after, max_events: 10_000, max_bytes: usize::MAX }
}
