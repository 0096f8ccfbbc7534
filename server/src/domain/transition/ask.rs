//! What others than its worker ask of a job: to stop, or to run again.

use std::sync::Arc;

use super::{
    Tick, Transition, TransitionError,
    path::{Detail, Path},
};
use crate::domain::{event::EventKind, job::Job, status::JobStatus};

/// Asks for a job to end. One that is held is ended by its holder.
#[derive(Debug, Clone, PartialEq)]
pub struct Cancel {
    /// Why, for the log; empty for none.
    pub reason: Arc<str>,
    /// Only if this still is the job's etag.
    pub etag: Option<String>,
    /// Who asks; empty when unknown.
    pub actor: Arc<str>,
}

/// Asks for a finished job to run again, with a fresh budget of attempts.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    /// Only if this still is the job's etag.
    pub etag: Option<String>,
    /// By what the request is known when it comes again.
    pub request: Option<Arc<str>>,
    /// Who asks; empty when unknown.
    pub actor: Arc<str>,
}

impl Job {
    pub(super) fn cancel(&self, cancel: &Cancel, at: Tick) -> Result<Transition, TransitionError> {
        let is_asked_for = self.status == JobStatus::Running && self.cancel_requested;
        if is_asked_for || self.status == JobStatus::Canceled {
            return Ok(self.unchanged());
        }
        self.check_etag(cancel.etag.as_deref())?;
        let mut path = Path::new(self, &cancel.actor, at);
        let detail = Detail::saying(&cancel.reason);
        match self.status {
            JobStatus::Running if self.lease.is_some() => {
                path.job.cancel_requested = true;
                path.take(EventKind::CancelRequested, JobStatus::Running, detail);
            }
            JobStatus::Queued => path.cancel(detail),
            JobStatus::Running => {
                // Nobody's report ended the attempt: what ended an earlier one is none of this.
                path.job.outcome = None;
                path.cancel(detail);
            }
            current => return Err(TransitionError::InvalidTransition { current }),
        }
        Ok(path.finish())
    }

    pub(super) fn retry(&self, retry: &Retry, at: Tick) -> Result<Transition, TransitionError> {
        if retry.request.is_some() && retry.request == self.retry_request {
            return Ok(self.unchanged());
        }
        self.check_etag(retry.etag.as_deref())?;
        match self.status {
            JobStatus::Failed | JobStatus::DeadLetter | JobStatus::Canceled => {}
            current => return Err(TransitionError::InvalidTransition { current }),
        }
        let mut path = Path::new(self, &retry.actor, at);
        path.job.failures = 0;
        path.job.lost_attempts = 0;
        path.job.cancel_requested = false;
        path.job.retry_request.clone_from(&retry.request);
        path.take(EventKind::Requeued, JobStatus::Queued, Detail::default());
        Ok(path.finish())
    }
}
