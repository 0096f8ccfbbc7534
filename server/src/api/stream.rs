//! An event stream on the wire: a task that drives a subscription, and a short queue that the caller empties.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use jobledger_proto::v1::{self as pb, stream_job_events_response::Item};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{caller::View, convert, status::ApiError};
use crate::{
    domain::{id::LogId, job::JobRecord},
    ledger::{Delivery, EncodedEvent, LedgerError, PageShare, StreamPages, StreamSlot, Subscription},
    scheduler,
};

/// Pages that wait for the caller beside the one that it is taking from. A page is bounded in events and bytes, and its
/// events become messages only when they are taken. So a caller that takes nothing costs this page, the one that it
/// takes from, one that the task holds, and the buffers of the transport.
const QUEUE: usize = 1;

/// How long a caller may take nothing while memory for pages is short.
const WHERE_TIGHT: Duration = Duration::from_secs(1);

/// A connection is cut if the end of a stream stays unread for this many times the patience with slow consumers.
const CUT_AFTER: u32 = 10;

enum Page {
    Events(std::vec::IntoIter<Arc<EncodedEvent>>, PageShare),
    Jobs(std::vec::IntoIter<JobRecord>, PageShare),
    Bookmark {
        seq: i64,
        caught_up: bool,
    },
    /// The end of the stream. If the queue closes without one, the task has failed.
    End {
        /// The cursor from which the caller can go on at another server.
        bookmark: Option<i64>,
        ended: Result<(), ApiError>,
    },
}

enum Taking {
    /// None yet, or the last one was taken whole.
    Nothing,
    Events(std::vec::IntoIter<Arc<EncodedEvent>>, #[expect(dead_code, reason = "held as long as the page")] PageShare),
    Jobs(std::vec::IntoIter<JobRecord>, #[expect(dead_code, reason = "held as long as the page")] PageShare),
    /// The end: the bookmark is still to be sent, then the error.
    End {
        bookmark: Option<i64>,
        ended: Result<(), ApiError>,
    },
}

pub(crate) enum Outgoing {
    /// An event, encoded once for all streams.
    Event(Arc<EncodedEvent>),
    /// A message for this caller only.
    Message(pb::StreamJobEventsResponse),
}

impl Outgoing {
    fn of(item: Item) -> Self {
        Self::Message(pb::StreamJobEventsResponse { item: Some(item) })
    }

    /// What a caller may see of an event.
    fn event(event: Arc<EncodedEvent>, view: View) -> Self {
        match (view, event.job()) {
            (View::WithoutContents, Some(of_job)) => {
                Self::of(Item::Event(Box::new(convert::seen_event(convert::event(of_job), view))))
            }
            // Changes of settings have no contents.
            (View::WithoutContents, None) | (View::Whole, _) => Self::Event(event),
        }
    }
}

/// The answer of StreamJobEvents.
pub(crate) struct EventStream {
    held: Arc<Mutex<StreamState>>,
    /// Messages that the caller has taken.
    taken: Arc<AtomicU64>,
    /// The stream's slot, held until the stream is dropped.
    _place: StreamSlot,
}

/// The part of a stream that its task can drop if the caller takes nothing.
struct StreamState {
    queue: mpsc::Receiver<Page>,
    taking: Taking,
    log_id: LogId,
    view: View,
}

impl StreamState {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Outgoing, Status>>> {
        loop {
            let next = match &mut self.taking {
                Taking::Nothing => None,
                Taking::Events(page, _) => page.next().map(|event| Outgoing::event(event, self.view)),
                Taking::Jobs(page, _) => page.next().map(|job| {
                    let job = convert::seen_job(convert::job_record(&job), self.view);
                    Outgoing::of(Item::Snapshot(Box::new(job)))
                }),
                Taking::End { bookmark, ended } => match bookmark.take() {
                    Some(seq) => return Poll::Ready(Some(Ok(self.bookmark(seq, false)))),
                    None => {
                        let ended = std::mem::replace(ended, Ok(()));
                        return Poll::Ready(ended.err().map(|error| Err(error.into())));
                    }
                },
            };
            if let Some(item) = next {
                return Poll::Ready(Some(Ok(item)));
            }
            self.taking = Taking::Nothing;
            match ready!(self.queue.poll_recv(context)) {
                Some(Page::Events(page, taken)) => self.taking = Taking::Events(page, taken),
                Some(Page::Jobs(page, taken)) => self.taking = Taking::Jobs(page, taken),
                Some(Page::Bookmark { seq, caught_up }) => return Poll::Ready(Some(Ok(self.bookmark(seq, caught_up)))),
                Some(Page::End { bookmark, ended }) => self.taking = Taking::End { bookmark, ended },
                None => {
                    self.taking = Taking::End { bookmark: None, ended: Err(LedgerError::Unavailable.into()) };
                }
            }
        }
    }

    fn bookmark(&self, seq: i64, caught_up: bool) -> Outgoing {
        Outgoing::of(Item::Bookmark(pb::Bookmark { seq, caught_up, log_id: self.log_id.to_string() }))
    }

    /// Drops everything but the end. The caller can go on from the last bookmark or event that it has taken.
    fn let_go(&mut self, ended: ApiError) {
        self.queue.close();
        while self.queue.try_recv().is_ok() {}
        self.taking = Taking::End { bookmark: None, ended: Err(ended) };
    }
}

impl Stream for EventStream {
    type Item = Result<Outgoing, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = ready!(self.held.lock().poll_next(context));
        if matches!(item, Some(Ok(_))) {
            self.taken.fetch_add(1, Ordering::Relaxed);
        }
        Poll::Ready(item)
    }
}

/// Starts the task that drives a subscription. It ends with the subscription, the caller or the server. If the caller
/// does not take the end either, the task drops what the stream holds, and later cuts the connection: nothing else ends
/// a stream that is not read.
pub(super) fn start(
    subscription: Subscription,
    view: View,
    slow_consumer_after: Duration,
    draining: CancellationToken,
    (ending, cut): (CancellationToken, CancellationToken),
) -> EventStream {
    let (queue, receiver) = mpsc::channel(QUEUE + 1);
    let taken = Arc::new(AtomicU64::new(0));
    let held = Arc::new(Mutex::new(StreamState {
        queue: receiver,
        taking: Taking::Nothing,
        log_id: subscription.log_id(),
        view,
    }));
    let left = Arc::downgrade(&held);
    let patience = Patience {
        taken: Arc::clone(&taken),
        put: AtomicU64::new(0),
        slow_consumer_after,
        pages: subscription.pages(),
    };
    let stream = EventStream { held, taken: Arc::clone(&taken), _place: subscription.place() };
    scheduler::spawn(async move {
        // One slot of the queue is reserved for the end, so that it is delivered even if the queue is full.
        let Ok(last) = queue.clone().try_reserve_owned() else {
            return;
        };
        let mut sent = subscription.cursor();
        let ended = tokio::select! {
            () = queue.closed() => return,
            () = draining.cancelled() => Err(LedgerError::Draining.into()),
            () = ending.cancelled() => Err(LedgerError::Draining.into()),
            ended = deliver(subscription, &queue, &mut sent, &patience) => ended,
        };
        if let Err(error) = &ended {
            tracing::debug!(?error, "a stream ends early");
        }
        let goes_on_elsewhere = matches!(
            ended,
            Err(ApiError::SlowConsumer
                | ApiError::Ledger(LedgerError::Draining | LedgerError::Unavailable | LedgerError::Overloaded))
        );
        patience.put(1);
        last.send(Page::End { bookmark: sent.filter(|_| goes_on_elsewhere), ended });
        tokio::select! {
            // The caller has taken everything, or is gone.
            () = queue.closed() => return,
            () = patience.runs_out() => {}
        }
        if let Some(held) = left.upgrade() {
            held.lock().let_go(ApiError::SlowConsumer);
        }
        sleep(slow_consumer_after * CUT_AFTER).await;
        if left.strong_count() > 0 {
            tracing::debug!("cutting a connection on which the end of a stream is not read");
            cut.cancel();
        }
    });
    stream
}

/// Measures how long a caller takes nothing of what is queued. It gets less time while memory for pages is short.
struct Patience {
    /// Messages that the caller has taken, and messages that were put into the queue.
    taken: Arc<AtomicU64>,
    put: AtomicU64,
    slow_consumer_after: Duration,
    pages: StreamPages,
}

impl Patience {
    fn put(&self, messages: usize) {
        self.put.fetch_add(messages as u64, Ordering::Relaxed);
    }

