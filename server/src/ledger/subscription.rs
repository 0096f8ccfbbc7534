//! One subscriber's progress along an org's log: past events from the database, then live ones from the hub, and back to the
//! database whenever its cursor falls behind the tail.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::{
    LedgerError,
    encoded_event::EncodedEvent,
    hub::{Listener, Recent},
    label_bloom::LabelBloom,
    read_budget::{PageShare, StreamPages},
    reader::Reader,
    stream_slots::StreamSlot,
};
use crate::{
    domain::{
        id::{LogId, OrgId},
        job::JobRecord,
        org_event::LogEvent,
        status::JobStatus,
    },
    store::{EventFilter, EventPage, EventQuery, JobPage, ListOrder, ListQuery, Store, StoreError},
};

/// Events of a delivery: a page of the past, or a slice of the tail.
const PAGE_EVENTS: usize = 256;
/// Bytes of a page of the past; exceeded by one event at most.
const PAGE_BYTES: usize = 1 << 20;
/// Approximate bytes of a job in a page besides its texts.
const JOB_BYTES: usize = 1 << 10;
/// Jobs in a page of a snapshot.
const PAGE_JOBS: usize = 64;
/// Jobs whose payloads and results are read at once. Each may have the largest size allowed.
const CONTENTS_AT_ONCE: usize = 8;

/// What a subscriber asks for.
#[derive(Debug, Clone, Default)]
pub struct SubscribeRequest {
    /// Which events.
    pub filter: EventFilter,
    /// Only events with a greater `seq`. `None`: for a job all events, for an org only new ones.
    pub after: Option<i64>,
    /// End at the head as of the call; with a snapshot, at the head once the snapshot is complete.
    pub history_only: bool,
    /// Begin with a snapshot of the matching jobs.
    pub with_snapshot: bool,
    /// The log that the cursor belongs to; `None`: do not check.
    pub log_id: Option<LogId>,
}

/// What a subscriber gets next.
#[derive(Debug)]
pub enum Delivery {
    /// Events, in the order of `seq`; never empty.
    Events(Vec<Arc<EncodedEvent>>, PageShare),
    /// Jobs of the snapshot; never empty.
    Snapshot(Vec<JobRecord>, PageShare),
    /// Every matching event up to `seq` was delivered.
    Bookmark {
        /// The cursor to resume from.
        seq: i64,
        /// True if this is the head of the log.
        caught_up: bool,
    },
    /// Nothing more will come: only the history was asked for, or the job is finished.
    End,
}

/// What a subscription reads from.
pub(super) struct Source {
    /// Turns to read the past.
    pub(super) catch_up: Arc<Reader>,
    /// Memory for its pages.
    pub(super) pages: StreamPages,
    pub(super) listener: Listener,
    pub(super) org: OrgId,
    /// The log that the subscription's cursor belongs to.
    pub(super) log_id: LogId,
}

/// A position in an org's log. Uses no database connection between deliveries.
pub struct Subscription {
    source: Source,
    filter: EventFilter,
    /// The marks of the filter's labels.
    marks: LabelBloom,
    /// Every matching event up to here was delivered.
    cursor: i64,
    is_history: bool,
    /// The page that was read when the subscription was opened.
    first: Option<PastPage>,
    /// Where a history ends, once known.
    until: Option<i64>,
    /// The status of the filter's job at the cursor, once the cursor has reached the head.
    job_status: Option<JobStatus>,
    mode: Mode,
    /// The cursor is at the head, and nothing was delivered since that was found.
    is_at_head: bool,
    /// The hub's count of restarts when this subscription last read the database.
    restarts: u64,
    owes_bookmark: bool,
    bookmark_interval: Duration,
    place: StreamSlot,
    next_bookmark: Instant,
    /// The cursor of the last bookmark, if it said that the subscriber had caught up.
    caught_up_at: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Reading the snapshot: jobs created before this `seq`.
    Snapshot { before: i64 },
    /// Reading the past from the database.
    Past,
    /// Following the hub.
    Live,
    /// Everything was delivered.
    Ended,
}

