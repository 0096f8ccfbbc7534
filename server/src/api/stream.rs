//! An event stream on the wire: a task that moves a subscription along, and a short queue that the caller empties.

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
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{convert, status::ApiError};
use crate::{
    domain::{id::LogId, job::JobRecord},
    ledger::{Delivery, LedgerError, SharedEvent, StreamPlace, Subscription},
};

/// Pages that wait for the caller beside the one it is taking from. A page is bounded in events and in bytes, and its
/// events become messages only when they are taken: a caller that takes nothing costs this one, the one that it
/// takes from, one in the hands of the task, and what the transport buffers.
const QUEUE: usize = 1;

/// What waits for the caller.
enum Page {
    Events(std::vec::IntoIter<Arc<SharedEvent>>),
    Jobs(std::vec::IntoIter<JobRecord>),
    Bookmark {
        seq: i64,
        caught_up: bool,
    },
    /// The end. A queue that closes without it was left by a task that failed.
    End {
        /// Where to go on from, for one who has to do so elsewhere.
        bookmark: Option<i64>,
        ended: Result<(), ApiError>,
    },
}

/// The page that is being taken.
enum Taking {
    Events(std::vec::IntoIter<Arc<SharedEvent>>),
    Jobs(std::vec::IntoIter<JobRecord>),
    /// Nothing but how it ended.
    Ended(Result<(), ApiError>),
}

/// A message to be sent.
pub(crate) enum Outgoing {
    /// With this event, encoded once for all who are told of it.
    Event(Arc<SharedEvent>),
    /// For this caller alone.
    Message(pb::StreamJobEventsResponse),
}

impl Outgoing {
    fn of(item: Item) -> Self {
        Self::Message(pb::StreamJobEventsResponse { item: Some(item) })
    }
}

/// The answer of StreamJobEvents.
pub(crate) struct EventStream {
    queue: mpsc::Receiver<Page>,
    taking: Taking,
    log_id: LogId,
    /// How many messages the caller has taken.
    taken: Arc<AtomicU64>,
    /// Kept for as long as pages may be held here.
    _place: StreamPlace,
}

impl EventStream {
    fn bookmark(&self, seq: i64, caught_up: bool) -> Outgoing {
        Outgoing::of(Item::Bookmark(pb::Bookmark { seq, caught_up, log_id: self.log_id.to_string() }))
    }
}

impl Stream for EventStream {
    type Item = Result<Outgoing, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = loop {
            let next = match &mut self.taking {
                Taking::Events(page) => page.next().map(Outgoing::Event),
                Taking::Jobs(page) => {
                    page.next().map(|job| Outgoing::of(Item::Snapshot(Box::new(convert::job_record(&job)))))
                }
                Taking::Ended(ended) => {
                    let ended = std::mem::replace(ended, Ok(()));
                    return Poll::Ready(ended.err().map(|error| Err(error.into())));
                }
            };
            if let Some(item) = next {
                break item;
            }
            match ready!(self.queue.poll_recv(context)) {
                Some(Page::Events(page)) => self.taking = Taking::Events(page),
                Some(Page::Jobs(page)) => self.taking = Taking::Jobs(page),
                Some(Page::Bookmark { seq, caught_up }) => break self.bookmark(seq, caught_up),
                Some(Page::End { bookmark, ended }) => {
                    self.taking = Taking::Ended(ended);
                    if let Some(seq) = bookmark {
                        break self.bookmark(seq, false);
                    }
                }
                None => self.taking = Taking::Ended(Err(LedgerError::Unavailable.into())),
            }
        };
        self.taken.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Some(Ok(item)))
    }
}

/// Starts moving a subscription. The task ends with the subscription, the caller or the server, whichever is first.
pub(super) fn start(
    subscription: Subscription,
    slow_consumer_after: Duration,
    draining: CancellationToken,
) -> EventStream {
    let (queue, receiver) = mpsc::channel(QUEUE + 1);
    let taken = Arc::new(AtomicU64::new(0));
    let stream = EventStream {
        queue: receiver,
        taking: Taking::Events(Vec::new().into_iter()),
        log_id: subscription.log_id(),
        taken: Arc::clone(&taken),
        _place: subscription.place(),
    };
    tokio::spawn(async move {
        // One place is kept for the end, so that it reaches even a caller whose queue is full.
        let Ok(last) = queue.clone().try_reserve_owned() else {
            return;
        };
        let mut sent = subscription.cursor();
        let ended = tokio::select! {
            () = queue.closed() => return,
            () = draining.cancelled() => Err(LedgerError::Draining.into()),
            ended = deliver(subscription, &queue, &mut sent, &taken, slow_consumer_after) => ended,
        };
        if let Err(error) = &ended {
            tracing::debug!(?error, "a stream ends early");
        }
        let goes_on_elsewhere = matches!(
            ended,
            Err(ApiError::SlowConsumer | ApiError::Ledger(LedgerError::Draining | LedgerError::Unavailable))
        );
        last.send(Page::End { bookmark: sent.filter(|_| goes_on_elsewhere), ended });
    });
    stream
}

/// Keeps in `sent` up to where everything was put into the queue; `None` where there is no such place yet.
async fn deliver(
    mut subscription: Subscription,
    queue: &mpsc::Sender<Page>,
    sent: &mut Option<i64>,
    taken: &AtomicU64,
    slow_consumer_after: Duration,
) -> Result<(), ApiError> {
    loop {
        let page = match subscription.next().await? {
            Delivery::Events(events) => Page::Events(events.into_iter()),
            Delivery::Snapshot(jobs) => Page::Jobs(jobs.into_iter()),
            Delivery::Bookmark { seq, caught_up } => Page::Bookmark { seq, caught_up },
            Delivery::End => return Ok(()),
        };
        let room = queue.reserve();
        tokio::pin!(room);
        loop {
            let before = taken.load(Ordering::Relaxed);
            match timeout(slow_consumer_after, &mut room).await {
                Ok(Ok(room)) => break room.send(page),
                // The caller is gone.
                Ok(Err(_)) => return Ok(()),
                Err(_) if taken.load(Ordering::Relaxed) == before => return Err(ApiError::SlowConsumer),
                // Slow, but taking.
                Err(_) => {}
            }
        }
        *sent = subscription.cursor();
    }
}
