//! Builders of requests. Each converts into its message of the contract, which the calls also accept directly.

use std::time::{Duration, SystemTime};

use jobledger_proto::v1::{
    ClaimJobsRequest, CreateJobRequest, JobStatus, RetryPolicy, StreamJobEventsRequest, UpdateJobStatusRequest,
};
use serde::Serialize;

use crate::{Cursor, Error, json::to_field};

/// A job to create, for [`Client::create`](crate::Client::create).
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct NewJob(CreateJobRequest);

impl NewJob {
    /// A job of this type, which has 1 to 100 characters, none of them a control character.
    pub fn new(job_type: impl Into<String>) -> Self {
        Self(CreateJobRequest { r#type: job_type.into(), ..CreateJobRequest::default() })
    }

    /// Input for the worker: any JSON, at most 1 MiB encoded and nested at most 32 deep.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if the payload has no JSON form; [`Error::Number`] if it contains a number of ±2⁵³ or beyond.
    pub fn payload<T: Serialize + ?Sized>(mut self, payload: &T) -> Result<Self, Error> {
        self.0.payload = Some(to_field("payload", payload)?);
        Ok(self)
    }

    /// Workers get jobs of a higher priority first. −1,000 to 1,000. Default 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.0.priority = priority;
        self
    }

    /// Creates only one job for this key, however often the same request is sent. At most 255 characters. Default: random.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.0.idempotency_key = key.into();
        self
    }

    /// Who asked for the job. At most 255 characters. Default: the principal of the credential.
    pub fn requested_by(mut self, who: impl Into<String>) -> Self {
        self.0.requested_by = who.into();
        self
    }

    /// Adds a label. A key has 1 to 63 characters, a value at most 63. A job has at most 32 labels.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.labels.insert(key.into(), value.into());
        self
    }

    /// The job becomes ready at this time. The service keeps it to the microsecond. Default: at once.
    pub fn scheduled_at(mut self, time: impl Into<SystemTime>) -> Self {
        self.0.scheduled_at = Some(time.into().into());
        self
    }

    /// How many failures end the retries, 1 to 100. Default 1: no retry.
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.0.max_attempts = attempts;
        self
    }

    /// How many attempts may be lost without counting as failures, 0 to 100. An expired lease loses the attempt, for instance
    /// after the worker was killed. Default 3. With 0, and `max_attempts` 1, work that has begun is never begun again.
    pub fn max_lost_attempts(mut self, attempts: i32) -> Self {
        self.0.max_lost_attempts = Some(attempts);
        self
    }

    /// How long to wait between attempts. Default: 1 s, doubling up to 10 min, with full jitter.
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.0.retry_policy = Some(policy);
        self
    }

    /// How long an attempt may take, 1 s to 365 days. A longer attempt fails with `RUN_TIMEOUT`. Default: unlimited.
    pub fn run_timeout(mut self, timeout: Duration) -> Self {
        self.0.run_timeout = Some(duration(timeout));
        self
    }
}

impl From<NewJob> for CreateJobRequest {
    fn from(job: NewJob) -> Self {
        job.0
    }
}

/// A report on a job, for [`Client::update`](crate::Client::update).
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Report(UpdateJobStatusRequest);

impl Report {
    fn of(job_id: impl Into<String>, status: Option<JobStatus>) -> Self {
        Self(UpdateJobStatusRequest {
            job_id: job_id.into(),
            status: status.map(Into::into),
            ..UpdateJobStatusRequest::default()
        })
    }

    /// The work begins. On a job that is already running this is a progress report.
    pub fn start(job_id: impl Into<String>) -> Self {
        Self::of(job_id, Some(JobStatus::Running))
    }

    /// The work goes on. Add a stage, a percentage or a message.
    pub fn progress(job_id: impl Into<String>) -> Self {
        Self::of(job_id, None)
    }

    /// The job succeeded.
    pub fn succeeded(job_id: impl Into<String>) -> Self {
        Self::of(job_id, Some(JobStatus::Succeeded))
    }

    /// The attempt failed: a short, stable code of at most 100 characters, and a message for people of at most 4 KiB.
    pub fn failed(job_id: impl Into<String>, code: impl Into<String>, message: impl Into<String>) -> Self {
        let mut report = Self::of(job_id, Some(JobStatus::Failed));
        report.0.error_code = code.into();
        report.0.error_message = message.into();
        report
    }

    /// The worker has stopped because somebody asked for the job to be canceled.
    pub fn canceled(job_id: impl Into<String>) -> Self {
        Self::of(job_id, Some(JobStatus::Canceled))
    }

    /// The worker gives the job back to the queue. This is not a failure.
    pub fn released(job_id: impl Into<String>) -> Self {
        Self::of(job_id, Some(JobStatus::Queued))
    }

    /// What the worker is doing. At most 100 characters; the empty string clears the stage.
    pub fn stage(mut self, stage: impl Into<String>) -> Self {
        self.0.stage = Some(stage.into());
        self
    }

    /// Progress of the attempt, 0 to 100 per cent.
    pub fn percent(mut self, percent: i32) -> Self {
        self.0.progress = Some(percent);
        self
    }