impl Subscription {
    pub(super) async fn open(
        source: Source,
        bookmark_interval: Duration,
        place: StreamSlot,
        request: SubscribeRequest,
    ) -> Result<Self, LedgerError> {
        let Source { catch_up, pages, listener, org, log_id } = &source;
        let org = *org;
        if request.log_id.is_some_and(|wanted| wanted != *log_id) {
            return Err(LedgerError::EpochChanged { current: *log_id });
        }
        // The first page comes with the head, the floor and the job's status, if there is memory for it.
        let after = if request.with_snapshot { None } else { request.after.or(request.filter.job.map(|_| 0)) };
        let turn = catch_up.begin(org).await?;
        let taken = after.and_then(|after| Some((after, pages.try_take(PAGE_BYTES)?)));
        let restarts = listener.restarts();
        let query = match &taken {
            Some((after, _)) => a_page(&request.filter, *after),
            // A page beyond every event reads only these.
            None => {
                let filter = EventFilter { job: request.filter.job, ..EventFilter::default() };
                EventQuery { filter, after: i64::MAX, max_events: 1, max_bytes: 0 }
            }
        };
        let mut log = turn.read(move |store| async move { store.events(org, &query).await }).await?;
        if let Some(job) = request.filter.job
            && log.job_status.is_none()
        {
            return Err(LedgerError::JobNotFound { job });
        }
        let cursor = match request.after {
            Some(after) if after > log.head => {
                return Err(LedgerError::CursorAhead { oldest: log.floor, head: log.head });
            }
            Some(after) => after,
            None if request.with_snapshot => log.head,
            None if request.filter.job.is_some() => 0,
            None => log.head,
        };
        // A job that exists has its whole history. Only an org's stream can expire.
        if request.filter.job.is_none() && cursor + 1 < log.floor {
            return Err(LedgerError::CursorExpired { oldest: log.floor, head: log.head });
        }
        let head = log.head;
        let first = match taken {
            Some((_, taken)) => Some(PastPage::new(log, taken, restarts)),
            // Beyond the head there is nothing.
            None if cursor == log.head && !request.with_snapshot => {
                log.through = log.head;
                Some(PastPage::new(log, PageShare::default(), restarts))
            }
            None => None,
        };
        Ok(Self {
            restarts,
            source,
            marks: LabelBloom::of(&request.filter.labels),
            filter: request.filter,
            cursor,
            is_history: request.history_only,
            until: (request.history_only && !request.with_snapshot).then_some(head),
            first,
            job_status: None,
            mode: if request.with_snapshot { Mode::Snapshot { before: i64::MAX } } else { Mode::Past },
            is_at_head: false,
            owes_bookmark: false,
            bookmark_interval,
            place,
            next_bookmark: Instant::now() + bookmark_interval,
            caught_up_at: None,
        })
    }

    /// The slot that this subscription takes of the bound on streams.
    pub fn place(&self) -> StreamSlot {
        Arc::clone(&self.place)
    }

    /// The log that its cursor belongs to.
    pub fn log_id(&self) -> LogId {
        self.source.log_id
    }

    /// Memory for its pages.
    pub fn pages(&self) -> StreamPages {
        self.source.pages.clone()
    }

    /// Every matching event up to here was delivered; `None` while the snapshot is being read.
    pub fn cursor(&self) -> Option<i64> {
        (!matches!(self.mode, Mode::Snapshot { .. })).then_some(self.cursor)
    }

