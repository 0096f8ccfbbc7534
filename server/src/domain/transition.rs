//! The state machine: the only place where a job changes.
//!
//! ```text
//!            create                 report running             succeeded
//!   (none) ─────────▶ queued ──────────────────────▶ running ─────────────▶ succeeded
//!                      ▲  ▲                          │ │ │ ▲
//!                      │  └──────── give back ───────┘ │ │ └─ progress
//!                      │                               │ │
//!                      │ retry       failed            │ └──▶ canceled   (every exit but success,
//!                      └────────── failed ◀────────────┘                  after cancel was requested)
//!                                    │ budget of more than one attempt used up
//!                                    └──▶ dead_letter
//! ```
//!
//! Each arrow is exactly one event. A failure that is retried, or that uses the budget up, takes two arrows at once.
//! Checks run in this order: repetition of the same outcome, lease, etag, transition.

use std::{sync::Arc, time::Duration};

use thiserror::Error;

use super::{
    clock::Time,
    event::{ACTOR_LEDGER, EventKind, JobError, JobEvent, Position},
    id::{Digest, JobId, LeaseToken, OrgId},
    job::{Job, JobSpec},
    json::Json,
    status::JobStatus,
};

/// The place in the org's log at which a command is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// The time of the batch, never before that of the log's last event.
    pub now: Time,
    /// The `seq` of the next event.
    pub next_seq: i64,
}

/// Something that is asked of an existing job.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A worker's report.
    Report(Report),
}

/// A worker's report.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Where the job goes; `None` leaves it where it is.
    pub step: Option<Step>,
    /// The new stage, if any is given; an empty one clears it.
    pub stage: Option<Arc<str>>,
    /// The new progress in per cent, if any is given.
    pub progress: Option<u8>,
    /// A remark for the log; empty for none.
    pub message: Arc<str>,
    /// The lease that the reporter holds.
    pub lease: Option<LeaseToken>,
    /// Only if this still is the job's etag.
    pub etag: Option<String>,
    /// Who reports; empty when unknown.
    pub actor: Arc<str>,
}

/// Where a report takes the job.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Begins a queued job; of a running one it is a plain progress report.
    Run,
    /// Ends the attempt, one way or another.
    End(Ending),
}

/// The end of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// How it ended.
    pub outcome: Outcome,
    /// Of everything that makes this outcome the same as another.
    pub digest: Digest,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Well.
    Succeeded {
        /// What the worker returned.
        result: Option<Json>,
    },
    /// With a failure that counts against the budget.
    Failed {
        /// What the worker returned.
        result: Option<Json>,
        /// What went wrong.
        error: JobError,
        /// Whether another attempt may help.
        retryable: bool,
        /// The wait before it, instead of the policy's.
        retry_after: Option<Duration>,
    },
    /// Given back: no failure is counted.
    Released {
        /// The wait before the job is ready again.
        retry_after: Option<Duration>,
    },
    /// The worker confirms a requested cancellation.
    Canceled {
        /// What the worker returned.
        result: Option<Json>,
        /// What went wrong, if anything did.
        error: Option<JobError>,
    },
}

/// What a command does: the job after it, and the events that say so. No events: nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The job after the command.
    pub job: Job,
    /// One for each arrow taken, numbered from the tick's `next_seq`.
    pub events: Vec<JobEvent>,
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransitionError {
    /// No arrow leads there.
    #[error("the job is {current}: no such report leads on from there")]
    InvalidTransition {
        /// Where the job stands.
        current: JobStatus,
    },
    /// The reporter's lease is not the job's.
    #[error("the lease is lost: the job is not held under this lease token")]
    LeaseLost,
    /// The job has changed since.
    #[error("the job has changed: its etag is {current}")]
    EtagMismatch {
        /// The job's etag.
        current: String,
    },
}

