//! One subscriber's way along an org's log: the past from the database, then live from the hub, and back whenever it
//! falls behind what memory holds.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use super::{
    LedgerError,
    hub::{Listener, Recent},
};
use crate::{
    domain::{event::JobEvent, id::OrgId, status::JobStatus},
    store::{EventFilter, EventQuery, Store},
};

/// Events handed over at once: a page of the past, or a slice of the tail.
const PAGE_EVENTS: usize = 256;
/// Bytes of a page of the past; one event more than that, at most.
const PAGE_BYTES: usize = 1 << 20;

/// What a subscriber wants.
#[derive(Debug, Clone)]
pub struct SubscribeRequest {
    /// Which events.
    pub filter: EventFilter,
    /// Only events with a greater `seq`. `None`: for a job all of them, for an org those from now on.
    pub after: Option<i64>,
    /// End at what is the head now.
    pub history_only: bool,
}

/// What comes next.
#[derive(Debug)]
pub enum Delivery {
    /// Events, in the order of `seq`; never empty.
    Events(Vec<Arc<JobEvent>>),
    /// Every matching event up to `seq` was delivered.
    Bookmark {
        /// The cursor to go on from.
        seq: i64,
        /// True if this is the head of the log.
        caught_up: bool,
    },
    /// Nothing more will come: the history was asked for, or the job is finished.
    End,
}

/// A place among the streams that may be open. Whoever keeps a stream's events in memory keeps a clone.
pub type StreamPlace = Arc<OwnedSemaphorePermit>;

/// A place in an org's log. Holds no database connection between deliveries.
pub struct Subscription {
    store: Arc<dyn Store>,
    catch_up: Arc<Semaphore>,
    listener: Listener,
    org: OrgId,
    filter: EventFilter,
    /// Everything that matches up to here was delivered.
    cursor: i64,
    /// Where a history ends.
    until: Option<i64>,
    /// The status of the filter's job at the cursor, once the cursor has been at the head.
    job_status: Option<JobStatus>,
    mode: Mode,
    /// The cursor was found to be where the log ended, and nothing was delivered since.
    is_at_head: bool,
    /// The hub's count of forgotten tails when this subscription last turned to the database.
    restarts: u64,
    owes_bookmark: bool,
    bookmark_interval: Duration,
    place: StreamPlace,
    next_bookmark: Instant,
    /// Where the last bookmark said that the subscriber had caught up.
    caught_up_at: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Reading the past from the database.
    Past,
    /// Following the hub.
    Live,
    /// Everything was delivered.
    Ended,
}

impl Subscription {
    pub(super) async fn open(
        store: Arc<dyn Store>,
        catch_up: Arc<Semaphore>,
        org: OrgId,
        listener: Listener,
        bookmark_interval: Duration,
        place: StreamPlace,
        request: SubscribeRequest,
    ) -> Result<Self, LedgerError> {
        // A page beyond every event: the head, the floor and the job's status alone.
        let filter = EventFilter { job: request.filter.job, ..EventFilter::default() };
        let log = store.events(org, &EventQuery { filter, after: i64::MAX, max_events: 1, max_bytes: 0 }).await?;
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
            None if request.filter.job.is_some() => 0,
            None => log.head,
        };
        // A job that exists has its whole history: only the org's stream can expire.
        if request.filter.job.is_none() && cursor + 1 < log.floor {
            return Err(LedgerError::CursorExpired { oldest: log.floor, head: log.head });
        }
        Ok(Self {
            store,
            catch_up,
            restarts: listener.restarts(),
            listener,
            org,
            filter: request.filter,
            cursor,
            until: request.history_only.then_some(log.head),
            job_status: None,
            mode: Mode::Past,
            is_at_head: false,
            owes_bookmark: false,
            bookmark_interval,
            place,
            next_bookmark: Instant::now() + bookmark_interval,
            caught_up_at: None,
        })
    }

    /// What this subscription takes up of the bound on streams.
    pub fn place(&self) -> StreamPlace {
        Arc::clone(&self.place)
    }

    /// The next delivery. May be dropped while it waits: nothing is lost, and the next call goes on from there.
    ///
    /// # Errors
    ///
    /// [`LedgerError::CursorExpired`], or that of the database.
    pub async fn next(&mut self) -> Result<Delivery, LedgerError> {
        loop {
            if self.owes_bookmark || Instant::now() >= self.next_bookmark {
                return Ok(self.bookmark());
            }
            let events = match self.mode {
                Mode::Ended => return Ok(Delivery::End),
                Mode::Past => self.past().await?,
                Mode::Live => self.live().await,
            };
            if !events.is_empty() {
                return Ok(Delivery::Events(events));
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

    /// Reads a page from the database.
    async fn past(&mut self) -> Result<Vec<Arc<JobEvent>>, LedgerError> {
        let restarts = self.listener.restarts();
        let query = EventQuery {
            filter: self.filter.clone(),
            after: self.cursor,
            max_events: PAGE_EVENTS,
            max_bytes: PAGE_BYTES,
        };
        let page = {
            let _turn = self.catch_up.acquire().await.map_err(|_| LedgerError::Draining)?;
            self.store.events(self.org, &query).await?
        };
        if self.filter.job.is_none() && self.cursor + 1 < page.floor {
            return Err(LedgerError::CursorExpired { oldest: page.floor, head: page.head });
        }
        if let Some(job) = self.filter.job
            && page.job_status.is_none()
        {
            // Removed meanwhile, with what was still to be read of it.
            return Err(LedgerError::JobNotFound { job });
        }
        self.restarts = restarts;
        let mut events = page.events;
        self.cursor = page.through.max(self.cursor);
        if let Some(until) = self.until
            && self.cursor >= until
        {
            events.retain(|event| event.seq <= until);
            self.cursor = until;
            self.end();
        } else if self.cursor >= page.head {
            self.job_status = page.job_status;
            self.listener.reached(page.head);
            self.mode = Mode::Live;
            self.is_at_head = true;
            self.owes_bookmark = true;
            if self.job_status.is_some_and(JobStatus::is_terminal) {
                self.end();
            }
        }
        Ok(events)
    }

    /// Takes what the hub has, or waits for it. Comes back empty when something else is due first.
    async fn live(&mut self) -> Vec<Arc<JobEvent>> {
        match self.listener.recent(self.cursor, PAGE_EVENTS, PAGE_BYTES) {
            Recent::Behind => {
                self.is_at_head = false;
                self.mode = Mode::Past;
                Vec::new()
            }
            Recent::Events(mut events) => {
                self.is_at_head = false;
                self.cursor = events.last().map_or(self.cursor, |event| event.seq);
                if let Some(job) = self.filter.job
                    && let Some(last) = events.iter().rfind(|event| event.job_id == job)
                {
                    self.job_status = Some(last.next_status);
                }
                events.retain(|event| self.filter.matches(event));
                events
            }
            // What memory takes for the head of the log may not be it: whether the job is finished there, the database says.
            Recent::AtHead if self.job_status.is_some_and(JobStatus::is_terminal) => {
                self.mode = Mode::Past;
                Vec::new()
            }
            recent @ (Recent::AtHead | Recent::Awaited) => {
                self.is_at_head = matches!(recent, Recent::AtHead);
                let news = self.listener.news(self.cursor, self.restarts);
                // Either way the loop looks again.
                let _ = timeout_at(self.next_bookmark, news).await;
                if self.listener.restarts() != self.restarts {
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
