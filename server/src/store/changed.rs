//! How a batch has changed a job.

use crate::domain::job::Job;

/// How a job differs from its earlier state, or from its row, in what its last event does not say. The event says the job's
/// position in the log, its stage and its progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Differs {
    /// Not at all.
    #[default]
    Nowhere,
    /// In the end of the lease, `is_confirmed` and `due_at`: a lease extension.
    InLease,
    /// In more than that.
    InMore,
}

impl Differs {
    /// Compares a job with its earlier state.
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

/// An existing job that a batch has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// The job after the batch.
    pub job: Job,
    /// An upper bound of how the job differs from its earlier state.
    pub differs: Differs,
}

impl From<Job> for Changed {
    fn from(job: Job) -> Self {
        Self { job, differs: Differs::InMore }
    }
}
