//! A job: what its creator asked for, and its current state.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    clock::Time,
    event::{JobError, Position},
    id::{Digest, JobId, OrgId},
    json::Json,
    lease::{Lease, LeaseToken},
    retry::RetryPolicy,
    status::JobStatus,
};

/// The most labels that a job has.
pub const MAX_LABELS: usize = 32;
/// The most characters of a job type.
pub const MAX_TYPE_CHARS: usize = 100;
/// The most characters of an idempotency key or of the name of a requester or worker.
pub const MAX_NAME_CHARS: usize = 255;
/// The most characters of a stage.
pub const MAX_STAGE_CHARS: usize = 100;
/// The most characters of an error code.
pub const MAX_ERROR_CODE_CHARS: usize = 100;
/// Priorities range from minus this to this.
pub const MAX_PRIORITY: i32 = 1_000;

/// How many lost attempts don't count as failures, unless the creator sets another number.
pub const DEFAULT_MAX_LOST_ATTEMPTS: i32 = 3;

/// The creator's labels, by key. The job and its events share them.
pub type Labels = Arc<BTreeMap<String, String>>;

/// What the creator asked for. Only an edit or an erasure changes it.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSpec {
    /// The kind of work; workers choose jobs by it.
    pub job_type: Arc<str>,
    /// Higher priorities are claimed first.
    pub priority: i32,
    /// The number of failures after which the job is not retried; at least 1.
    pub max_attempts: i32,
    /// How many lost attempts don't count as failures. Each further one does.
    pub max_lost_attempts: i32,
    /// The wait between attempts.
    pub retry_policy: RetryPolicy,
    /// The creator's key, and the digest of the request that came with it.
    pub idempotency: Option<Idempotency>,
    /// Who asked for the job; empty when unknown.
    pub requested_by: Arc<str>,
    /// The creator's labels.
    pub labels: Labels,
    /// How long an attempt may take; `None`: without limit.
    pub run_timeout: Option<Duration>,
    /// Size of the payload on the wire, in bytes; 0 without a payload.
    pub payload_bytes: u32,
}

impl JobSpec {
    /// A job of this type with the defaults of everything else: one attempt, no payload, no key.
    pub fn of_type(job_type: impl Into<Arc<str>>) -> Self {
        Self {
            job_type: job_type.into(),
            priority: 0,
            max_attempts: 1,
            max_lost_attempts: DEFAULT_MAX_LOST_ATTEMPTS,
            retry_policy: RetryPolicy::default(),
            idempotency: None,
            requested_by: Arc::default(),
            labels: Labels::default(),
            run_timeout: None,
            payload_bytes: 0,
        }
    }

    /// Approximate size of its texts in memory, in bytes.
    pub fn text_bytes(&self) -> usize {
        let labels: usize = self.labels.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
        let key = self.idempotency.as_ref().map_or(0, |idempotency| idempotency.key.len());
        self.job_type.len() + self.requested_by.len() + key + labels
    }
}

/// The key and digest that make it safe to repeat a create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// The key; unique in the org.
    pub key: Arc<str>,
    /// Digest of the whole request except the key; `None` for an imported key, whose request is unknown.
    pub digest: Option<Digest>,
}

/// How a report ended a job's last attempt, to recognise the same report when it is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Digest of everything that distinguishes one outcome from another.
    pub digest: Digest,
    /// The nonce of the lease that the report came under, if it came under one.
    pub nonce: Option<i64>,
}

