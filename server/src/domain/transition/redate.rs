//! What a clock that was ahead has put off: dated anew once it is right again.

use super::{Tick, Transition, path::Path};
use crate::domain::{job::Job, lease::LONGEST_LEASE, status::JobStatus};

impl Job {
    /// Ends a lease, or a wait that the ledger has set, no later than if it began now, where the clock that it was set by was ahead of
    /// what it says today. What somebody named by the time of day stays.
    pub(super) fn redate(&self, at: Tick) -> Transition {
        let mut path = Path::new(self, &self.spec.requested_by, at);
        match (self.status, &self.lease) {
            (JobStatus::Running, Some(lease)) => {
                let is_ahead = self.updated_at > at.now || lease.expires_at > at.now + LONGEST_LEASE;
                let latest = at.now + lease.granted;
                if is_ahead && lease.expires_at > latest {
                    path.change(|job| {
                        if let Some(lease) = &mut job.lease {
                            lease.expires_at = latest;
                        }
                        job.due_at = job.attempt_ends_at();
                    });
                }
            }
            (JobStatus::Queued, _) if self.attempt > 0 && self.updated_at > at.now => {
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
}
