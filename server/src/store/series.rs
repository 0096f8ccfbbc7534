//! What a batch adds to the statistics, and the buckets in which they are stored.

use std::{collections::BTreeMap, sync::Arc};

use super::{Head, StatusCounts, StoreError, rows::damaged};
use crate::domain::{
    clock::Time,
    flow::{Flow, Width},
};

/// Old rows of the series that one batch removes for each width. SQLite also removes the other rows of the last bucket.
pub(super) const FORGOTTEN_AT_ONCE: i64 = 2_000;

/// How a batch changes the statistics of one type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Changes of the numbers of jobs.
    pub counts: StatusCounts,
    /// Change of the number of scheduled jobs.
    pub scheduled: i64,
    /// What happened to jobs of the type, at the batch's time.
    pub flow: Flow,
}

/// The flow that the log loses with the jobs that retention removes.
pub type RemovedFlow = BTreeMap<Bucket, Flow>;

/// The key of a bucket of the series.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket {
    /// A minute or an hour.
    pub width: Width,
    /// The first instant of the bucket.
    pub start: Time,
    /// The type of the jobs.
    pub job_type: Arc<str>,
}

/// The whole series of some types.
#[derive(Debug, Default)]
pub struct Series {
    /// The head of the log at which the series was read.
    pub as_of_seq: i64,
    /// `recorded_at` of the event at that head.
    pub recorded_at: Option<Time>,
    /// All that happened.
    pub happened: BTreeMap<Bucket, Flow>,
    /// The part that retention has removed from the log. Counting the log gives the rest.
    pub removed: BTreeMap<Bucket, Flow>,
}

impl Series {
    /// Adds one row, whose width is in seconds.
    pub(super) fn take(
        &mut self,
        (width, start, job_type): (i64, Time, &str),
        is_removed: bool,
        flow: Flow,
    ) -> Result<(), StoreError> {
        let width = Width::ALL.into_iter().find(|known| known.seconds() == width).ok_or_else(|| damaged("series"))?;
        let bucket = Bucket { width, start, job_type: Arc::from(job_type) };
        (if is_removed { &mut self.removed } else { &mut self.happened }).insert(bucket, flow);
        Ok(())
    }
}

/// The time since which the series may cover events of a log.
pub fn told_since(head: &Head) -> Time {
    head.recorded_at.map_or(Time::MIN_UTC, |last| Width::Hour.kept_since(last))
}