    /// The next delivery. May be dropped while it waits: nothing is lost, and the next call resumes.
    ///
    /// # Errors
    ///
    /// [`LedgerError::CursorExpired`], [`LedgerError::CursorAhead`], [`LedgerError::EpochChanged`],
    /// [`LedgerError::JobNotFound`], or an error of the database.
    pub async fn next(&mut self) -> Result<Delivery, LedgerError> {
        loop {
            if let Some(current) = self.source.listener.log_id().filter(|current| *current != self.source.log_id) {
                return Err(LedgerError::EpochChanged { current });
            }
            if let Mode::Snapshot { before } = self.mode {
                // Without a bookmark: until the snapshot is complete, there is no cursor to resume from.
                let (jobs, taken) = self.snapshot(before).await?;
                if !jobs.is_empty() {
                    return Ok(Delivery::Snapshot(jobs, taken));
                }
                continue;
            }
            if self.owes_bookmark || Instant::now() >= self.next_bookmark {
                return Ok(self.bookmark());
            }
            let (events, taken) = match self.mode {
                Mode::Snapshot { .. } => continue,
                Mode::Ended => return Ok(Delivery::End),
                Mode::Past => self.past().await?,
                // Events of the tail take no memory of their own.
                Mode::Live => (self.live().await, PageShare::default()),
            };
            if !events.is_empty() {
                return Ok(Delivery::Events(events, taken));
            }
        }
    }

    fn bookmark(&mut self) -> Delivery {
        self.owes_bookmark = false;
        self.next_bookmark = Instant::now() + self.bookmark_interval;
        let caught_up = self.is_at_head || self.mode == Mode::Ended;
        self.caught_up_at = caught_up.then_some(self.cursor);
        Delivery::Bookmark { seq: self.cursor, caught_up }
    }

    /// Reads the next jobs of the snapshot. After the last one, the subscription goes on with the past after the noted head.
    async fn snapshot(&mut self, before: i64) -> Result<(Vec<JobRecord>, PageShare), LedgerError> {
        let Source { catch_up, pages, org, .. } = &self.source;
        let org = *org;
        let mut taken = pages.take(PAGE_BYTES).await?;
        let (jobs, next) = match self.filter.job {
            Some(job) => {
                let record = catch_up
                    .begin_patiently(org)
                    .await
                    .read(move |store| async move { store.job(org, job).await })
                    .await?;
                let record = record.ok_or(LedgerError::JobNotFound { job })?;
                (Vec::from_iter(self.filter.matches_job(&record.job).then_some(record)), None)
            }
            None => {
                let order = ListOrder::NewestFirst;
                let query = ListQuery { after: before, ..ListQuery::first(self.filter.of_jobs(), order, PAGE_JOBS) };
                catch_up.begin_patiently(org).await.read(move |store| snapshot_page(store, org, query)).await?
            }
        };
        self.mode = next.map_or(Mode::Past, |before| Mode::Snapshot { before });
        // The bookmark says which `seq` the snapshot belongs to.
        self.owes_bookmark = next.is_none();
        taken.shrink(jobs.iter().map(|job| job.job.text_bytes() + job.contents.len() + JOB_BYTES).sum());
        Ok((jobs, taken))
    }

    /// Reads a page from the database.
    async fn page(&self) -> Result<PastPage, LedgerError> {
        let Source { catch_up, pages, listener, org, .. } = &self.source;
        let org = *org;
        let taken = pages.take(PAGE_BYTES).await?;
        let restarts = listener.restarts();
        let query = a_page(&self.filter, self.cursor);
        let turn = catch_up.begin_patiently(org).await;
        let page = turn.read(move |store| async move { store.events(org, &query).await }).await?;
        Ok(PastPage::new(page, taken, restarts))
    }

    /// Goes on with a page of the past.
    async fn past(&mut self) -> Result<(Vec<Arc<EncodedEvent>>, PageShare), LedgerError> {
        let restarts = self.source.listener.restarts();
        let PastPage { page, taken, restarts } = match self.first.take().filter(|first| first.restarts == restarts) {
            Some(first) => first,
            None => self.page().await?,
        };
        if self.filter.job.is_none() && self.cursor + 1 < page.floor {
            return Err(LedgerError::CursorExpired { oldest: page.floor, head: page.head });
        }
        // Delivered events are gone: a standby that lacked them took over.
        if self.cursor > page.head {
            return Err(LedgerError::CursorAhead { oldest: page.floor, head: page.head });
        }
        if let Some(job) = self.filter.job
            && page.job_status.is_none()
        {
            // The job was removed meanwhile, with its remaining events.
            return Err(LedgerError::JobNotFound { job });
        }
        self.restarts = restarts;
        if self.is_history {
            self.until.get_or_insert(page.head);
        }
        let mut events = page.events;
        self.cursor = page.through.max(self.cursor);
        if let Some(until) = self.until
            && self.cursor >= until
        {
            events.retain(|event| event.seq() <= until);
            self.cursor = until;
            self.end();
        } else if self.cursor >= page.head {
            self.job_status = page.job_status;
            self.source.listener.reached(page.head);
            self.mode = Mode::Live;
            self.is_at_head = true;
            self.owes_bookmark = true;
            if self.job_status.is_some_and(JobStatus::is_terminal) {
                self.end();
            }
        }
        Ok((events.into_iter().map(EncodedEvent::new).collect(), taken))
    }

