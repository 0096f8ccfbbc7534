//! Leases: claim, extend, and give back undelivered jobs.

use std::{sync::Arc, time::Duration};

use chrono::TimeDelta;

use super::{
    News, Tick, Transition, TransitionError,
    builder::{Detail, Path},
};
use crate::domain::{
    clock::Time,
    event::{ACTOR_LEDGER, EventKind},
    job::Job,
    lease::{Lease, LeaseToken},
    status::JobStatus,
};

/// Takes a ready job under a lease.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The worker that claims.
    pub worker: Arc<str>,
    /// How long the lease lasts unless it is extended.
    pub lease: Duration,
    /// The `request_id`, to recognise the claim when it is repeated.
    pub request: Option<Arc<str>>,
}

/// Repeats a claim: the lease of the first one is delivered in another answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redeliver {
    /// The lease token of the first claim.
    pub token: LeaseToken,
    /// How long the lease lasts from now, at least.
    pub lease: Duration,
}

/// Gives back a job whose answer was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GiveBack {
    /// The lease token in the answer.
    pub token: LeaseToken,
    /// The end of the lease in the answer. A later answer to the same claim has another.
    pub expires_at: Time,
}

/// Extends a lease.
#[derive(Debug, Clone, PartialEq)]
pub struct Heartbeat {
    /// The worker that sends it.
    pub worker: Arc<str>,
    /// The worker's lease token.
    pub token: LeaseToken,
    /// What the worker is doing.
    pub news: News,
    /// How long the lease lasts from now, at least; `None`: as long as it was granted for.
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

    /// Extends the lease if it would end earlier, and confirms it. Never shortens a lease.
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

    /// Moves the end of the lease to `until`, if that is later. `due_at` follows if it was the end of the attempt; set for
    /// another reason, it stays.
    fn extend_lease(&mut self, until: Time) {
        let is_due_then = self.due_at == self.attempt_ends_at();
        if let Some(lease) = &mut self.lease {
            lease.expires_at = lease.expires_at.max(until);
        }
        if is_due_then {
            self.due_at = self.attempt_ends_at();
        }
    }

    /// Extends the lease for another answer. Each answer to a claim has its own `expires_at`, by which `give_back` tells them
    /// apart. The lease stays unconfirmed: this answer may be lost, too.
    pub(super) fn redeliver(&self, redeliver: Redeliver, at: Tick) -> Result<Transition, TransitionError> {
        let Some(lease) = self.lease.as_ref().filter(|_| self.lease_token() == Some(redeliver.token)) else {
            return Err(TransitionError::LeaseLost);
        };
        let mut path = Path::new(self, &lease.worker, at);
        let expires_at = (at.now + redeliver.lease).max(lease.expires_at + TimeDelta::microseconds(1));
        path.change(|job| job.extend_lease(expires_at));
        Ok(path.finish())
    }

    /// Gives the job back, unless the worker has confirmed the lease or a later answer delivers it.
    pub(super) fn give_back(&self, given: GiveBack, at: Tick) -> Transition {
        let is_as_answered =
            self.lease.as_ref().is_some_and(|lease| !lease.is_confirmed && lease.expires_at == given.expires_at);
        if self.lease_token() != Some(given.token) || !is_as_answered {
            return self.unchanged();
        }
        let mut path = Path::new(self, &Arc::from(ACTOR_LEDGER), at);
        path.job.outcome = None;
        path.release(None, Detail::saying(&"the claim's caller disconnected before it got the answer".into()));
        path.finish()
    }
}