/// A job as its org's log defines it. Payload and result are stored elsewhere: no decision needs them.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The job's identity.
    pub id: JobId,
    /// The org that owns the job.
    pub org_id: OrgId,
    /// What the creator asked for.
    pub spec: Arc<JobSpec>,
    /// The current status.
    pub status: JobStatus,
    /// How often the job has entered running; never falls.
    pub attempt: i32,
    /// How many failures count against `max_attempts`.
    pub failures: i32,
    /// How many attempts were lost without counting as failures; at most `max_lost_attempts`.
    pub lost_attempts: i32,
    /// What the worker is doing, in its own words.
    pub stage: Option<Arc<str>>,
    /// Progress of the attempt, in per cent.
    pub progress: Option<u8>,
    /// The position of the event that has the result, if there is a result.
    pub result_at: Option<Position>,
    /// The last failure or lost attempt; kept through later attempts.
    pub last_error: Option<JobError>,
    /// True once somebody asked for the running job to stop, until it is redriven.
    pub cancel_requested: bool,
    /// The reported outcome of the last ended attempt; `None` if no report ended it.
    pub outcome: Option<Ended>,
    /// The current lease. Only running jobs have one, and only if a claim started the attempt.
    pub lease: Option<Lease>,
    /// The nonce of the last lease; 0 before the first.
    pub lease_nonce: i64,
    /// The `request_id` of the last redrive.
    pub retry_request: Option<Arc<str>>,
    /// When the first event happened; for imported jobs, when the other system created the job.
    pub created_at: Time,
    /// When the last event happened.
    pub updated_at: Time,
    /// When the job first entered running.
    pub started_at: Option<Time>,
    /// When the job last entered running.
    pub attempt_started_at: Option<Time>,
    /// When the job reached its terminal status.
    pub finished_at: Option<Time>,
    /// The requested end of the current or last wait in the queue; `None` if the job was ready at once.
    pub scheduled_at: Option<Time>,
    /// When the job becomes or became ready: `scheduled_at`, but not before it was queued.
    pub ready_at: Time,
    /// When a timer has to check the job: when its wait, its lease or its `run_timeout` ends, whichever is first. It
    /// may be earlier, and later by the grace that follows an outage or a clock jump. `None` if the job waits only for
    /// a worker, runs without lease and `run_timeout`, or has ended.
    pub due_at: Option<Time>,
    /// When the job was erased, with its events. Nothing changes it afterwards.
    pub erased_at: Option<Time>,
    /// `recorded_at` of the first event, if the payload is stored with that event.
    pub payload_recorded_at: Option<Time>,
    /// `seq` of the first event: orders jobs by creation.
    pub created_seq: i64,
    /// `job_seq` of the last event.
    pub last_job_seq: i64,
    /// `seq` of the last event in the org's log.
    pub last_seq: i64,
    /// `recorded_at` of the last event.
    pub last_recorded_at: Time,
}

impl Job {
    /// The opaque version of the job; every event changes it.
    pub fn etag(&self) -> String {
        self.last_seq.to_string()
    }

    /// True if a worker may claim the job.
    pub fn is_ready(&self) -> bool {
        self.status == JobStatus::Queued && self.due_at.is_none()
    }

    /// True if the job is queued and its time has not come.
    pub fn is_scheduled(&self) -> bool {
        self.status == JobStatus::Queued && self.due_at.is_some()
    }

    /// Removes what people have put into the job, for good.
    pub(super) fn blank(&mut self, now: Time) {
        self.spec = Arc::new(JobSpec {
            idempotency: None,
            requested_by: Arc::default(),
            labels: Labels::default(),
            payload_bytes: 0,
            ..JobSpec::clone(&self.spec)
        });
        (self.stage, self.last_error, self.retry_request) = (None, None, None);
        (self.result_at, self.payload_recorded_at) = (None, None);
        self.outcome = None;
        self.erased_at = Some(now);
    }

    /// Approximate size of the texts of creator and reporters in memory, in bytes.
    pub fn text_bytes(&self) -> usize {
        let error = self.last_error.as_ref().map_or(0, |error| error.code.len() + error.message.len());
        let lease = self.lease.as_ref();
        let lease =
            lease.map_or(0, |lease| lease.worker.len() + lease.request.as_ref().map_or(0, |request| request.len()));
        self.spec.text_bytes() + error + self.stage.as_ref().map_or(0, |stage| stage.len()) + lease
    }

    /// Approximate size in the database without its events, in bytes. Only an edit or an erasure changes it.
    pub fn weight(&self) -> i64 {
        const FIXED: i64 = 1 << 10;
        FIXED + i64::from(self.spec.payload_bytes)
    }

    /// Approximate size in memory, in bytes.
    pub fn bytes(&self) -> usize {
        const WITHOUT_TEXT: usize = 1 << 10;
        WITHOUT_TEXT + self.text_bytes()
    }

    /// The token that proves the current lease; `None` without a lease.
    pub fn lease_token(&self) -> Option<LeaseToken> {
        self.lease.as_ref().map(|_| LeaseToken {
            org: self.org_id,
            job: self.id,
            attempt: self.attempt,
            nonce: self.lease_nonce,
        })
    }
}

/// A job with payload and result.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRecord {
    /// The job.
    pub job: Job,
    /// Its payload and result.
    pub contents: JobContents,
}

/// The payload and result of a job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobContents {
    /// The creator's input.
    pub payload: Option<Json>,
    /// The worker's result.
    pub result: Option<Json>,
}

impl JobContents {
    /// Size of the JSON, in bytes.
    pub fn len(&self) -> usize {
        [&self.payload, &self.result].into_iter().flatten().map(Json::len).sum()
    }

    /// True without payload and result.
    pub fn is_empty(&self) -> bool {
        self.payload.is_none() && self.result.is_none()
    }
}
