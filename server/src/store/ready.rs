//! Ready jobs, by the keys that claims choose by. Full rows are read only of jobs that claims get.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use crate::domain::{clock::Time, id::JobId, job::Job};

/// The claim order: the smallest is claimed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClaimOrder {
    /// The highest priority first.
    pub priority: Reverse<i32>,
    /// Then the job that has been ready for longest.
    pub ready_at: Time,
    /// Then the job that was created first.
    pub created_seq: i64,
}

impl ClaimOrder {
    /// The claim order of a job.
    pub fn of(job: &Job) -> Self {
        Self { priority: Reverse(job.spec.priority), ready_at: job.ready_at, created_seq: job.created_seq }
    }
}

/// How many ready jobs the claims of a batch need, the first in claim order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ready {
    /// At most this many of each of these types.
    pub of: BTreeMap<Arc<str>, usize>,
    /// At most this many of all types together.
    pub all: usize,
}

impl Ready {
    /// True if no ready jobs are needed.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty() && self.all == 0
    }
}

/// A ready job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyJob {
    /// The job's id.
    pub id: JobId,
    /// The job's type.
    pub job_type: Arc<str>,
    /// The job's claim order.
    pub order: ClaimOrder,
}

/// The ready jobs that were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundReady {
    /// The jobs, each once.
    pub jobs: Vec<ReadyJob>,
    /// Types of which as many were found as asked for, so that there may be more.
    pub cut: BTreeSet<Arc<str>>,
    /// The same for all types together.
    pub is_cut: bool,
    /// The last of the jobs that were found among all types, if there may be more.
    pub last_of_all: Option<ClaimOrder>,
}

impl FoundReady {
    /// Merges the jobs found by type with those found among all types.
    pub(super) fn new(wanted: &Ready, of_types: Vec<ReadyJob>, of_all: Vec<ReadyJob>) -> Self {
        let mut found: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
        for job in &of_types {
            *found.entry(&job.job_type).or_default() += 1;
        }
        let is_cut = |(name, found): &(&Arc<str>, usize)| wanted.of.get(*name).is_some_and(|limit| found >= limit);
        let cut = found.into_iter().filter(is_cut).map(|(name, _)| Arc::clone(name)).collect();
        let is_cut = wanted.all > 0 && of_all.len() >= wanted.all;
        let last_of_all = of_all.iter().map(|job| job.order).max().filter(|_| is_cut);
        let mut known = HashSet::new();
        let jobs = of_types.into_iter().chain(of_all).filter(|job| known.insert(job.id)).collect();
        Self { jobs, cut, is_cut, last_of_all }
    }
}
