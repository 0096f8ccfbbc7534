//! What a batch adds to the statistics, and how they are stored over time.

use std::{collections::BTreeMap, sync::Arc};

use super::{Head, StatusCounts, StoreError, rows::damaged};
use crate::domain::{
    clock::Time,
    flow::{Flow, Width},
};

/// Rows of the series that are too old and go at once, at least; and with them those of the same bucket.
pub(super) const FORGOTTEN_AT_ONCE: i64 = 2_000;

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

/// What retention takes away of the log.
pub type RemovedFlow = BTreeMap<Bucket, Flow>;

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

/// The whole series of some types.
#[derive(Debug, Default)]
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

impl Series {
    /// Takes what a row has, whose width is in seconds.
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

/// Since when the series of a log may tell of a job.
pub fn told_since(head: &Head) -> Time {
    head.recorded_at.map_or(Time::MIN_UTC, |last| Width::Hour.kept_since(last))
}
