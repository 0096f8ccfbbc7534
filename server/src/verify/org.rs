//! Verifies one org: its log, each job against its events, the counters and the series.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use uuid::Uuid;

use super::{Pause, What, counted::Counted, org_events};
use crate::{
    domain::{
        edit::EditableFields,
        event::{EventKind, JobEvent},
        flow::{Flow, Milestone, Timeline},
        id::{JobId, OrgId},
        job::{Job, Labels},
        job_filter::JobFilter,
        org_event::LogEvent,
        replay::{Fold, Replay},
        status::JobStatus,
    },
    store::{
        EventFilter, EventQuery, ListOrder, ListQuery, Scheduled, Series, Statistics, StatisticsQuery, Stock, Store,
        StoreError,
    },
};

/// The number of `seq`s that one query counts.
const STRETCH: i64 = 20_000;
/// Types whose series one query reads.
const SERIES_AT_ONCE: usize = 20;
/// Jobs per page.
const PAGE_JOBS: usize = 256;
/// Events per page.
const PAGE_EVENTS: usize = 4_096;
/// Bytes per page of events, where they are read with their results.
const PAGE_BYTES: usize = 1 << 20;
/// The most differences that are listed for one org.
const MAX_DIFFERENCES: usize = 1_000;

/// What was verified in an org, and what was found.
#[derive(Default)]
pub(super) struct OrgReport {
    pub(super) jobs: u64,
    pub(super) events: u64,
    pub(super) differences: Vec<What>,
}

/// The heads at which counters and series were read. These are separate reads, so their heads differ.
struct Heads {
    counters: i64,
    /// By type. A type that appeared later has no entry.
    series: HashMap<String, i64>,
    /// The highest of the heads.
    last: i64,
}

/// Verifies one org. `None` if retention has removed something meanwhile.
pub(super) async fn verify(
    store: &dyn Store,
    org: OrgId,
    pause: &mut Pause<'_>,
    mut on_progress: impl FnMut(u64),
) -> Result<Option<OrgReport>, StoreError> {
    pause.keep().await?;
    let removals = store.audit().removals(org).await?;
    let remaining = store.audit().count_remaining(org).await?;
    let counters = store.statistics(org, &StatisticsQuery::of(&[])).await?;
    let (mut heads, all_series) = read_series(store, org, pause, &counters).await?;
    // The stock is read last, so its head is the highest: the one up to which jobs and events are counted.
    let stock = store.audit().stock(org).await?;
    heads.last = heads.last.max(stock.map_or(0, |(seq, _)| seq));
    let mut found = OrgReport { differences: bad_rows(store, org).await?, ..OrgReport::default() };
    let (events, mut bytes, floor) = count_log(store, org, pause, heads.last, &mut found.differences).await?;
    let own = org_events::Stored::read(store, org, &counters.settings, floor).await?;

    let mut counted = Counted::new(all_series.iter().filter_map(|series| series.recorded_at).max());
    let mut is_whole = true;
    let mut checked = Checked::default();
    let mut query = ListQuery {
        after: heads.last + 1,
        ..ListQuery::first(JobFilter::default(), ListOrder::NewestFirst, PAGE_JOBS)
    };
    loop {
        let page = match store.list(org, &query).await {
            Err(StoreError::Unusable(reason)) => {
                found.differences.push(What::Unreadable(reason));
                is_whole = false;
                break;
            }
            page => page?,
        };
        found.jobs += page.jobs.len() as u64;
        bytes += page.jobs.iter().map(Job::weight).sum::<i64>();
        for jobs in groups(&page.jobs) {
            pause.keep().await?;
            check_jobs(store, org, jobs, &heads, &mut counted, &mut checked, &mut found.differences).await?;
        }
        on_progress(found.jobs);
        match page.next {
            Some(after) if found.differences.len() < MAX_DIFFERENCES => query.after = after,
            _ => break,
        }
    }
    found.events = events.unsigned_abs();
    if is_whole && found.differences.len() < MAX_DIFFERENCES {
        // `remaining` events belong to jobs that retention has removed; it has yet to remove these events.
        if checked.events + remaining != events {
            found.differences.push(What::Orphans(events - checked.events - remaining));
        }
        let counted_stock = Stock { jobs: found.jobs as i64, bytes: bytes - checked.bytes_since };
        if let Some((_, stored)) = stock.filter(|(_, stored)| *stored != counted_stock) {
            found.differences.push(What::Stock { stored, counted: counted_stock });
        }
        own.compare(store, org, pause, &checked.operations, &mut found.differences).await?;
        counted.compare_counters(&counters, &mut found.differences);
        counted.compare_series(all_series, &mut found.differences);
        pause.keep().await?;
        for (job_type, Scheduled { stored, counted }) in store.audit().miscounted(org).await? {
            found.differences.push(What::Counter { job_type, status: None, stored, counted });
        }
    }
    if found.differences.len() >= MAX_DIFFERENCES {
        found.differences.truncate(MAX_DIFFERENCES);
        found.differences.push(What::More);
    }
    // The settings may be of a later time than they say.
    let may_be_later = found.differences.iter().any(|what| matches!(what, What::Settings(..) | What::Bulk(..)))
        && store.statistics(org, &StatisticsQuery::of(&[])).await?.settings.as_of != counters.settings.as_of;
    let is_same = !may_be_later
        && store.audit().removals(org).await? == removals
        && (remaining == 0 || store.audit().count_remaining(org).await? == remaining);
    Ok(is_same.then_some(found))
}

