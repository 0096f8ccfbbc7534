//! What a batch adds to the statistics, and how they are stored over time.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use super::StatusCounts;
use crate::domain::{
    clock::Time,
    flow::{Flow, Width},
    id::JobId,
    job::Job,
};

/// By how much the statistics of one type change with a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Its jobs.
    pub counts: StatusCounts,
    /// Those of its queued jobs whose time is still to come.
    pub scheduled: i64,
    /// What happened to its jobs, at the batch's time.
    pub flow: Flow,
}

/// What retention takes away of the log, by the minute and the type.
pub type RemovedFlow = BTreeMap<(Time, Arc<str>), Flow>;

/// Where something stands in the series.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket {
    /// How wide it is.
    pub width: Width,
    /// Its first instant.
    pub start: Time,
    /// The type.
    pub job_type: Arc<str>,
}

/// The whole series of an org.
#[derive(Debug)]
pub struct Series {
    /// The head of the log that it belongs to.
    pub as_of_seq: i64,
    /// When that was written.
    pub recorded_at: Option<Time>,
    /// What happened.
    pub happened: BTreeMap<Bucket, Flow>,
    /// What retention has taken away of that: what the log still has makes up the rest.
    pub removed: BTreeMap<Bucket, Flow>,
}

/// Those of the jobs that may go of which the series still tells something.
pub(super) fn told_by_series(jobs: &[Job], expired: &[JobId], now: Time) -> Vec<JobId> {
    if expired.is_empty() {
        return Vec::new();
    }
    let since = Width::Hour.kept_since(now);
    let expired: HashSet<_> = expired.iter().collect();
    jobs.iter().filter(|job| job.last_recorded_at >= since && expired.contains(&job.id)).map(|job| job.id).collect()
}

/// By bucket, what is told by the minute.
pub(super) fn buckets<'a>(
    of_minutes: impl IntoIterator<Item = (Time, &'a Arc<str>, &'a Flow)>,
) -> BTreeMap<Bucket, Flow> {
    let mut buckets: BTreeMap<_, Flow> = BTreeMap::new();
    for (minute, job_type, flow) in of_minutes {
        for width in Width::ALL {
            let bucket = Bucket { width, start: width.start(minute), job_type: Arc::clone(job_type) };
            buckets.entry(bucket).or_default().add_all(flow);
        }
    }
    buckets
}
