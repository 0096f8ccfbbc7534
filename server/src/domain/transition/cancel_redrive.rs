//! Requests from outside: to cancel a job, and to redrive it.

use std::sync::Arc;

use super::{
    Tick, Transition, TransitionError,
    builder::{Detail, Path},
};
use crate::domain::{event::EventKind, job::Job, status::JobStatus};

/// Asks for a job to end. A job under a lease is only marked: its worker ends it.
#[derive(Debug, Clone, PartialEq)]
pub struct Cancel {
    /// The reason, for the log; empty for none.
    pub reason: Arc<str>,
    /// The command is refused if this is not the job's etag.
    pub etag: Option<String>,
    /// Who asks; empty when unknown.
    pub actor: Arc<str>,
}

/// Asks for a finished job to run again, with a fresh budget of attempts.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    /// The command is refused if this is not the job's etag.
    pub etag: Option<String>,
    /// The `request_id`, to recognise the request when it is repeated.
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
                // No report ended this attempt. Without this, a late report could pass as a repetition of an earlier
                // attempt's outcome.
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
