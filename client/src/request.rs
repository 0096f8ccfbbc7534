//! Requests, built step by step. Each turns into the contract's message, which can be given instead.

use std::time::{Duration, SystemTime};

use jobledger_proto::v1::{
    ClaimJobsRequest, CreateJobRequest, JobStatus, RetryPolicy, StreamJobEventsRequest, UpdateJobStatusRequest,
};
use serde::Serialize;

use crate::{Cursor, Error, json::to_field};

/// A job to create.
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct NewJob(CreateJobRequest);

impl NewJob {
    /// A job of this type, 1 to 100 characters.
    pub fn new(job_type: impl Into<String>) -> Self {
        Self(CreateJobRequest { r#type: job_type.into(), ..CreateJobRequest::default() })
    }

    /// Input for the worker: any JSON, at most 1 MiB encoded.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if it has no JSON form; [`Error::Number`] if it holds a number of ±2⁵³ or beyond.
    pub fn payload<T: Serialize + ?Sized>(mut self, payload: &T) -> Result<Self, Error> {
        self.0.payload = Some(to_field("payload", payload)?);
        Ok(self)
    }

    /// Higher first, −1,000 to 1,000. Default 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.0.priority = priority;
        self
    }

    /// Makes the job once, however often it is asked for with the same key and the same request. At most 255 characters.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.0.idempotency_key = key.into();
        self
    }

    /// Who asks. At most 255 characters.
    pub fn requested_by(mut self, who: impl Into<String>) -> Self {
        self.0.requested_by = who.into();
        self
    }

    /// One more label: a key of 1 to 63 and a value of at most 63 characters; at most 32 of them.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.labels.insert(key.into(), value.into());
        self
    }

    /// Not to be worked on before this time, to the microsecond.
    pub fn scheduled_at(mut self, time: impl Into<SystemTime>) -> Self {
        self.0.scheduled_at = Some(time.into().into());
        self
    }

    /// How many failures until the job stops being retried, 1 to 100. Default 1: no retry.
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.0.max_attempts = attempts;
        self
    }

    /// How many attempts may be lost, 0 to 100, because their leases expire: what a worker that is killed costs. Each one beyond that
    /// is a failure. Default 3. With 0, and one attempt, work that was begun is never begun again.
    pub fn max_lost_attempts(mut self, attempts: i32) -> Self {
        self.0.max_lost_attempts = Some(attempts);
        self
    }

    /// How long to wait between attempts.
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.0.retry_policy = Some(policy);
        self
    }

    /// How long an attempt may take, 1 s to 365 days. Default: for ever.
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

/// A report on a job.
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

    /// The work begins. On a job that is running already it says nothing new.
    pub fn start(job_id: impl Into<String>) -> Self {
        Self::of(job_id, Some(JobStatus::Running))
    }

    /// The work goes on: give a stage, a percentage or a message.
    pub fn progress(job_id: impl Into<String>) -> Self {
        Self::of(job_id, None)
    }

    /// The work ended well.
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

    /// The job goes back to the queue without a failure being counted.
    pub fn released(job_id: impl Into<String>) -> Self {
        Self::of(job_id, Some(JobStatus::Queued))
    }

    /// What is being done. At most 100 characters; the empty string clears it.
    pub fn stage(mut self, stage: impl Into<String>) -> Self {
        self.0.stage = Some(stage.into());
        self
    }

    /// How far it is, 0 to 100 per cent.
    pub fn percent(mut self, percent: i32) -> Self {
        self.0.progress = Some(percent);
        self
    }

    /// A remark for the event log, at most 4 KiB.
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.0.message = message.into();
        self
    }

    /// What came of it: any JSON, at most 1 MiB encoded. Only with an end.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if it has no JSON form; [`Error::Number`] if it holds a number of ±2⁵³ or beyond.
    pub fn result<T: Serialize + ?Sized>(mut self, result: &T) -> Result<Self, Error> {
        self.0.result = Some(to_field("result", result)?);
        Ok(self)
    }

    /// Another attempt would not help. Only with a failure.
    pub fn permanent(mut self) -> Self {
        self.0.retryable = Some(false);
        self
    }

    /// Try again after this time. Only with a failure or a release.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(duration(wait));
        self
    }

    /// Only if this still is the job's etag.
    pub fn etag(mut self, etag: impl Into<String>) -> Self {
        self.0.etag = etag.into();
        self
    }

    /// Under this lease, by its token: what a job that is held takes reports with.
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

/// What is too long for the contract's type is too long for its bounds, and refused by the service.
pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    duration.try_into().unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

/// Work to ask for.
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Claim(ClaimJobsRequest);

impl Claim {
    /// One job for this worker, a name for people of at most 255 characters; at once, or none.
    pub fn new(worker_id: impl Into<String>) -> Self {
        Self(ClaimJobsRequest { worker_id: worker_id.into(), ..ClaimJobsRequest::default() })
    }

    /// Only jobs of these types, at most 100. Default: all.
    pub fn types<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.0.types = types.into_iter().map(Into::into).collect();
        self
    }

    /// No more than this many, 1 to 100.
    pub fn max_jobs(mut self, jobs: i32) -> Self {
        self.0.max_jobs = jobs;
        self
    }

    /// How long the worker may be silent until it is taken for dead, 1 s to 24 h. Default 30 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.0.lease_duration = Some(duration(lease));
        self
    }

    /// How long to wait where no job is ready, at most 60 s. Default: not at all.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.0.wait = Some(duration(wait));
        self
    }

    /// By what the claim is known when it comes again. Default: a random one, so that trying again is safe.
    pub fn request_id(mut self, id: impl ToString) -> Self {
        self.0.request_id = id.to_string();
        self
    }
}

impl From<Claim> for ClaimJobsRequest {
    fn from(claim: Claim) -> Self {
        claim.0
    }
}

/// Which events to follow.
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Follow(StreamJobEventsRequest);

impl Follow {
    /// All events of the org: from now on, unless [`Follow::after`] says otherwise.
    pub fn org() -> Self {
        Self(StreamJobEventsRequest::default())
    }

    /// The events of one job: its whole history, unless [`Follow::after`] says otherwise, and then live until it is finished.
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

    /// On from a cursor that was stored. One that belongs to another log, because the service's database was restored from a
    /// backup since, is refused ([`Error::EpochChanged`]).
    pub fn resume(mut self, cursor: &Cursor) -> Self {
        self.0.after_seq = Some(cursor.seq);
        self.0.log_id.clone_from(&cursor.log_id);
        self
    }

    /// The jobs that match as they are now, first; then every event since. Not together with a cursor.
    pub fn snapshot(mut self) -> Self {
        self.0.include_snapshot = true;
        self
    }

    /// Of events by status, those too that lead away from one: what a subscription that began with a snapshot has to say when it is
    /// [resumed](Self::resume) by a stored cursor, to see jobs leave.
    pub fn leaving(mut self) -> Self {
        self.0.include_leaving = true;
        self
    }

    /// Only events of jobs with this label; of jobs with all of them, if there are several.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.labels.insert(key.into(), value.into());
        self
    }

    /// Only events that lead to one of these statuses; with a snapshot, or in a view, also those that lead away from one.
    pub fn statuses(mut self, statuses: impl IntoIterator<Item = JobStatus>) -> Self {
        self.0.statuses = statuses.into_iter().map(Into::into).collect();
        self
    }

    /// End at what is the head of the log when the stream is opened.
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
