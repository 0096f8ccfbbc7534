//! Reports of workers.

use std::{sync::Arc, time::Duration};

use super::{
    Tick, Transition, TransitionError,
    builder::{Detail, Path},
};
use crate::domain::{
    event::{EventKind, JobError},
    id::Digest,
    job::{Ended, Job},
    json::Json,
    lease::LeaseToken,
    status::JobStatus,
};

/// What a worker reports while it goes on working.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct News {
    /// The new stage; empty clears it, `None` leaves it.
    pub stage: Option<Arc<str>>,
    /// The new progress in per cent; `None` leaves it.
    pub progress: Option<u8>,
    /// A remark for the log; empty for none.
    pub message: Arc<str>,
}

/// A worker's report.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Where the report takes the job; `None` leaves its status.
    pub step: Option<Step>,
    /// What the worker is doing.
    pub news: News,
    /// The reporter's lease token.
    pub lease: Option<LeaseToken>,
    /// The report is refused if this is not the job's etag.
    pub etag: Option<String>,
    /// Who reports; empty when unknown.
    pub actor: Arc<str>,
}

/// The step that a report takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Starts a queued job. On a running job this is a plain progress report.
    Run,
    /// Ends the attempt.
    End(Ending),
}

/// The end of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// How the attempt ended.
    pub outcome: Outcome,
    /// Digest of everything that distinguishes this outcome from others.
    pub digest: Digest,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The attempt succeeded.
    Succeeded {
        /// What the worker returned.
        result: Option<Json>,
    },
    /// The attempt failed, which counts against the budget.
    Failed {
        /// What the worker returned.
        result: Option<Json>,
        /// The error.
        error: JobError,
        /// Whether the job may be retried.
        retryable: bool,
        /// The wait before the retry, instead of the policy's delay.
        retry_after: Option<Duration>,
    },
    /// The worker gives the job back. No failure is counted.
    Released {
        /// The wait before the job is ready again.
        retry_after: Option<Duration>,
    },
    /// The worker confirms a requested cancellation.
    Canceled {
        /// What the worker returned.
        result: Option<Json>,
        /// The error, if there was one.
        error: Option<JobError>,
    },
}

impl Job {
    pub(super) fn report(&self, report: &Report, at: Tick) -> Result<Transition, TransitionError> {
        if self.repeats_outcome(report) {
            return Ok(self.unchanged());
        }
        // This also refuses a report without a token if the job has a lease.
        if report.lease != self.lease_token() {
            return Err(TransitionError::LeaseLost);
        }
        self.check_etag(report.etag.as_deref())?;
        let actor = self.lease.as_ref().map_or(&report.actor, |lease| &lease.worker);
        let mut path = Path::new(self, actor, at);
        let detail = Detail::saying(&report.news.message);
        match (self.status, &report.step) {
            (JobStatus::Queued, Some(Step::Run)) => {
                path.enter_running(None);
                path.job.set_news(&report.news);
                path.take(EventKind::Started, JobStatus::Running, detail);
            }
            (JobStatus::Running, Some(Step::Run) | None) => {
                if self.has_news(&report.news) {
                    path.job.set_news(&report.news);
                    path.job.confirm_lease();
                    path.take(EventKind::Progress, JobStatus::Running, detail);
                }
            }
            (JobStatus::Running, Some(Step::End(ending))) => {
                if !self.cancel_requested && matches!(ending.outcome, Outcome::Canceled { .. }) {
                    return Err(TransitionError::InvalidTransition { current: self.status });
                }
                path.job.set_news(&report.news);
                let nonce = self.lease.as_ref().map(|_| self.lease_nonce);
                path.job.outcome = Some(Ended { digest: ending.digest, nonce });
                path.end_attempt(&ending.outcome, detail);
            }
            (_, None) if !self.has_news(&report.news) => {}
            (current, _) => return Err(TransitionError::InvalidTransition { current }),
        }
        Ok(path.finish())
    }

    /// True if the report repeats the outcome of the last ended attempt. With a lease token it must be that attempt's, and
    /// the job may run again; without one, no attempt may have started since.
    pub(super) fn repeats_outcome(&self, report: &Report) -> bool {
        let (Some(Step::End(ending)), Some(outcome)) = (&report.step, &self.outcome) else { return false };
        let is_of_it = match report.lease {
            None => self.status != JobStatus::Running,
            Some(token) => token.job == self.id && Some(token.nonce) == outcome.nonce,
        };
        is_of_it && outcome.digest == ending.digest
    }

    pub(super) fn has_news(&self, news: &News) -> bool {
        !news.message.is_empty()
            || news.stage.as_ref().is_some_and(|stage| **stage != *self.stage.as_deref().unwrap_or_default())
            || news.progress.is_some_and(|progress| Some(progress) != self.progress)
    }

    pub(super) fn set_news(&mut self, news: &News) {
        if let Some(stage) = &news.stage {
            self.stage = (!stage.is_empty()).then(|| Arc::clone(stage));
        }
        if news.progress.is_some() {
            self.progress = news.progress;
        }
    }
}
