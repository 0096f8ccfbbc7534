//! Jobs that may be claimed, by what claims choose by: rows are read of those alone that are handed out.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use crate::domain::{clock::Time, id::JobId, job::Job};

/// Where a job stands among those that may be claimed: the least is claimed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClaimOrder {
    /// The highest comes first.
    pub priority: Reverse<i32>,
    /// Then the one that has been ready for longest.
    pub ready_at: Time,
    /// Then the one that was created first.
    pub created_seq: i64,
}

impl ClaimOrder {
    /// That of a job.
    pub fn of(job: &Job) -> Self {
        Self { priority: Reverse(job.spec.priority), ready_at: job.ready_at, created_seq: job.created_seq }
    }
}

/// What is wanted of the jobs that may be claimed: those that are claimed first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ready {
    /// No more than so many of each of these types.
    pub of: BTreeMap<Arc<str>, usize>,
    /// And no more than this many, whatever their type.
    pub all: usize,
}

impl Ready {
    /// True if there is nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty() && self.all == 0
    }
}

/// A job that may be claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyJob {
    /// Which.
    pub id: JobId,
    /// Its type.
    pub job_type: Arc<str>,
    /// Where it stands.
    pub order: ClaimOrder,
}

/// The jobs that may be claimed of those that were wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundReady {
    /// Each once.
    pub jobs: Vec<ReadyJob>,
    /// Types of which there are as many as were wanted, and so may be more.
    pub cut: BTreeSet<Arc<str>>,
    /// The same of those of whatever type.
    pub is_cut: bool,
}

impl FoundReady {
    /// Puts what was found of some types, and of all, together.
    pub(super) fn new(wanted: &Ready, of_types: Vec<ReadyJob>, of_all: Vec<ReadyJob>) -> Self {
        let mut found: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
        for job in &of_types {
            *found.entry(&job.job_type).or_default() += 1;
        }
        let is_cut = |(name, found): &(&Arc<str>, usize)| wanted.of.get(*name).is_some_and(|limit| found >= limit);
        let cut = found.into_iter().filter(is_cut).map(|(name, _)| Arc::clone(name)).collect();
        let is_cut = wanted.all > 0 && of_all.len() >= wanted.all;
        let mut known = HashSet::new();
        let jobs = of_types.into_iter().chain(of_all).filter(|job| known.insert(job.id)).collect();
        Self { jobs, cut, is_cut }
    }
}