/// Reads the series of all types, and the heads at which the counters and each series were read.
async fn read_series(
    store: &dyn Store,
    org: OrgId,
    pause: &mut Pause<'_>,
    counters: &Statistics,
) -> Result<(Heads, Vec<Series>), StoreError> {
    let mut heads = Heads { counters: counters.as_of_seq, series: HashMap::new(), last: counters.as_of_seq };
    let mut all_series = Vec::new();
    let types: Vec<_> = counters.types.iter().map(|of_type| of_type.job_type.clone()).collect();
    for types in types.chunks(SERIES_AT_ONCE) {
        pause.keep().await?;
        let series = store.audit().series(org, types).await?;
        heads.last = heads.last.max(series.as_of_seq);
        heads.series.extend(types.iter().map(|name| (name.clone(), series.as_of_seq)));
        all_series.push(series);
    }
    Ok((heads, all_series))
}

/// Batch records that break their chain, and rows that are ahead of the log.
async fn bad_rows(store: &dyn Store, org: OrgId) -> Result<Vec<What>, StoreError> {
    let mut found = Vec::new();
    let broken = store.audit().broken_records(org).await?;
    if broken > 0 {
        found.push(What::Records(broken));
    }
    let early = store.audit().early_rows(org).await?;
    if early > 0 {
        found.push(What::Rows(early));
    }
    Ok(found)
}

/// Counts the events up to the head and their bytes, and checks that no event lies after the stored head. Returns the floor, too.
/// The log must be dense from the floor on. Below it events may be missing, but no two may share a `seq`.
async fn count_log(
    store: &dyn Store,
    org: OrgId,
    pause: &mut Pause<'_>,
    head: i64,
    differences: &mut Vec<What>,
) -> Result<(i64, i64, i64), StoreError> {
    let query = EventQuery { filter: EventFilter::all(), after: head, max_events: PAGE_EVENTS, max_bytes: PAGE_BYTES };
    let page = store.events(org, &query).await?;
    if let Some(last) = page.events.last().map(LogEvent::seq).filter(|last| *last > page.head) {
        differences.push(What::Head { stored: page.head, last });
    }
    let floor = page.floor;
    let (mut after, mut events, mut bytes) = (0, 0, 0);
    while after < head {
        pause.keep().await?;
        let is_whole = after + 1 >= floor;
        let last = (after + STRETCH).min(if is_whole { head } else { (floor - 1).min(head) });
        let found = store.audit().count_events(org, after, last).await?;
        events += found.events;
        bytes += found.bytes + found.org_bytes;
        let (all, places) = (found.events + found.org_events, found.places + found.org_events);
        if all != places || is_whole && all != last - after {
            differences.push(What::Log { first: after + 1, last, events: all, places });
        }
        after = last;
    }
    Ok((events, bytes, floor))
}

/// Groups jobs whose events fit on one page. A job with more events gets a group of its own.
fn groups(jobs: &[Job]) -> Vec<&[Job]> {
    let mut groups = Vec::new();
    let mut rest = jobs;
    while !rest.is_empty() {
        let mut events = 0;
        let fits = |job: &&Job| {
            events += job.last_job_seq.unsigned_abs() as usize;
            events <= PAGE_EVENTS
        };
        let (group, others) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        groups.push(group);
        rest = others;
    }
    groups
}

/// What was counted of the events of jobs.
#[derive(Default)]
struct Checked {
    /// Those at or before the last head.
    events: i64,
    /// By how many bytes the later ones have changed the payloads.
    bytes_since: i64,
    /// Jobs whose events name a bulk operation, by operation.
    operations: HashMap<Uuid, i64>,
}

