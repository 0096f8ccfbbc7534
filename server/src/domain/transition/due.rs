//! What time does to a job: ends its wait, its lease, or its attempt.

use std::{sync::Arc, time::Duration};

use chrono::{SubsecRound, TimeDelta};

use super::{Tick, Transition, path::Path};
use crate::domain::{
    clock::Time,
    event::{ACTOR_LEDGER, JobError},
    job::Job,
    lease::Lease,
    status::JobStatus,
};

/// The error code of an attempt whose lease ended.
pub const LEASE_EXPIRED: &str = "LEASE_EXPIRED";
/// The error code of an attempt that took longer than it may.
pub const RUN_TIMEOUT: &str = "RUN_TIMEOUT";
/// Whoever could not be heard for a while is given no less and no more time than this to be heard again: clients wait a few seconds
/// between tries.
const SHORTEST_GRACE: Duration = Duration::from_secs(5);
/// No longer than this is anybody given who could not be heard for a while.
pub const LONGEST_GRACE: Duration = Duration::from_secs(60);

/// Does what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// For how long workers have been able to reach the ledger through whoever looks: since its start, or the end of an outage.
    pub reachable_for: Duration,
    /// When the clock jumped ahead last, as far as is known: what it jumped over is no time that anybody had.
    pub jump: Option<Jump>,
}

/// The clock was found ahead of where it should have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jump {
    /// What it said then.
    pub at: Time,
    /// By how much it was ahead.
    pub by: TimeDelta,
}

impl Job {
    pub(super) fn look(&self, look: Look, at: Tick) -> Transition {
        if self.due_at.is_none_or(|due| due > at.now) {
            return self.unchanged();
        }
        let mut path = Path::new(self, &Arc::from(ACTOR_LEDGER), at);
        if self.status != JobStatus::Running {
            // Its wait is over: workers may claim it.
            path.change(|job| job.due_at = None);
            return path.finish();
        }
        // Later than what it is due for only where grace was given: once is enough.
        let settle = |end: Time, length| {
            let was_given = self.due_at.is_some_and(|due| due > end);
            if was_given { end } else { look.settle(end, length, at.now) }
        };
        // One that began by a clock that was ahead has as long as it may from when that was set right: see `redate`.
        let ends_as_dated = self.lease.is_none() && self.attempt_started_at.is_some_and(|started| started > at.now);
        let run_end = self
            .run_ends_at()
            .map(|end| if ends_as_dated { end.min(at.now) } else { end })
            .map(|end| settle(end, self.spec.run_timeout.unwrap_or_default()));
        let lease_end = self.lease.as_ref().map(|lease| settle(lease.expires_at, lease.granted));
        let has_run_out = |end: Option<Time>| end.is_some_and(|end| end <= at.now);
        let is_silent = self.lease.as_ref().zip(lease_end).is_some_and(|(lease, end)| lease.is_silent(end, at.now));
        // Of a worker that isn't heard of any more it is not known that it took too long.
        if has_run_out(lease_end) || has_run_out(run_end) && is_silent {
            let worker = self.lease.as_ref().map_or("", |lease| &lease.worker);
            path.lose(error(
                LEASE_EXPIRED,
                format!("nothing was heard of worker {worker} before its lease, or its time, ended"),
            ));
        } else if has_run_out(run_end) {
            let allowed = self.spec.run_timeout.unwrap_or_default();
            path.give_up(error(RUN_TIMEOUT, format!("the attempt took longer than the {allowed:?} that it may")));
        } else {
            path.change(|job| job.due_at = run_end.into_iter().chain(lease_end).min());
        }
        path.finish()
    }
}

impl Lease {
    /// True if nothing was heard of the holder for half of the lease, which ends then: heartbeats come every third.
    fn is_silent(&self, end: Time, now: Time) -> bool {
        now + self.granted / 2 >= end
    }
}

impl Look {
    /// When something that ends at `end`, and was to take `length`, really ends: a third of its length later, 5 s to a minute, if those who
    /// could have kept it going, or reported that it is done, could not be heard until then.
    fn settle(self, end: Time, length: Duration, now: Time) -> Time {
        let end = self.jump.map_or(end, |jump| jump.carry(end, length));
        let grace = (length / 3).clamp(SHORTEST_GRACE, LONGEST_GRACE);
        let reachable_since = now - self.reachable_for;
        let end = if end < reachable_since + grace { end.max(reachable_since) + grace } else { end };
        // A third of a length, and what a monotonic clock measured, are finer than what is kept.
        end.trunc_subsecs(6)
    }
}

impl Jump {
    /// When something that ends at `end`, and was to take `length`, ends if it began before the jump: that much later, and no later than
    /// if it began after it.
    fn carry(self, end: Time, length: Duration) -> Time {
        let latest = self.at + length;
        if end < latest { latest.min(end + self.by) } else { end }
    }
}

fn error(code: &str, message: String) -> JobError {
    JobError { code: code.into(), message: message.into() }
}