impl Job {
    /// Queues a new job.
    pub fn create(id: JobId, org_id: OrgId, spec: Arc<JobSpec>, scheduled_at: Option<Time>, at: Tick) -> Transition {
        let actor = Arc::clone(&spec.requested_by);
        let job = Self {
            id,
            org_id,
            spec,
            status: JobStatus::Queued,
            attempt: 0,
            failures: 0,
            stage: None,
            progress: None,
            result_at: None,
            last_error: None,
            cancel_requested: false,
            outcome: None,
            created_at: at.now,
            updated_at: at.now,
            started_at: None,
            attempt_started_at: None,
            finished_at: None,
            scheduled_at,
            ready_at: scheduled_at.map_or(at.now, |time| time.max(at.now)),
            last_job_seq: 0,
            last_seq: 0,
            last_recorded_at: at.now,
        };
        let mut path = Path::new(&job, &actor, at);
        path.take(EventKind::Created, JobStatus::Queued, Detail { scheduled_at, ..Detail::default() });
        path.events[0].prev_status = None;
        path.finish()
    }

    /// Decides one command. Pure: the same job, command and tick give the same answer.
    ///
    /// # Errors
    ///
    /// If the job must not change in this way; it then stays as it is.
    pub fn apply(&self, command: &Command, at: Tick) -> Result<Transition, TransitionError> {
        match command {
            Command::Report(report) => self.report(report, at),
        }
    }

    fn report(&self, report: &Report, at: Tick) -> Result<Transition, TransitionError> {
        if self.repeats_outcome(report) {
            return Ok(self.unchanged());
        }
        // No job is held under a lease, so no token can be the right one.
        if report.lease.is_some() {
            return Err(TransitionError::LeaseLost);
        }
        if report.etag.as_ref().is_some_and(|etag| *etag != self.etag()) {
            return Err(TransitionError::EtagMismatch { current: self.etag() });
        }
        let mut path = Path::new(self, &report.actor, at);
        match (self.status, &report.step) {
            (JobStatus::Queued, Some(Step::Run)) => {
                path.job.enter_running(at.now);
                path.job.set_news(report);
                path.take(EventKind::Started, JobStatus::Running, Detail::of(report));
            }
            (JobStatus::Running, Some(Step::Run) | None) => {
                if self.has_news(report) {
                    path.job.set_news(report);
                    path.take(EventKind::Progress, JobStatus::Running, Detail::of(report));
                }
            }
            (JobStatus::Running, Some(Step::End(ending))) => {
                if !self.cancel_requested && matches!(ending.outcome, Outcome::Canceled { .. }) {
                    return Err(TransitionError::InvalidTransition { current: self.status });
                }
                path.job.set_news(report);
                path.job.outcome = Some(ending.digest);
                path.end_attempt(&ending.outcome, Detail::of(report));
            }
            (_, None) if !self.has_news(report) => {}
            (current, _) => return Err(TransitionError::InvalidTransition { current }),
        }
        Ok(path.finish())
    }

    /// True if the report is the one that ended the last attempt, and no other attempt has begun.
    fn repeats_outcome(&self, report: &Report) -> bool {
        match &report.step {
            Some(Step::End(ending)) if report.lease.is_none() => {
                self.status != JobStatus::Running && self.outcome == Some(ending.digest)
            }
            _ => false,
        }
    }

    fn unchanged(&self) -> Transition {
        Transition { job: self.clone(), events: Vec::new() }
    }

    fn has_news(&self, report: &Report) -> bool {
        !report.message.is_empty()
            || report.stage.as_ref().is_some_and(|stage| **stage != *self.stage.as_deref().unwrap_or_default())
            || report.progress.is_some_and(|progress| Some(progress) != self.progress)
    }

    fn set_news(&mut self, report: &Report) {
        if let Some(stage) = &report.stage {
            self.stage = (!stage.is_empty()).then(|| Arc::clone(stage));
        }
        if report.progress.is_some() {
            self.progress = report.progress;
        }
    }

    fn enter_running(&mut self, now: Time) {
        self.attempt += 1;
        self.started_at.get_or_insert(now);
        self.attempt_started_at = Some(now);
        self.stage = None;
        self.progress = None;
        self.result_at = None;
    }
}

/// What an event says beside the job's state.
#[derive(Default)]
struct Detail {
    message: Arc<str>,
    result: Option<Json>,
    error: Option<JobError>,
    scheduled_at: Option<Time>,
}

impl Detail {
    fn of(report: &Report) -> Self {
        Self { message: Arc::clone(&report.message), ..Self::default() }
    }
}