    /// A remark for the event log, at most 4 KiB.
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.0.message = message.into();
        self
    }

    /// The result of the job: any JSON, at most 1 MiB encoded. Only with succeeded, failed or canceled.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if the result has no JSON form; [`Error::Number`] if it contains a number of ±2⁵³ or beyond.
    pub fn result<T: Serialize + ?Sized>(mut self, result: &T) -> Result<Self, Error> {
        self.0.result = Some(to_field("result", result)?);
        Ok(self)
    }

    /// Rules out further attempts. Only for a failure.
    pub fn permanent(mut self) -> Self {
        self.0.retryable = Some(false);
        self
    }

    /// Delay of the next attempt, 0 to 365 days, instead of the retry policy's. Only for a failure or a release.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(duration(wait));
        self
    }

    /// Makes the report conditional: [`Error::EtagMismatch`] if this is not the job's etag.
    pub fn etag(mut self, etag: impl Into<String>) -> Self {
        self.0.etag = etag.into();
        self
    }

    /// The token of the lease that holds the job. A held job accepts reports under this token only.
    pub fn lease(mut self, token: impl Into<String>) -> Self {
        self.0.lease_token = token.into();
        self
    }
}

impl From<Report> for UpdateJobStatusRequest {
    fn from(report: Report) -> Self {
        report.0
    }
}

/// Converts a duration. One that is too long for the message type becomes the longest one, which the service refuses.
pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    duration.try_into().unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

/// A request for jobs, for [`Client::claim`](crate::Client::claim).
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Claim(ClaimJobsRequest);

impl Claim {
    /// Claims one job without waiting. `worker_id` is a name for people, of 1 to 255 characters.
    pub fn new(worker_id: impl Into<String>) -> Self {
        Self(ClaimJobsRequest { worker_id: worker_id.into(), ..ClaimJobsRequest::default() })
    }

    /// Claims only jobs of these types, at most 100. Default: jobs of all types.
    pub fn types<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.0.types = types.into_iter().map(Into::into).collect();
        self
    }

    /// Claims up to this many jobs, 1 to 100. Default 1.
    pub fn max_jobs(mut self, jobs: i32) -> Self {
        self.0.max_jobs = jobs;
        self
    }

    /// Length of the leases, 1 s to 24 h: a worker that sends no heartbeat for this long loses the job. Default 30 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.0.lease_duration = Some(duration(lease));
        self
    }

    /// How long to wait if no job is ready, at most 60 s. Default: no wait.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.0.wait = Some(duration(wait));
        self
    }

    /// Makes the claim repeatable: the same id gets the same leases. At most 255 characters. Default: random.
    pub fn request_id(mut self, id: impl ToString) -> Self {
        self.0.request_id = id.to_string();
        self
    }

    /// The worker's version, which lists of workers show. At most 255 characters.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.0.worker_version = version.into();
        self
    }

    /// The machine that the worker runs on, which lists of workers show. At most 255 characters.
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.0.worker_host = host.into();
        self
    }
}

impl From<Claim> for ClaimJobsRequest {
    fn from(claim: Claim) -> Self {
        claim.0
    }
}

/// Selects the events of a [`Subscription`](crate::Subscription), or the jobs of a [`View`](crate::View).
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Follow(StreamJobEventsRequest);

impl Follow {
    /// All events of the org, from the current head of the log on, unless [`Follow::after`] sets another start.
    pub fn org() -> Self {
        Self(StreamJobEventsRequest::default())
    }

    /// The events of one job: the whole history, unless [`Follow::after`] says otherwise, then live until the job has finished.
    pub fn job(job_id: impl Into<String>) -> Self {
        Self(StreamJobEventsRequest { job_id: job_id.into(), ..StreamJobEventsRequest::default() })
    }

    /// Only events with a greater `seq`; 0 is the beginning of the log.
    pub fn after(mut self, seq: i64) -> Self {
        self.0.after_seq = Some(seq);
        self
    }

    /// Only events of jobs of these types, at most 100.
    pub fn types<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.0.types = types.into_iter().map(Into::into).collect();
        self
    }

    /// Resumes after a stored cursor. The service refuses a cursor of another log ([`Error::EpochChanged`]), for
    /// instance after its database was restored from a backup.
    pub fn resume(mut self, cursor: &Cursor) -> Self {
        self.0.after_seq = Some(cursor.seq);
        self.0.log_id.clone_from(&cursor.log_id);
        self
    }

    /// Delivers the matching jobs as they are now first, and then every event since. Not together with a cursor.
    pub fn snapshot(mut self) -> Self {
        self.0.include_snapshot = true;
        self
    }

    /// With [`Follow::statuses`], also delivers events that lead away from one of them. Needed to see jobs leave when a
    /// subscription that began with a snapshot is [resumed](Self::resume) from a stored cursor.
    pub fn leaving(mut self) -> Self {
        self.0.include_leaving = true;
        self
    }

    /// Only events of jobs with this label. If called several times, the job must have all the labels, at most 32.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.labels.insert(key.into(), value.into());
        self
    }

    /// Only events that lead to one of these statuses; with a snapshot, or in a view, also those that lead away from one.
    pub fn statuses(mut self, statuses: impl IntoIterator<Item = JobStatus>) -> Self {
        self.0.statuses = statuses.into_iter().map(Into::into).collect();
        self
    }

    /// Ends at the head that the log has when the stream is opened, or when the snapshot is complete.
    pub fn history_only(mut self) -> Self {
        self.0.history_only = true;
        self
    }
}

impl From<Follow> for StreamJobEventsRequest {
    fn from(follow: Follow) -> Self {
        follow.0
    }
}
