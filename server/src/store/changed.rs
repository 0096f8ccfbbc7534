//! In what a batch has changed a job.

use crate::domain::job::Job;

/// In what a job differs from what it was, or from its row, beside what its last event says: its place in the log, stage and progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Differs {
    /// In nothing.
    #[default]
    Nowhere,
    /// In the end of its lease, whether the holder was heard of, and when time is to look at it: that is an extension of the lease.
    InLease,
    /// In more.
    InMore,
}

impl Differs {
    /// In what a job differs from what it was.
    pub fn between(before: &Job, after: &Job) -> Self {
        let times =
            |job: &Job| (job.started_at, job.attempt_started_at, job.finished_at, job.scheduled_at, job.ready_at);
        let counts = |job: &Job| (job.status, job.attempt, job.failures, job.lost_attempts, job.lease_nonce);
        let is_held_alike = match (&before.lease, &after.lease) {
            (Some(before), Some(after)) => {
                (&before.worker, before.granted, &before.request) == (&after.worker, after.granted, &after.request)
            }
            (None, None) => before.due_at == after.due_at,
            _ => false,
        };
        let is_same = is_held_alike
            && times(before) == times(after)
            && counts(before) == counts(after)
            && before.cancel_requested == after.cancel_requested
            && before.outcome == after.outcome
            && before.retry_request == after.retry_request
            && before.last_error == after.last_error
            && before.result_at == after.result_at;
        match is_same {
            false => Self::InMore,
            true if (&before.lease, before.due_at) != (&after.lease, after.due_at) => Self::InLease,
            true => Self::Nowhere,
        }
    }
}

/// A job that was there and has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// As it is now.
    pub job: Job,
    /// In what it may differ from what it was.
    pub differs: Differs,
}

impl From<Job> for Changed {
    fn from(job: Job) -> Self {
        Self { job, differs: Differs::InMore }
    }
}
