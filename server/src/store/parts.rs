//! What of a job a batch has changed. Columns that change together are written together, and the others, with their indexes, left
//! alone: a report of progress touches none of those by which jobs are found.

use std::ops::BitOrAssign;

use crate::domain::job::Job;

/// Parts of a job, beside its place in the log, which changes with all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Parts(u8);

impl Parts {
    /// Nothing but its place in the log: stage and progress are its events'.
    pub const LOG: Self = Self(0);
    /// Where it stands, and since when.
    pub const STATUS: Self = Self(1);
    /// Who holds it, and what it waits for.
    pub const LEASE: Self = Self(1 << 1);
    /// What came of it.
    pub const OUTCOME: Self = Self(1 << 2);
    /// All of it.
    pub const ALL: Self = Self(Self::STATUS.0 | Self::LEASE.0 | Self::OUTCOME.0);

    /// Those in which a job differs from what it was.
    pub fn between(before: &Job, after: &Job) -> Self {
        let status = |job: &Job| {
            let times = (job.started_at, job.attempt_started_at, job.finished_at, job.scheduled_at, job.ready_at);
            (job.status, job.attempt, job.failures, job.lost_attempts, times)
        };
        let mut parts = Self::LOG;
        if status(before) != status(after) {
            parts |= Self::STATUS;
        }
        if (&before.lease, before.lease_epoch, before.due_at) != (&after.lease, after.lease_epoch, after.due_at) {
            parts |= Self::LEASE;
        }
        let is_same = before.cancel_requested == after.cancel_requested
            && before.outcome == after.outcome
            && before.retry_request == after.retry_request
            && before.last_error == after.last_error
            && before.result_at == after.result_at;
        if !is_same {
            parts |= Self::OUTCOME;
        }
        parts
    }

    /// True if all of the others are among these.
    pub const fn contain(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }
}

impl BitOrAssign for Parts {
    fn bitor_assign(&mut self, others: Self) {
        self.0 |= others.0;
    }
}

/// A job that was there and has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// As it is now.
    pub job: Job,
    /// In what it may differ from what is stored.
    pub parts: Parts,
}

impl From<Job> for Changed {
    fn from(job: Job) -> Self {
        Self { job, parts: Parts::ALL }
    }
}
