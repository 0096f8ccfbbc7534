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
    domain::event::JobEvent,
    ledger::{Delivery, LedgerError, StreamPlace, Subscription},
};

/// Pages that wait for the caller beside the one it is taking from. A page is bounded in events and in bytes, and its
/// events become messages only when they are taken: a caller that takes nothing costs this one, the one that it
/// takes from, one in the hands of the task, and what the transport buffers.
const QUEUE: usize = 1;

/// What waits for the caller.
enum Page {
    Events(std::vec::IntoIter<Arc<JobEvent>>),
    Bookmark {
        seq: i64,
        caught_up: bool,
    },
    /// The proper end. A queue that closes without it was left by a task that failed.
    End,
}

type Queued = Result<Page, ApiError>;

/// The answer of StreamJobEvents.
pub(crate) struct EventStream {
    queue: mpsc::Receiver<Queued>,
    page: std::vec::IntoIter<Arc<JobEvent>>,
    /// How many messages the caller has taken.
    taken: Arc<AtomicU64>,
    /// Kept for as long as pages may be held here.
    _place: StreamPlace,
}

impl Stream for EventStream {
    type Item = Result<pb::StreamJobEventsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = loop {
            if let Some(event) = self.page.next() {
                break Item::Event(Box::new(convert::event(&event)));
            }
            match ready!(self.queue.poll_recv(context)) {
                Some(Ok(Page::Events(page))) => self.page = page,
                Some(Ok(Page::Bookmark { seq, caught_up })) => break Item::Bookmark(pb::Bookmark { seq, caught_up }),
                Some(Ok(Page::End)) => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => return Poll::Ready(Some(Err(ApiError::from(LedgerError::Unavailable).into()))),
            }
        };
        self.taken.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Some(Ok(pb::StreamJobEventsResponse { item: Some(item) })))
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
        page: Vec::new().into_iter(),
        taken: Arc::clone(&taken),
        _place: subscription.place(),
    };
    tokio::spawn(async move {
        // One place is kept for the error that ends the stream, so that it reaches even a caller whose queue is full.
        let Ok(last) = queue.clone().try_reserve_owned() else {
            return;
        };
        let ended = tokio::select! {
            () = queue.closed() => return,
            () = draining.cancelled() => Err(LedgerError::Draining.into()),
            ended = deliver(subscription, &queue, &taken, slow_consumer_after) => ended,
        };
        if let Err(error) = &ended {
            tracing::debug!(?error, "a stream ends early");
        }
        last.send(ended.map(|()| Page::End));
    });
    stream
}

async fn deliver(
    mut subscription: Subscription,
    queue: &mpsc::Sender<Queued>,
    taken: &AtomicU64,
    slow_consumer_after: Duration,
) -> Result<(), ApiError> {
    loop {
        let page = match subscription.next().await? {
            Delivery::Events(events) => Page::Events(events.into_iter()),
            Delivery::Bookmark { seq, caught_up } => Page::Bookmark { seq, caught_up },
            Delivery::End => return Ok(()),
        };
        let room = queue.reserve();
        tokio::pin!(room);
        loop {
            let before = taken.load(Ordering::Relaxed);
            match timeout(slow_consumer_after, &mut room).await {
                Ok(Ok(room)) => break room.send(Ok(page)),
                // The caller is gone.
                Ok(Err(_)) => return Ok(()),
                Err(_) if taken.load(Ordering::Relaxed) == before => return Err(ApiError::SlowConsumer),
                // Slow, but taking.
                Err(_) => {}
            }
        }
    }
}
