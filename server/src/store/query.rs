//! Queries of readers, and their results.

use std::{collections::BTreeMap, sync::Arc};

use chrono::TimeDelta;

use super::StatusCounts;
use crate::domain::{
    clock::Time,
    event::JobEvent,
    flow::Flow,
    id::JobId,
    job::Job,
    job_filter::JobFilter,
    job_type::OrgSettings,
    org_event::{LogEvent, OrgEvent},
    status::JobStatus,
};

/// A filter of events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only events of this job.
    pub job: Option<JobId>,
    /// Only events of these types, which are sorted. Empty: all types.
    pub types: Vec<String>,
    /// Only events that lead to one of these statuses. Empty: all statuses.
    pub statuses: Vec<JobStatus>,
    /// Also events that lead away from one of `statuses`.
    pub is_leaving: bool,
    /// Only events of jobs with all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Also events that are about no single job. Not together with `job`.
    pub has_org_events: bool,
}

impl EventFilter {
    /// Every event of a log.
    pub fn all() -> Self {
        Self { has_org_events: true, ..Self::default() }
    }

    /// True for an event of a job that passes the filter.
    pub fn matches(&self, event: &JobEvent) -> bool {
        self.job.is_none_or(|job| job == event.job_id)
            && self.is_of(&event.job_type)
            && (self.statuses.is_empty()
                || self.statuses.contains(&event.next_status)
                || self.is_leaving && event.prev_status.is_some_and(|left| self.statuses.contains(&left)))
            && event.has_labels(&self.labels)
    }
}

impl EventFilter {
    /// A binary search, since a filter may have a hundred types.
    fn is_of(&self, job_type: &str) -> bool {
        debug_assert!(self.types.is_sorted(), "types are in order");
        self.types.is_empty() || self.types.binary_search_by(|wanted| (**wanted).cmp(job_type)).is_ok()
    }

    /// The same filter for jobs, without `job` and `is_leaving`.
    pub fn of_jobs(&self) -> JobFilter {
        JobFilter {
            statuses: self.statuses.clone(),
            types: self.types.clone(),
            labels: self.labels.clone(),
            ..JobFilter::default()
        }
    }

    /// True for a job that passes [`EventFilter::of_jobs`] as it is.
    pub fn matches_job(&self, job: &Job) -> bool {
        self.is_of(&job.spec.job_type)
            && (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && self.labels.iter().all(|(key, value)| job.spec.labels.get(key) == Some(value))
    }
}

/// Which page of events to read.
#[derive(Debug, Clone)]
pub struct EventQuery {
    /// The filter of events.
    pub filter: EventFilter,
    /// Only events with a greater `seq`.
    pub after: i64,
    /// At most this many events, at least 1.
    pub max_events: usize,
    /// The page ends with the event that exceeds this many bytes.
    pub max_bytes: usize,
}

/// A page of events.
#[derive(Debug)]
pub struct EventPage {
    /// The matching events, in the order of `seq`.
    pub events: Vec<LogEvent>,
    /// The page has every matching event after the query's `after` up to this `seq`.
    pub through: i64,
    /// The head of the log in the same snapshot.
    pub head: i64,
    /// The floor of the log in the same snapshot.
    pub floor: i64,
    /// The status, in the same snapshot, of the filter's job. `None` if it doesn't exist, or the filter has none.
    pub job_status: Option<JobStatus>,
}

/// `seq`s that a page of an org's events spans at most. It bounds the work for a filter that matches little.
pub(super) const SCAN_WINDOW: i64 = 4_096;

impl EventPage {
    /// The page, which covers the log up to `last`, or only up to its last event if it is cut.
    pub(super) fn ending_at(mut self, last: i64, is_cut: bool) -> Self {
        self.through = match self.events.last() {
            Some(event) if is_cut => event.seq(),
            _ => last.min(self.head),
        };
        self
    }

    /// The matching events of jobs, in the order of `seq`.
    pub fn of_jobs(&self) -> impl Iterator<Item = &Arc<JobEvent>> {
        self.events.iter().filter_map(LogEvent::job)
    }

