//! What readers ask of a store, and what they get.

use std::{collections::BTreeMap, sync::Arc};

use super::StatusCounts;
use crate::domain::{clock::Time, event::JobEvent, id::JobId, job::Job, status::JobStatus};

/// Which events a reader wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only this job's.
    pub job: Option<JobId>,
    /// Only those of jobs of these types; empty: all.
    pub types: Vec<String>,
    /// Only those that lead to one of these statuses; empty: all.
    pub statuses: Vec<JobStatus>,
}

impl EventFilter {
    /// True for an event that the reader wants.
    pub fn matches(&self, event: &JobEvent) -> bool {
        self.job.is_none_or(|job| job == event.job_id)
            && (self.types.is_empty() || self.types.iter().any(|wanted| **wanted == *event.job_type))
            && (self.statuses.is_empty() || self.statuses.contains(&event.next_status))
    }
}

/// Which page of events to read.
#[derive(Debug, Clone)]
pub struct EventQuery {
    /// Which events.
    pub filter: EventFilter,
    /// Only those with a greater `seq`.
    pub after: i64,
    /// At most this many; at least 1.
    pub max_events: usize,
    /// No more once this many bytes are exceeded.
    pub max_bytes: usize,
}

/// A page of events.
#[derive(Debug)]
pub struct EventPage {
    /// The events that match, in the order of `seq`.
    pub events: Vec<Arc<JobEvent>>,
    /// The page has every matching event from the query's `after` up to this `seq`.
    pub through: i64,
    /// The head of the log in the same snapshot.
    pub head: i64,
    /// The floor of the log in the same snapshot.
    pub floor: i64,
    /// The status, in the same snapshot, of the job that the filter names; `None` if it doesn't exist or none is named.
    pub job_status: Option<JobStatus>,
}

/// How far along `seq` a page of an org's events looks for those that match: bounds the work of a filter that matches little.
pub(super) const SCAN_WINDOW: i64 = 4_096;

impl EventPage {
    /// The page, which looked at what is there up to `last`, or was cut after its last event.
    pub(super) fn ending_at(mut self, last: i64, is_cut: bool) -> Self {
        self.through = match self.events.last() {
            Some(event) if is_cut => event.seq,
            _ => last.min(self.head),
        };
        self
    }
}

/// Which jobs a list is of. What is empty or absent lets all through.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobFilter {
    /// In one of these statuses. Each once.
    pub statuses: Vec<JobStatus>,
    /// Of one of these types. Each once.
    pub types: Vec<String>,
    /// With all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Asked for by.
    pub requested_by: Option<String>,
    /// Created then or later.
    pub created_after: Option<Time>,
    /// Created before then.
    pub created_before: Option<Time>,
}

impl JobFilter {
    /// True if an index finds exactly the jobs that match.
    fn is_indexed(&self) -> bool {
        let no_rest = self.requested_by.is_none() && self.created_after.is_none() && self.created_before.is_none();
        no_rest
            && (self.labels.is_empty() || self.labels.len() == 1 && self.types.is_empty() && self.statuses.is_empty())
    }
}

/// Which page of jobs to read.
#[derive(Debug, Clone)]
pub struct ListQuery {
    /// Which jobs.
    pub filter: JobFilter,
    /// Only those whose first event is before this `seq`.
    pub before: i64,
    /// At most this many; at least 1.
    pub limit: usize,
}

/// How many jobs a page looks at for those that match, where no index finds just those.
pub(super) const LIST_SCAN: usize = 2_000;

impl ListQuery {
    /// How many jobs are looked at. One more than is wanted, which tells that the page is not the last.
    pub(super) fn scan(&self) -> usize {
        let wanted = self.limit + 1;
        if self.filter.is_indexed() { wanted } else { wanted.max(LIST_SCAN) }
    }

    /// The statuses to look among.
    pub(super) fn statuses(&self) -> Vec<&'static str> {
        let statuses = &self.filter.statuses[..];
        let all = if statuses.is_empty() { &JobStatus::ALL[..] } else { statuses };
        all.iter().copied().map(JobStatus::as_str).collect()
    }

    /// The page, given what was found (one more than is wanted, if there is more), and the last that was looked at, if not all
    /// were.
    pub(super) fn page(&self, mut jobs: Vec<Job>, as_of_seq: i64, reached: Option<i64>) -> JobPage {
        let is_cut = jobs.len() > self.limit;
        jobs.truncate(self.limit);
        let next = match jobs.last() {
            Some(last) if is_cut => Some(last.created_seq),
            _ => reached,
        };
        JobPage { jobs, next, as_of_seq }
    }
}

/// A page of jobs.
#[derive(Debug)]
pub struct JobPage {
    /// Those that match, the newest first.
    pub jobs: Vec<Job>,
    /// Before which `seq` to go on; `None` at the end. There may be a next page where this one has no jobs.
    pub next: Option<i64>,
    /// A head of the log of which the page misses nothing: what is streamed after it tells of everything that the page
    /// does not.
    pub as_of_seq: i64,
}

/// The counters of an org.
#[derive(Debug)]
pub struct Statistics {
    /// The head of the log that they belong to.
    pub as_of_seq: i64,
    /// The database's clock when they were read.
    pub as_of: Time,
    /// Each type that has had a job.
    pub types: Vec<TypeStatistics>,
}

/// The counters of one type.
#[derive(Debug)]
pub struct TypeStatistics {
    /// The type.
    pub job_type: String,
    /// Its jobs.
    pub counts: StatusCounts,
    /// When the job became ready that has been waiting longest; in the future if all wait for their time.
    pub oldest_ready_at: Option<Time>,
}
