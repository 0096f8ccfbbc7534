//! What readers ask of a store, and what they get.

use std::{collections::BTreeMap, sync::Arc};

use chrono::TimeDelta;

use super::StatusCounts;
use crate::domain::{clock::Time, event::JobEvent, flow::Flow, id::JobId, job::Job, status::JobStatus};

/// Which events a reader wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only this job's.
    pub job: Option<JobId>,
    /// Only those of jobs of these types, which are in order; empty: all.
    pub types: Vec<String>,
    /// Only those that lead to one of these statuses; empty: all.
    pub statuses: Vec<JobStatus>,
    /// And those that lead away from one of them.
    pub is_leaving: bool,
    /// Only those of jobs with all of these labels.
    pub labels: BTreeMap<String, String>,
}

impl EventFilter {
    /// True for an event that the reader wants.
    pub fn matches(&self, event: &JobEvent) -> bool {
        self.job.is_none_or(|job| job == event.job_id)
            && self.is_of(&event.job_type)
            && (self.statuses.is_empty()
                || self.statuses.contains(&event.next_status)
                || self.is_leaving && event.prev_status.is_some_and(|left| self.statuses.contains(&left)))
            && self.labels.iter().all(|(key, value)| event.labels.get(key) == Some(value))
    }
}

impl EventFilter {
    /// With a hundred types that an event is none of, it is told from a few.
    fn is_of(&self, job_type: &str) -> bool {
        debug_assert!(self.types.is_sorted(), "types are in order");
        self.types.is_empty() || self.types.binary_search_by(|wanted| (**wanted).cmp(job_type)).is_ok()
    }

    /// The jobs whose events are wanted, but for the one named.
    pub fn of_jobs(&self) -> JobFilter {
        JobFilter {
            statuses: self.statuses.clone(),
            types: self.types.clone(),
            labels: self.labels.clone(),
            ..JobFilter::default()
        }
    }

    /// True for a job that is among them as it is now.
    pub fn matches_job(&self, job: &Job) -> bool {
        self.is_of(&job.spec.job_type)
            && (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && self.labels.iter().all(|(key, value)| job.spec.labels.get(key) == Some(value))
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
        let of_types = self.types.is_empty()
            || !self.statuses.is_empty() && self.statuses.iter().all(|status| status.is_terminal());
        let of_labels =
            self.labels.is_empty() || self.labels.len() == 1 && self.types.is_empty() && self.statuses.is_empty();
        no_rest && of_types && of_labels
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
    pub(super) fn statuses(&self) -> &[JobStatus] {
        if self.filter.statuses.is_empty() { &JobStatus::ALL } else { &self.filter.statuses }
    }

    /// Their names.
    pub(super) fn status_names(&self) -> Vec<&'static str> {
        self.statuses().iter().copied().map(JobStatus::as_str).collect()
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

/// Which statistics to read.
#[derive(Debug, Clone, PartialEq)]
pub struct StatisticsQuery {
    /// Of these types; empty: of all.
    pub types: Vec<String>,
    /// What happened within this time until now; at most seven days.
    pub window: TimeDelta,
    /// Whether to tell it bucket by bucket as well.
    pub series: SeriesKind,
}

impl StatisticsQuery {
    /// Of these types, within the last minute.
    pub fn of(types: &[String]) -> Self {
        Self { types: types.to_vec(), window: TimeDelta::minutes(1), series: SeriesKind::None }
    }
}

/// How a series is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeriesKind {
    /// Not at all.
    None,
    /// Of all types together.
    Together,
    /// Of each type.
    ByType,
}

/// The statistics of an org.
#[derive(Debug)]
pub struct Statistics {
    /// The head of the log that they belong to.
    pub as_of_seq: i64,
    /// The database's clock when they were read.
    pub as_of: Time,
    /// When the window begins: with a minute, or an hour where it is longer than a day; or when the series did, if that was later.
    pub since: Time,
    /// Each type that has had a job, in the order of their names.
    pub types: Vec<TypeStatistics>,
    /// What happened bucket by bucket, in order; those in which nothing did are left out.
    pub series: Vec<SeriesPoint>,
}

/// The statistics of one type.
#[derive(Debug)]
pub struct TypeStatistics {
    /// The type.
    pub job_type: String,
    /// Its jobs.
    pub counts: StatusCounts,
    /// Those of the queued whose time is still to come. The others may be claimed.
    pub scheduled: i64,
    /// When the job became ready that has been waiting longest.
    pub oldest_ready_at: Option<Time>,
    /// What happened to its jobs within the window.
    pub flow: Flow,
}

/// What happened within one bucket of the series.
#[derive(Debug, Clone, PartialEq)]
pub struct SeriesPoint {
    /// Its first instant.
    pub start: Time,
    /// The type, if they are told apart.
    pub job_type: Option<String>,
    /// What happened; without the durations.
    pub flow: Flow,
}

impl Statistics {
    /// Those of an org without a log.
    pub(super) fn empty(as_of: Time, since: Time) -> Self {
        Self { as_of_seq: 0, as_of, since, types: Vec::new(), series: Vec::new() }
    }

    /// With types and buckets in order.
    pub(super) fn in_order(mut self) -> Self {
        self.types.sort_unstable_by(|a, b| a.job_type.cmp(&b.job_type));
        self.series.sort_unstable_by(|a, b| (a.start, &a.job_type).cmp(&(b.start, &b.job_type)));
        self
    }
}