/// Checks jobs against their events.
async fn check_jobs(
    store: &dyn Store,
    org: OrgId,
    jobs: &[Job],
    heads: &Heads,
    counted: &mut Counted,
    checked: &mut Checked,
    differences: &mut Vec<What>,
) -> Result<(), StoreError> {
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    // All rows come from one snapshot, so no event up to the last one of any row was committed after it.
    let last = jobs.iter().map(|job| job.last_seq).max().unwrap_or_default();
    let mut jobs = jobs.iter();
    let mut current: Option<History<'_>> = None;
    let (mut ids, mut after, mut named) = (&ids[..], 0, HashSet::new());
    loop {
        let page = store.audit().histories(org, ids, after, last, PAGE_EVENTS).await?;
        for event in &page {
            while current.as_ref().is_none_or(|history| history.job.id != event.job_id) {
                if let Some(history) = current.take() {
                    history.end(heads, counted, differences);
                }
                let Some(job) = jobs.next() else { break };
                current = Some(History::new(job));
            }
            if let Some(operation) = event.bulk_operation.filter(|operation| named.insert((event.job_id, *operation))) {
                *checked.operations.entry(operation).or_default() += 1;
            }
            if event.seq <= heads.last {
                checked.events += 1;
            } else {
                checked.bytes_since += event.edit.as_ref().map_or(0, |edit| edit.payload_growth());
            }
            if let Some(history) = &mut current {
                history.follow(event, heads, counted);
            }
        }
        let Some(end) = page.last().filter(|_| page.len() >= PAGE_EVENTS) else { break };
        // Continue with the job whose events the page has cut.
        ids = &ids[ids.iter().position(|id| *id == end.job_id).unwrap_or_default()..];
        after = end.seq;
    }
    for history in current.into_iter().chain(jobs.map(History::new)) {
        history.end(heads, counted, differences);
    }
    Ok(())
}

/// A job, and the state of its events so far.
struct History<'a> {
    job: &'a Job,
    timeline: Timeline,
    replay: Fold,
    /// The job's status at the head of the counters.
    counted: Option<JobStatus>,
    first_seq: Option<i64>,
    /// The labels after the last event, and what edits have changed.
    labels: Option<Labels>,
    edited: EditableFields,
    /// How an event differs from its job, if one does.
    odd: Option<String>,
}

impl<'a> History<'a> {
    fn new(job: &'a Job) -> Self {
        let (replay, edited) = (Fold::default(), EditableFields::default());
        let timeline = Timeline::default();
        Self { job, timeline, replay, counted: None, first_seq: None, labels: None, edited, odd: None }
    }

    fn follow(&mut self, event: &JobEvent, heads: &Heads, counted: &mut Counted) {
        let spec = &self.job.spec;
        let is_erased = self.job.erased_at.is_some();
        if is_erased && !event.is_blank() {
            let what = format!("it was erased, and event {} is not blank yet: a server goes on with that", event.seq);
            self.odd.get_or_insert(what);
        }
        let edit = event.edit.as_deref().filter(|_| !is_erased);
        let labels_before = edit.and_then(|edit| edit.before.labels.as_ref()).unwrap_or(&event.labels);
        if event.job_type != spec.job_type
            || self.labels.replace(Arc::clone(&event.labels)).is_some_and(|of| of != *labels_before) && !is_erased
        {
            self.odd.get_or_insert_with(|| format!("event {} differs in type or labels", event.seq));
        }
        let follows = edit.is_none_or(|edit| {
            self.edited.follow(edit) && edit.after.labels.as_ref().is_none_or(|labels| *labels == event.labels)
        });
        if !follows || edit.is_some() != (event.kind == EventKind::Edited && !is_erased) {
            self.odd.get_or_insert_with(|| format!("event {} does not follow the edits before it", event.seq));
        }
        self.first_seq.get_or_insert(event.seq);
        if heads.series.get(&*spec.job_type).is_some_and(|head| event.seq <= *head) {
            counted.event(&spec.job_type, &mut self.timeline, &Milestone::of(event));
        } else {
            self.timeline.follow(&Milestone::of(event), &mut Flow::default());
        }
        self.replay.follow(event);
        if event.seq <= heads.counters {
            self.counted = self.replay.outcome().ok().map(|replay| replay.status);
        }
    }

    fn end(self, heads: &Heads, counted: &mut Counted, differences: &mut Vec<What>) {
        let (id, job) = (self.job.id, self.job);
        if job.created_seq <= heads.counters
            && let Some(status) = self.counted
        {
            counted.job(&job.spec.job_type, status);
        }
        let mut differ = |id: JobId, what: String| differences.push(What::Row(id, what));
        if self.labels.is_some_and(|labels| labels != job.spec.labels) || !self.edited.are_of(&job.spec) {
            differ(id, "the row differs from the last event in labels or in what was edited".to_owned());
        }
        if let Some(odd) = self.odd {
            differ(id, odd);
        }
        if self.first_seq.is_some_and(|first| first != job.created_seq) {
            differ(id, format!("created_seq is {}", job.created_seq));
        }
        match self.replay.outcome() {
            Err(error) => differences.push(What::History(id, error)),
            Ok(replay) => {
                let row = Replay::of(job);
                if *replay != row {
                    differ(id, format!("{row:?} is stored, {replay:?} is replayed from the events"));
                }
                if !self.timeline.is_of(job) {
                    differ(id, format!("ready_at {} or the start of the attempt differs", job.ready_at));
                }
            }
        }
    }
}