    /// Adds the org events up to `through` that follow on the query's `after`. The page ends earlier if it exceeds the query's
    /// bounds then.
    pub(super) fn with_org_events(mut self, org_events: Vec<Arc<OrgEvent>>, query: &EventQuery) -> Self {
        if org_events.is_empty() {
            return self;
        }
        self.events.extend(org_events.into_iter().map(LogEvent::Org));
        self.events.sort_by_key(LogEvent::seq);
        let mut bytes = 0;
        let mut fits = |event: &LogEvent| {
            let fits = bytes <= query.max_bytes;
            bytes += event.weight();
            fits
        };
        let n = self.events.iter().take(query.max_events).take_while(|event| fits(event)).count();
        if n < self.events.len() {
            self.events.truncate(n);
            self.through = self.events.last().map_or(self.through, LogEvent::seq);
        }
        self
    }
}

/// The order of a list of jobs: that of their first events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ListOrder {
    /// The job that was created last comes first.
    #[default]
    NewestFirst,
    /// The job that was created first comes first.
    OldestFirst,
}

impl ListOrder {
    /// A position before all jobs.
    pub fn start(self) -> i64 {
        match self {
            Self::NewestFirst => i64::MAX,
            Self::OldestFirst => 0,
        }
    }
}

/// Which page of jobs to read.
#[derive(Debug, Clone)]
pub struct ListQuery {
    /// The filter of jobs.
    pub filter: JobFilter,
    /// The order of the jobs.
    pub order: ListOrder,
    /// Only jobs whose first event comes, in this order, after this `seq`.
    pub after: i64,
    /// At most this many jobs, at least 1.
    pub limit: usize,
    /// Whether the page is one of many small steps: it examines few jobs, however few match.
    pub is_step: bool,
}

/// Jobs that a page examines at most if no index has exactly the matching ones.
pub(super) const LIST_SCAN: usize = 2_000;
/// The same for a step, as a multiple of its limit, and at most, unless its limit is higher.
const STEP_SCAN: usize = 10;
const MOST_OF_STEP: usize = 640;

impl ListQuery {
    /// The first page of at most `limit` jobs in this order.
    pub fn first(filter: JobFilter, order: ListOrder, limit: usize) -> Self {
        Self { filter, order, after: order.start(), limit, is_step: false }
    }

    /// True if an index has exactly the matching jobs.
    fn is_indexed(&self) -> bool {
        let filter = &self.filter;
        let times = [filter.created_after, filter.created_before, filter.finished_after, filter.finished_before];
        let no_rest = filter.requested_by.is_none()
            && filter.error_code.is_none()
            && filter.worker.is_none()
            && times.iter().all(Option::is_none);
        let of_types = filter.types.is_empty()
            || !filter.statuses.is_empty() && filter.statuses.iter().all(|status| status.is_terminal());
        let of_labels = filter.labels.is_empty()
            || filter.labels.len() == 1 && filter.types.is_empty() && filter.statuses.is_empty();
        filter.idempotency_key.is_some() || no_rest && of_types && of_labels
    }

    /// How many jobs a page examines. One more than its limit tells whether there is a next page.
    pub(super) fn scan(&self) -> usize {
        let wanted = self.limit + 1;
        match (self.is_indexed(), self.is_step) {
            (true, _) => wanted,
            (false, true) => wanted.max((STEP_SCAN * self.limit).min(MOST_OF_STEP)),
            (false, false) => wanted.max(LIST_SCAN),
        }
    }

    /// How many rows a statement returns at most. The worker of a job whose row is behind is known only once it is read.
    pub(super) fn rows(&self) -> usize {
        if self.filter.worker.is_some() { self.scan() } else { self.limit + 1 }
    }

