//! Leases: taken, extended, and given back where nobody took delivery.

use std::{sync::Arc, time::Duration};

use chrono::TimeDelta;

use super::{
    News, Tick, Transition, TransitionError,
    path::{Detail, Path},
};
use crate::domain::{
    clock::Time,
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

/// A claim that came again: takes the lease that it took before, in another answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renew {
    /// What the claim holds.
    pub token: LeaseToken,
    /// For how long from now, at least.
    pub lease: Duration,
}

/// Gives back a lease whose answer nobody took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abandon {
    /// The lease.
    pub token: LeaseToken,
    /// When it was to end, as the answer says: a later answer to the same claim says otherwise.
    pub expires_at: Time,
}

/// Says that the holder still works on the job.
#[derive(Debug, Clone, PartialEq)]
pub struct Heartbeat {
    /// Who says so.
    pub worker: Arc<str>,
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
        path.enter_running(Some(Lease {
            worker: Arc::clone(&claim.worker),
            granted: claim.lease,
            expires_at: at.now + claim.lease,
            request: claim.request.clone(),
            is_confirmed: false,
        }));
        path.job.lease_nonce = at.secret.nonce(self.id, at.next_seq);
        path.take(EventKind::Claimed, JobStatus::Running, Detail::default());
        Ok(path.finish())
    }

    /// A heartbeat never shortens a lease.
    pub(super) fn heartbeat(&self, heartbeat: &Heartbeat, at: Tick) -> Result<Transition, TransitionError> {
        let is_holder =
            |lease: &&Lease| lease.worker == heartbeat.worker && self.lease_token() == Some(heartbeat.token);
        let Some(lease) = self.lease.as_ref().filter(is_holder) else {
            return Err(TransitionError::LeaseLost);
        };
        let mut path = Path::new(self, &lease.worker, at);
        let until = at.now + heartbeat.extend_by.unwrap_or(lease.granted);
        if !lease.is_confirmed || lease.expires_at < until {
            path.change(|job| {
                job.confirm_lease();
                job.extend_lease(until);
            });
        }
        if self.has_news(&heartbeat.news) {
            path.job.set_news(&heartbeat.news);
            path.take(EventKind::Progress, JobStatus::Running, Detail::saying(&heartbeat.news.message));
        }
        Ok(path.finish())
    }

    /// The lease ends no earlier than this, and time is to look at the job no earlier either, unless it is to for another reason.
    fn extend_lease(&mut self, until: Time) {
        let is_due_then = self.due_at == self.attempt_ends_at();
        if let Some(lease) = &mut self.lease {
            lease.expires_at = lease.expires_at.max(until);
        }
        if is_due_then {
            self.due_at = self.attempt_ends_at();
        }
    }

    /// Extends the lease for another answer with it, of which it is not known either whether anybody takes it: whatever else an answer says,
    /// no two say the same end.
    pub(super) fn renew(&self, renew: Renew, at: Tick) -> Result<Transition, TransitionError> {
        let Some(lease) = self.lease.as_ref().filter(|_| self.lease_token() == Some(renew.token)) else {
            return Err(TransitionError::LeaseLost);
        };
        let mut path = Path::new(self, &lease.worker, at);
        let expires_at = (at.now + renew.lease).max(lease.expires_at + TimeDelta::microseconds(1));
        path.change(|job| job.extend_lease(expires_at));
        Ok(path.finish())
    }

    /// Gives back what its claimer never took delivery of, unless something was heard of it since, or there is a later answer with it.
    pub(super) fn abandon(&self, abandon: Abandon, at: Tick) -> Transition {
        let is_as_answered =
            self.lease.as_ref().is_some_and(|lease| !lease.is_confirmed && lease.expires_at == abandon.expires_at);
        if self.lease_token() != Some(abandon.token) || !is_as_answered {
            return self.unchanged();
        }
        let mut path = Path::new(self, &Arc::from(ACTOR_LEDGER), at);
        path.job.outcome = None;
        path.release(None, Detail::saying(&"the caller that claimed it had gone".into()));
        path.finish()
    }
}