    /// Returns once the caller has taken nothing for too long. Never returns if it has taken everything.
    async fn runs_out(&self) {
        let put = self.put.load(Ordering::Relaxed);
        let mut last = (self.taken.load(Ordering::Relaxed), Instant::now());
        // A page that was taken whole keeps its memory until the stream is polled again, so it counts as untaken.
        while last.0 < put || self.pages.has_pages() {
            sleep(WHERE_TIGHT.min(self.slow_consumer_after)).await;
            let taken = self.taken.load(Ordering::Relaxed);
            let allowed = if self.pages.is_memory_tight() { WHERE_TIGHT } else { self.slow_consumer_after };
            if taken != last.0 {
                last = (taken, Instant::now());
            } else if last.1.elapsed() >= allowed.min(self.slow_consumer_after) {
                return;
            }
        }
        std::future::pending().await
    }
}

/// Moves deliveries into the queue. Keeps in `sent` the cursor up to which everything was queued; `None` during a snapshot.
async fn deliver(
    mut subscription: Subscription,
    queue: &mpsc::Sender<Page>,
    sent: &mut Option<i64>,
    patience: &Patience,
) -> Result<(), ApiError> {
    loop {
        // The caller has to take what is queued, whether the subscription waits for events, for memory or for its turn.
        let next = tokio::select! {
            biased;
            next = subscription.next() => next?,
            () = patience.runs_out() => return Err(ApiError::SlowConsumer),
        };
        let (messages, page) = match next {
            Delivery::Events(events, room) => (events.len(), Page::Events(events.into_iter(), room)),
            Delivery::Snapshot(jobs, room) => (jobs.len(), Page::Jobs(jobs.into_iter(), room)),
            Delivery::Bookmark { seq, caught_up } => (1, Page::Bookmark { seq, caught_up }),
            Delivery::End => return Ok(()),
        };
        tokio::select! {
            biased;
            room = queue.reserve() => match room {
                Ok(room) => {
                    patience.put(messages);
                    room.send(page);
                }
                // The caller is gone.
                Err(_) => return Ok(()),
            },
            () = patience.runs_out() => return Err(ApiError::SlowConsumer),
        }
        *sent = subscription.cursor();
    }
}