    /// The names of the statuses of jobs to examine.
    pub(super) fn status_names(&self) -> Vec<&'static str> {
        self.filter.possible_statuses().map(JobStatus::as_str).collect()
    }

    /// The page of these jobs, of which there are [`ListQuery::rows`] if there may be more. `reached` is the `created_seq` of the
    /// last job examined, `None` if all were.
    pub(super) fn page(&self, mut jobs: Vec<Job>, as_of_seq: i64, reached: Option<i64>) -> JobPage {
        let read_to = jobs.last().filter(|_| jobs.len() >= self.rows()).map(|job| job.created_seq);
        jobs.retain(|job| self.filter.matches(job));
        let is_cut = jobs.len() > self.limit;
        jobs.truncate(self.limit);
        let next = match jobs.last() {
            Some(last) if is_cut => Some(last.created_seq),
            _ => read_to.or(reached),
        };
        JobPage { jobs, next, as_of_seq }
    }
}

/// A page of jobs.
#[derive(Debug)]
pub struct JobPage {
    /// The matching jobs, in the query's order.
    pub jobs: Vec<Job>,
    /// The `after` of the next page, `None` at the end. A page without jobs may have a next one.
    pub next: Option<i64>,
    /// A `seq` up to which the page lacks no event. Events after it have everything that the page lacks.
    pub as_of_seq: i64,
}

/// Which statistics to read.
#[derive(Debug, Clone, PartialEq)]
pub struct StatisticsQuery {
    /// Only these types. Empty: all types.
    pub types: Vec<String>,
    /// Length of the window, which ends now. At most seven days.
    pub window: TimeDelta,
    /// Whether to return the buckets of the window as well.
    pub series: SeriesKind,
}

impl StatisticsQuery {
    /// The statistics of these types for the last minute.
    pub fn of(types: &[String]) -> Self {
        Self { types: types.to_vec(), window: TimeDelta::minutes(1), series: SeriesKind::None }
    }
}

/// Which buckets a series has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeriesKind {
    /// None.
    None,
    /// A bucket for all types together.
    Together,
    /// A bucket for each type.
    ByType,
}

/// The statistics of an org.
#[derive(Debug)]
pub struct Statistics {
    /// The head of the log at which the statistics were read.
    pub as_of_seq: i64,
    /// The database's clock at that time.
    pub as_of: Time,
    /// The start of the window: a whole minute, or a whole hour if the window is longer than a day. Later if the series starts
    /// later.
    pub since: Time,
    /// The types, ordered by name. Retention drops a type with its last job.
    pub types: Vec<TypeStatistics>,
    /// The buckets in order, without empty ones.
    pub series: Vec<SeriesPoint>,
    /// The settings of the org's types, as of this `seq` or later.
    pub settings: Arc<OrgSettings>,
}

/// The statistics of one type.
#[derive(Debug)]
pub struct TypeStatistics {
    /// The type's name.
    pub job_type: String,
    /// The numbers of jobs by status.
    pub counts: StatusCounts,
    /// The number of scheduled jobs. The other queued jobs are ready.
    pub scheduled: i64,
    /// The ready time of the job that has been ready for longest.
    pub oldest_ready_at: Option<Time>,
    /// What happened to jobs of the type within the window.
    pub flow: Flow,
}

impl TypeStatistics {
    /// True if there are jobs of the type. The window may include what happened to jobs that are gone.
    pub fn exists(&self) -> bool {
        self.counts.total() > 0
    }
}

/// One bucket of the series.
#[derive(Debug, Clone, PartialEq)]
pub struct SeriesPoint {
    /// The first instant of the bucket.
    pub start: Time,
    /// The type, in a series by type.
    pub job_type: Option<String>,
    /// What happened in the bucket, without durations.
    pub flow: Flow,
}

impl Statistics {
    /// The statistics of an org without a log.
    pub(super) fn empty(as_of: Time, since: Time) -> Self {
        Self { as_of_seq: 0, as_of, since, types: Vec::new(), series: Vec::new(), settings: Arc::default() }
    }

    /// Sorts types and buckets.
    pub(super) fn in_order(mut self) -> Self {
        self.types.sort_unstable_by(|a, b| a.job_type.cmp(&b.job_type));
        self.series.sort_unstable_by(|a, b| (a.start, &a.job_type).cmp(&(b.start, &b.job_type)));
        self
    }
}
