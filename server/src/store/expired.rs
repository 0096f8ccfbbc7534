//! Finished jobs that are kept no longer, and how much of them may go at once.
//!
//! A job with more events than one batch may remove goes first, and its events then, a slice a batch: nobody sees them any more, since
//! the log is whole only from beyond them on.

use std::collections::HashMap;

use super::{Head, Retention, told_since};
use crate::domain::{clock::Time, id::JobId, job::Job};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// How long they are kept.
    pub retention: Retention,
    /// No more of them; at least 1.
    pub limit: usize,
    /// No more events of theirs in all, nor bytes, but of the first: of that as many are left as are more.
    pub most: Most,
    /// Of a job with more events than this it is not looked up what happened: it stays for as long as the series tell of it.
    pub max_history: i64,
}

/// How much of the log one batch removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// Events.
    pub events: i64,
    /// What they take, about.
    pub bytes: i64,
}

/// Events of a job that is gone, which are still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// The job.
    pub job: JobId,
    /// These go next: those up to this `seq`.
    pub through: i64,
    /// What they take, in bytes.
    pub bytes: i64,
    /// None are left then.
    pub is_last: bool,
    /// When the first of all its events was recorded, or before.
    pub since: Time,
    /// When the last of them was.
    pub until: Time,
}

/// The jobs that may go, in their order, as many as may at once by their events: one at least.
pub(super) fn may_go<'a>(jobs: &'a [Job], expired: &[JobId], wanted: &Expired) -> Vec<&'a Job> {
    let by_id: HashMap<_, _> = jobs.iter().map(|job| (job.id, job)).collect();
    let mut events = 0;
    let jobs = expired.iter().filter_map(|id| by_id.get(id).copied());
    let fits = |job: &&Job| {
        events += job.last_job_seq;
        events <= wanted.most.events || events == job.last_job_seq
    };
    jobs.take_while(fits).collect()
}

/// Those of them of which the series still tell something.
pub(super) fn told_by_series(head: &Head, may_go: &[&Job]) -> Vec<JobId> {
    let since = told_since(head);
    may_go.iter().filter(|job| job.last_recorded_at >= since).map(|job| job.id).collect()
}
