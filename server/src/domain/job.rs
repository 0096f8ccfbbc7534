//! A job: what its creator asked for, and where it stands.

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

/// Characters of a type.
pub const MAX_TYPE_CHARS: usize = 100;
/// Characters of whatever names somebody or something: a key, a requester, a worker.
pub const MAX_NAME_CHARS: usize = 255;
/// Characters of a stage.
pub const MAX_STAGE_CHARS: usize = 100;
/// Characters of an error's code.
pub const MAX_ERROR_CODE_CHARS: usize = 100;
/// A priority is no higher than this, and no lower than as much below zero.
pub const MAX_PRIORITY: i32 = 1_000;

/// How many attempts may be lost without counting as failures, where the creator doesn't say.
pub const DEFAULT_MAX_LOST_ATTEMPTS: i32 = 3;

/// What a creator calls a job, by key. Shared by the job and its events.
pub type Labels = Arc<BTreeMap<String, String>>;

/// What the creator asked for. Never changes.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSpec {
    /// What kind of work this is.
    pub job_type: Arc<str>,
    /// Higher first.
    pub priority: i32,
    /// How many failures until the job stops being retried; at least 1.
    pub max_attempts: i32,
    /// How many lost attempts don't count as failures.
    pub max_lost_attempts: i32,
    /// How long to wait between attempts.
    pub retry_policy: RetryPolicy,
    /// The creator's key, with the digest of the request that came with it.
    pub idempotency: Option<Idempotency>,
    /// Who asked; empty when unknown.
    pub requested_by: Arc<str>,
    /// The creator's labels.
    pub labels: Labels,
    /// How long an attempt may take; `None`: for ever.
    pub run_timeout: Option<Duration>,
    /// What the payload takes on the wire; 0 where there is none.
    pub payload_bytes: u32,
}

/// What makes repeating a create safe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// Unique in the org.
    pub key: Arc<str>,
    /// Of the whole request but the key; `None` of a key that was brought in from another system, which says nothing of it.
    pub digest: Option<Digest>,
}

/// The end of a job's last ended attempt, to know the same report when it comes again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Of everything that makes the outcome the same as another.
    pub digest: Digest,
    /// The nonce of the lease under which it was reported, if it was under one.
    pub nonce: Option<i64>,
}

/// A job as its org's log has it. Payload and result are not held here: no decision needs them.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Identity.
    pub id: JobId,
    /// Whose job.
    pub org_id: OrgId,
    /// What the creator asked for.
    pub spec: Arc<JobSpec>,
    /// Where it stands.
    pub status: JobStatus,
    /// How often it has entered running; never falls.
    pub attempt: i32,
    /// What counts against `max_attempts`.
    pub failures: i32,
    /// Attempts whose leases expired, and that did not count as failures: at most `max_lost_attempts`.
    pub lost_attempts: i32,
    /// What the worker is doing, in its own words.
    pub stage: Option<Arc<str>>,
    /// How far the attempt is, in per cent.
    pub progress: Option<u8>,
    /// The event that brought the result, if there is one.
    pub result_at: Option<Position>,
    /// The last failure; kept through later attempts.
    pub last_error: Option<JobError>,
    /// Somebody asked for the running job to stop.
    pub cancel_requested: bool,
    /// How the last attempt that a report ended did so.
    pub outcome: Option<Ended>,
    /// Who holds the job; only of one that is running, and not where a reporter without a lease runs it.
    pub lease: Option<Lease>,
    /// The nonce of the last lease; 0 before the first.
    pub lease_nonce: i64,
    /// The `request_id` of the last request to run the finished job again.
    pub retry_request: Option<Arc<str>>,
    /// Time of the first event.
    pub created_at: Time,
    /// Time of the last event.
    pub updated_at: Time,
    /// First entry into running.
    pub started_at: Option<Time>,
    /// Last entry into running.
    pub attempt_started_at: Option<Time>,
    /// When it reached its terminal status.
    pub finished_at: Option<Time>,
    /// Asked-for time of the current or last wait in the queue.
    pub scheduled_at: Option<Time>,
    /// When the current or last wait in the queue became, or becomes, ready to end.
    pub ready_at: Time,
    /// When time itself may change the job: a wait ends, a lease, or the time for the attempt. Never later than that, but
    /// possibly earlier, where time was to look at it for another reason. `None` of a job that waits for nothing but a worker.
    pub due_at: Option<Time>,
    /// `recorded_at` of the first event, where the payload lies with it.
    pub payload_recorded_at: Option<Time>,
    /// `seq` of the first event: the job's place in the order of creation.
    pub created_seq: i64,
    /// `job_seq` of the last event.
    pub last_job_seq: i64,
    /// `seq` of the last event in the org's log.
    pub last_seq: i64,
    /// `recorded_at` of the last event.
    pub last_recorded_at: Time,
}

impl Job {
    /// The opaque version of the job: changes with every event.
    pub fn etag(&self) -> String {
        self.last_seq.to_string()
    }

    /// True of a job that a worker may claim.
    pub fn is_ready(&self) -> bool {
        self.status == JobStatus::Queued && self.due_at.is_none()
    }

    /// True of a job whose time is still to come.
    pub fn is_scheduled(&self) -> bool {
        self.status == JobStatus::Queued && self.due_at.is_some()
    }

    /// What its creator's and reporters' texts take in memory, about, in bytes.
    pub fn text_bytes(&self) -> usize {
        let spec = &self.spec;
        let labels: usize = spec.labels.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
        let key = spec.idempotency.as_ref().map_or(0, |idempotency| idempotency.key.len());
        let error = self.last_error.as_ref().map_or(0, |error| error.code.len() + error.message.len());
        let lease = self.lease.as_ref();
        let lease =
            lease.map_or(0, |lease| lease.worker.len() + lease.request.as_ref().map_or(0, |request| request.len()));
        labels + key + spec.requested_by.len() + error + self.stage.as_ref().map_or(0, |stage| stage.len()) + lease
    }

    /// What it takes in the database beside its events, about, in bytes; never changed.
    pub fn weight(&self) -> i64 {
        const FIXED: i64 = 1 << 10;
        FIXED + i64::from(self.spec.payload_bytes)
    }

    /// What it takes in memory, about.
    pub fn bytes(&self) -> usize {
        const WITHOUT_TEXT: usize = 1 << 10;
        WITHOUT_TEXT + self.text_bytes()
    }

    /// What proves the hold on the job; `None` where nobody holds it.
    pub fn lease_token(&self) -> Option<LeaseToken> {
        self.lease.as_ref().map(|_| LeaseToken {
            org: self.org_id,
            job: self.id,
            attempt: self.attempt,
            nonce: self.lease_nonce,
        })
    }
}

/// A job with all that its readers may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRecord {
    /// The job.
    pub job: Job,
    /// What it carries.
    pub contents: JobContents,
}

/// What a job carries.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobContents {
    /// The creator's input.
    pub payload: Option<Json>,
    /// The worker's result.
    pub result: Option<Json>,
}

impl JobContents {
    /// Bytes of JSON.
    pub fn len(&self) -> usize {
        [&self.payload, &self.result].into_iter().flatten().map(Json::len).sum()
    }

    /// True if it carries nothing.
    pub fn is_empty(&self) -> bool {
        self.payload.is_none() && self.result.is_none()
    }
}
