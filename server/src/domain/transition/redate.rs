//! Corrects leases and waits that were dated by a clock that was ahead, once the clock is right.

use std::time::Duration;

use super::{Tick, Transition, builder::Path, sweep::LONGEST_GRACE};
use crate::domain::{clock::Time, job::Job, lease::LONGEST_LEASE, status::JobStatus};

impl Job {
    /// Corrects the end of a lease, a `run_timeout` or a retry wait that was dated while the clock was ahead, by `by` at
    /// most as far as known. A `run_timeout` or wait then ends no later than if it began now; for leases see
    /// `lease_end_today`. A time that a caller gave stays, unless an edit gave it while the clock was ahead to a job that had begun
    /// before: it can't be told from a retry wait.
    pub(super) fn redate(&self, by: Duration, at: Tick) -> Transition {
        let mut path = Path::new(self, &self.spec.requested_by, at);
        match self.status {
            JobStatus::Running => {
                let lease_end = self.lease_end_today(by, at.now);
                let run_end = self.run_ends_at().map(|end| match self.attempt_started_at {
                    Some(started) if started > at.now => end - (started - at.now),
                    _ => end,
                });
                let ends_at = lease_end.into_iter().chain(run_end).min();
                let is_other = lease_end != self.lease.as_ref().map(|lease| lease.expires_at);
                let is_late = self.due_at.zip(ends_at).is_some_and(|(due, end)| due > end.max(at.now) + LONGEST_GRACE);
                if is_other || is_late {
                    path.change(|job| {
                        if let Some((lease, end)) = job.lease.as_mut().zip(lease_end) {
                            lease.expires_at = end;
                        }
                        job.due_at = ends_at;
                    });
                }
            }
            JobStatus::Queued if self.attempt > 0 && self.updated_at > at.now => {
                let wait = self.scheduled_at.map(|time| time - self.updated_at);
                let latest = wait.map(|wait| at.now + wait);
                if latest.zip(self.due_at).is_some_and(|(latest, due)| due > latest) {
                    path.change(|job| job.due_at = latest.filter(|latest| *latest > at.now));
                }
            }
            _ => {}
        }
        path.finish()
    }

    /// The end of the lease by the corrected clock, never later than before. If the job's last event is in the future, or
    /// the lease is longer than any may be, it lasts for `granted` from now. Else, if it ends more than `by` from now, it
    /// ends `by` sooner, but lasts for `granted` from now at least.
    fn lease_end_today(&self, by: Duration, now: Time) -> Option<Time> {
        let lease = self.lease.as_ref()?;
        let (end, latest) = (lease.expires_at, now + lease.granted);
        let today = if self.updated_at > now || end > now + LONGEST_LEASE {
            latest
        } else if end > now + by {
            latest.max(end - by)
        } else {
            end
        };
        Some(today.min(end))
    }
}
