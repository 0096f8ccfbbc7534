//! Finished jobs whose retention time is over, and how much one batch removes of them.
//!
//! A job with more events than one batch may remove goes first, and its events follow, a slice a batch. Nobody reads these
//! events: they lie before the log's floor.

use std::collections::HashMap;

use super::{Head, Retention, told_since};
use crate::domain::{clock::Time, id::JobId, job::Job};

/// Which expired jobs to load, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// The retention times.
    pub retention: Retention,
    /// At most this many jobs, at least 1.
    pub limit: usize,
    /// Bounds on the events of all these jobs. The first job may exceed them: then later batches remove its events in slices.
    pub most: Most,
    /// The history of a job with more events than this is not loaded. The job stays for as long as the series covers it.
    pub max_history: i64,
}

/// How much of the log one batch removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// The number of events.
    pub events: i64,
    /// The weight of the events, in bytes.
    pub bytes: i64,
}

/// The next events to remove of a job that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// The job's id.
    pub job: JobId,
    /// The last `seq` of the slice.
    pub through: i64,
    /// The weight of the slice, in bytes.
    pub bytes: i64,
    /// True if no event is left after the slice.
    pub is_last: bool,
    /// A time no later than `recorded_at` of the job's first event.
    pub since: Time,
    /// `recorded_at` of the job's last event.
    pub until: Time,
}

/// The expired jobs that one batch may remove by their number of events, in order. At least one, if there is any.
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

/// Those of these jobs that the series still covers.
pub(super) fn told_by_series(head: &Head, may_go: &[&Job]) -> Vec<JobId> {
    let since = told_since(head);
    may_go.iter().filter(|job| job.last_recorded_at >= since).map(|job| job.id).collect()
}
