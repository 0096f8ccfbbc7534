//! Timers: the end of a wait, of a lease, or of an attempt's `run_timeout`.

use std::{sync::Arc, time::Duration};

use chrono::{SubsecRound, TimeDelta};

use super::{Tick, Transition, builder::Path};
use crate::domain::{
    clock::Time,
    event::{ACTOR_LEDGER, JobError},
    job::Job,
    lease::Lease,
    status::JobStatus,
};

/// The error code of an attempt whose lease expired.
pub const LEASE_EXPIRED: &str = "LEASE_EXPIRED";
/// The error code of an attempt that exceeded its `run_timeout`.
pub const RUN_TIMEOUT: &str = "RUN_TIMEOUT";
/// The shortest grace after an outage: clients wait a few seconds between tries.
const SHORTEST_GRACE: Duration = Duration::from_secs(5);
/// The longest grace after an outage.
pub const LONGEST_GRACE: Duration = Duration::from_secs(60);

/// Handles what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sweep {
    /// For how long workers have been able to reach this server: since its start, or since the end of the last outage.
    pub reachable_for: Duration,
    /// The last known jump of the clock. Leases and attempts don't lose the time that the clock jumped over.
    pub jump: Option<Jump>,
}

/// A jump of the clock ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jump {
    /// The time that the clock showed after the jump.
    pub at: Time,
    /// How far the clock jumped.
    pub by: TimeDelta,
}

impl Job {
    pub(super) fn sweep(&self, sweep: Sweep, at: Tick) -> Transition {
        if self.due_at.is_none_or(|due| due > at.now) {
            return self.unchanged();
        }
        let mut path = Path::new(self, &Arc::from(ACTOR_LEDGER), at);
        if self.status != JobStatus::Running {
            // The wait is over: workers may claim the job.
            path.change(|job| job.due_at = None);
            return path.finish();
        }
        // `due_at` is later than the end only if a sweep has moved it before. Grace is given once; a jump counts again, since
        // the clock may have jumped once more.
        let settle = |end: Time, length| {
            let was_moved = self.due_at.is_some_and(|due| due > end);
            if was_moved { sweep.carry(end, length) } else { sweep.settle(end, length, at.now) }
        };
        // A clock that was ahead dated the start of this attempt without a lease, and `redate` has moved `due_at` to the
        // end of its `run_timeout`. So it ends when it is due.
        let ends_as_dated = self.lease.is_none() && self.attempt_started_at.is_some_and(|started| started > at.now);
        let run_end = self
            .run_ends_at()
            .map(|end| if ends_as_dated { end.min(at.now) } else { end })
            .map(|end| settle(end, self.spec.run_timeout.unwrap_or_default()));
        let lease_end = self.lease.as_ref().map(|lease| settle(lease.expires_at, lease.granted));
        let has_run_out = |end: Option<Time>| end.is_some_and(|end| end <= at.now);
        let is_silent = self.lease.as_ref().zip(lease_end).is_some_and(|(lease, end)| lease.is_silent(end, at.now));
        // A silent worker may be dead, so its attempt is lost; that it took too long is unknown.
        if has_run_out(lease_end) || has_run_out(run_end) && is_silent {
            let worker = self.lease.as_ref().map_or("", |lease| &lease.worker);
            path.lose(error(
                LEASE_EXPIRED,
                format!("no heartbeat from worker {worker} before its lease or run timeout expired"),
            ));
        } else if has_run_out(run_end) {
            let allowed = self.spec.run_timeout.unwrap_or_default();
            path.give_up(error(RUN_TIMEOUT, format!("the attempt exceeded its run timeout of {allowed:?}")));
        } else {
            path.change(|job| job.due_at = run_end.into_iter().chain(lease_end).min());
        }
        path.finish()
    }
}

impl Lease {
    /// True if a lease that ends at `end` was not extended for half of its length. Workers send a heartbeat every third of
    /// it.
    fn is_silent(&self, end: Time, now: Time) -> bool {
        now + self.granted / 2 >= end
    }
}

impl Sweep {
    /// The end of a lease or attempt without the time that the clock jumped over.
    fn carry(self, end: Time, length: Duration) -> Time {
        self.jump.map_or(end, |jump| jump.carry(end, length)).trunc_subsecs(6)
    }

    /// The real end of a lease or attempt that lasts `length` and would end at `end`. If workers could not reach the server
    /// until then, or until shortly before, they get a grace of a third of `length`, 5 s to 60 s, to extend it or to
    /// report.
    fn settle(self, end: Time, length: Duration, now: Time) -> Time {
        let end = self.carry(end, length);
        let grace = (length / 3).clamp(SHORTEST_GRACE, LONGEST_GRACE);
        let reachable_since = now - self.reachable_for;
        let end = if end < reachable_since + grace { end.max(reachable_since) + grace } else { end };
        // Databases keep microseconds. A third of a length, and the monotonic clock's measurements, are finer.
        end.trunc_subsecs(6)
    }
}

impl Jump {
    /// Moves the end of a lease or attempt that began before the jump by the jump, but no later than if it had begun right
    /// after the jump.
    fn carry(self, end: Time, length: Duration) -> Time {
        let latest = self.at + length;
        if end < latest { latest.min(end + self.by) } else { end }
    }
}

fn error(code: &str, message: String) -> JobError {
    JobError { code: code.into(), message: message.into() }
}
