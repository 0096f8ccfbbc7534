//! What workers report.

use std::{sync::Arc, time::Duration};

use super::{
    Tick, Transition, TransitionError,
    path::{Detail, Path},
};
use crate::domain::{
    clock::Time,
    event::{EventKind, JobError},
    id::{Digest, LeaseToken},
    job::Job,
    json::Json,
    status::JobStatus,
};

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

impl Job {
    pub(super) fn report(&self, report: &Report, at: Tick) -> Result<Transition, TransitionError> {
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
