//! Leases: taken, extended, and given back where nobody took delivery.

use std::{sync::Arc, time::Duration};

use super::{
    News, Tick, Transition, TransitionError,
    path::{Detail, Path},
};
use crate::domain::{
    event::{ACTOR_LEDGER, EventKind},
    job::Job,
    lease::{Lease, LeaseToken},
    status::JobStatus,
};

/// Takes a job that is ready, under a lease.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// Who takes it.
    pub worker: Arc<str>,
    /// For how long, unless it is extended.
    pub lease: Duration,
    /// By what the claim is known when it comes again.
    pub request: Option<Arc<str>>,
}

/// Says that the holder still works on the job.
#[derive(Debug, Clone, PartialEq)]
pub struct Heartbeat {
    /// What the holder holds.
    pub token: LeaseToken,
    /// What it is doing.
    pub news: News,
    /// How long the lease shall go on from now, at least; `None`: as long as it was granted for.
    pub extend_by: Option<Duration>,
}

impl Job {
    pub(super) fn claim(&self, claim: &Claim, at: Tick) -> Result<Transition, TransitionError> {
        if !self.is_ready() {
            return Err(TransitionError::InvalidTransition { current: self.status });
        }
        let mut path = Path::new(self, &claim.worker, at);
        path.job.lease_epoch = path.next_epoch();
        path.enter_running(Some(Lease {
            worker: Arc::clone(&claim.worker),
            granted: claim.lease,
            expires_at: at.now + claim.lease,
            request: claim.request.clone(),
            is_confirmed: false,
        }));
        path.take(EventKind::Claimed, JobStatus::Running, Detail::default());
        Ok(path.finish())
    }

    /// A heartbeat never shortens a lease.
    pub(super) fn heartbeat(&self, heartbeat: &Heartbeat, at: Tick) -> Result<Transition, TransitionError> {
        let Some(lease) = self.lease.as_ref().filter(|_| self.lease_token() == Some(heartbeat.token)) else {
            return Err(TransitionError::LeaseLost);
        };
        let mut path = Path::new(self, &lease.worker, at);
        let until = at.now + heartbeat.extend_by.unwrap_or(lease.granted);
        path.change(|job| {
            job.confirm_lease();
            if let Some(lease) = &mut job.lease {
                lease.expires_at = lease.expires_at.max(until);
            }
        });
        if self.has_news(&heartbeat.news) {
            path.job.set_news(&heartbeat.news);
            path.take(EventKind::Progress, JobStatus::Running, Detail::saying(&heartbeat.news.message));
        }
        Ok(path.finish())
    }

    /// Gives back what its claimer never took delivery of, unless something was heard of it since.
    pub(super) fn abandon(&self, token: LeaseToken, at: Tick) -> Transition {
        let is_unheard_of = self.lease.as_ref().is_some_and(|lease| !lease.is_confirmed);
        if self.lease_token() != Some(token) || !is_unheard_of {
            return self.unchanged();
        }
        let mut path = Path::new(self, &Arc::from(ACTOR_LEDGER), at);
        path.job.outcome = None;
        path.release(None, Detail::saying(&"the caller that claimed it had gone".into()));
        path.finish()
    }
}