/// The way of one job through one command: the job as it becomes, and an event for each arrow.
struct Path {
    job: Job,
    events: Vec<JobEvent>,
    actor: Arc<str>,
    at: Tick,
}

impl Path {
    fn new(job: &Job, actor: &Arc<str>, at: Tick) -> Self {
        Self { job: job.clone(), events: Vec::new(), actor: Arc::clone(actor), at }
    }

    fn finish(self) -> Transition {
        Transition { job: self.job, events: self.events }
    }

    /// Takes one arrow: writes its event, and what the event says, into the job.
    fn take(&mut self, kind: EventKind, next: JobStatus, detail: Detail) {
        let job = &mut self.job;
        let prev = job.status;
        let seq = self.at.next_seq + self.events.len() as i64;
        job.status = next;
        job.updated_at = self.at.now;
        job.last_job_seq += 1;
        job.last_seq = seq;
        job.last_recorded_at = self.at.now;
        if detail.result.is_some() {
            job.result_at = Some(Position { seq, recorded_at: self.at.now });
        }
        if let Some(error) = &detail.error {
            job.last_error = Some(error.clone());
        }
        job.finished_at = next.is_terminal().then_some(self.at.now);
        if next == JobStatus::Queued {
            job.scheduled_at = detail.scheduled_at;
            job.ready_at = detail.scheduled_at.map_or(self.at.now, |time| time.max(self.at.now));
        }
        self.events.push(JobEvent {
            org_id: job.org_id,
            seq,
            job_id: job.id,
            job_seq: job.last_job_seq,
            ts: self.at.now,
            recorded_at: self.at.now,
            kind,
            prev_status: Some(prev),
            next_status: next,
            attempt: job.attempt,
            actor: Arc::clone(&self.actor),
            job_type: Arc::clone(&job.spec.job_type),
            stage: job.stage.clone(),
            progress: job.progress,
            message: detail.message,
            result: detail.result,
            error: detail.error,
            scheduled_at: detail.scheduled_at,
        });
    }

    fn end_attempt(&mut self, outcome: &Outcome, detail: Detail) {
        match outcome {
            Outcome::Succeeded { result } => {
                self.take(EventKind::Succeeded, JobStatus::Succeeded, Detail { result: result.clone(), ..detail });
            }
            // After cancel was requested, every exit other than success leads to canceled and keeps its error.
            Outcome::Failed { result, error, .. } if self.job.cancel_requested => {
                self.cancel(Detail { result: result.clone(), error: Some(error.clone()), ..detail });
            }
            Outcome::Released { .. } if self.job.cancel_requested => self.cancel(detail),
            Outcome::Canceled { result, error } => {
                self.cancel(Detail { result: result.clone(), error: error.clone(), ..detail });
            }
            Outcome::Released { retry_after } => {
                let scheduled_at = retry_after.map(|wait| self.at.now + wait);
                self.take(EventKind::Released, JobStatus::Queued, Detail { scheduled_at, ..detail });
            }
            Outcome::Failed { result, error, retryable, retry_after } => {
                let detail = Detail { result: result.clone(), error: Some(error.clone()), ..detail };
                self.fail(detail, *retryable, *retry_after);
            }
        }
    }

    fn cancel(&mut self, detail: Detail) {
        self.take(EventKind::Canceled, JobStatus::Canceled, detail);
    }

    /// running → failed, and at once on to queued or dead_letter where the budget says so.
    fn fail(&mut self, detail: Detail, retryable: bool, retry_after: Option<Duration>) {
        self.job.failures += 1;
        self.take(EventKind::Failed, JobStatus::Failed, detail);
        if !retryable {
            return;
        }
        let (failures, budget) = (self.job.failures, self.job.spec.max_attempts);
        self.actor = Arc::from(ACTOR_LEDGER);
        if failures < budget {
            let wait = retry_after.unwrap_or_else(|| self.job.spec.retry_policy.delay(self.job.id, failures));
            let scheduled_at = Some(self.at.now + wait);
            self.take(EventKind::RetryScheduled, JobStatus::Queued, Detail { scheduled_at, ..Detail::default() });
        } else if budget > 1 {
            self.take(EventKind::DeadLettered, JobStatus::DeadLetter, Detail::default());
        }
    }
}