    /// Takes events from the tail, or waits for them. Returns none when something else is due first.
    async fn live(&mut self) -> Vec<Arc<EncodedEvent>> {
        match self.source.listener.recent(self.cursor, PAGE_EVENTS, PAGE_BYTES) {
            Recent::Behind => {
                self.is_at_head = false;
                self.mode = Mode::Past;
                Vec::new()
            }
            Recent::Events(mut events) => {
                self.is_at_head = false;
                self.cursor = events.last().map_or(self.cursor, |event| event.seq());
                if let Some(job) = self.filter.job
                    && let Some(last) =
                        events.iter().rev().filter_map(|event| event.job()).find(|event| event.job_id == job)
                {
                    self.job_status = Some(last.next_status);
                }
                events.retain(|event| event.matches(&self.filter, &self.marks));
                events
            }
            // The end of the tail may not be the head of the log. Only the database says whether the job is finished there.
            Recent::AtHead if self.job_status.is_some_and(JobStatus::is_terminal) => {
                self.mode = Mode::Past;
                Vec::new()
            }
            recent @ (Recent::AtHead | Recent::Awaited) => {
                self.is_at_head = matches!(recent, Recent::AtHead);
                let news = self.source.listener.news(self.cursor, self.restarts);
                // The loop checks again in either case.
                let _ = timeout_at(self.next_bookmark, news).await;
                if self.source.listener.restarts() != self.restarts {
                    self.is_at_head = false;
                    self.mode = Mode::Past;
                }
                Vec::new()
            }
        }
    }

    fn end(&mut self) {
        self.mode = Mode::Ended;
        self.owes_bookmark = self.caught_up_at != Some(self.cursor);
    }
}

/// A page of past events.
struct PastPage {
    page: EventPage,
    taken: PageShare,
    /// The hub's count of restarts before the page was read.
    restarts: u64,
}

impl PastPage {
    /// Gives back the memory that the page does not need.
    fn new(page: EventPage, mut taken: PageShare, restarts: u64) -> Self {
        taken.shrink(page.events.iter().map(LogEvent::weight).sum());
        Self { page, taken, restarts }
    }
}

fn a_page(filter: &EventFilter, after: i64) -> EventQuery {
    EventQuery { filter: filter.clone(), after, max_events: PAGE_EVENTS, max_bytes: PAGE_BYTES }
}

/// A page of jobs created before a `seq`, and where the next page begins if there is one.
async fn snapshot_page(
    store: Arc<dyn Store>,
    org: OrgId,
    query: ListQuery,
) -> Result<(Vec<JobRecord>, Option<i64>), StoreError> {
    let JobPage { jobs, mut next, .. } = store.list(org, &query).await?;
    let (mut records, mut bytes) = (Vec::new(), 0);
    let mut chunks = jobs.chunks(CONTENTS_AT_ONCE).peekable();
    while let Some(chunk) = chunks.next() {
        let ids: Vec<_> = chunk.iter().map(|job| job.id).collect();
        let mut contents: HashMap<_, _> = store.contents(org, &ids).await?.into_iter().collect();
        for job in chunk {
            // Without contents the job was removed since the page was read.
            let Some(contents) = contents.remove(&job.id) else { continue };
            bytes += contents.len();
            records.push(JobRecord { job: job.clone(), contents });
        }
        if bytes > PAGE_BYTES && chunks.peek().is_some() {
            next = chunk.last().map(|job| job.created_seq);
            break;
        }
    }
    Ok((records, next))
}
