//! An event stream on the wire: a task that moves a subscription along, and a short queue that the caller empties.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use jobledger_proto::v1::{self as pb, stream_job_events_response::Item};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::timeout,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{convert, status::ApiError};
use crate::{
    domain::event::JobEvent,
    ledger::{Delivery, LedgerError, Subscription},
};

/// Messages that wait for the caller. Events are shared with the hub's tail until they are taken, so a caller that
/// takes nothing costs these, a page in hand, and what the transport buffers.
const QUEUE: usize = 16;

/// What waits for the caller; made into a message only when it is taken.
enum Message {
    Event(Arc<JobEvent>),
    Bookmark { seq: i64, caught_up: bool },
}

/// The answer of StreamJobEvents.
pub(crate) struct EventStream(mpsc::Receiver<Result<Message, ApiError>>);

impl Stream for EventStream {
    type Item = Result<pb::StreamJobEventsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|taken| {
            taken.map(|message| {
                let item = match message? {
                    Message::Event(event) => Item::Event(Box::new(convert::event(&event))),
                    Message::Bookmark { seq, caught_up } => Item::Bookmark(pb::Bookmark { seq, caught_up }),
                };
                Ok(pb::StreamJobEventsResponse { item: Some(item) })
            })
        })
    }
}

/// Starts moving a subscription. The task ends with the subscription, the caller or the server, whichever is first.
pub(super) fn start(
    subscription: Subscription,
    slow_consumer_after: Duration,
    draining: CancellationToken,
) -> EventStream {
    let (queue, receiver) = mpsc::channel(QUEUE + 1);
    tokio::spawn(async move {
        // One place is kept for the error that ends the stream, so that it reaches even a caller whose queue is full.
        let Ok(last) = queue.clone().try_reserve_owned() else {
            return;
        };
        let ended = tokio::select! {
            () = queue.closed() => return,
            () = draining.cancelled() => Err(LedgerError::Draining.into()),
            ended = deliver(subscription, &queue, slow_consumer_after) => ended,
        };
        if let Err(error) = ended {
            last.send(Err(error));
        }
    });
    EventStream(receiver)
}

async fn deliver(
    mut subscription: Subscription,
    queue: &mpsc::Sender<Result<Message, ApiError>>,
    slow_consumer_after: Duration,
) -> Result<(), ApiError> {
    let put = |message| async move {
        match queue.try_send(Ok(message)) {
            Ok(()) => Ok(()),
            // The caller is gone: the task is about to end anyway.
            Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(message)) => match timeout(slow_consumer_after, queue.send(message)).await {
                Ok(_) => Ok(()),
                Err(_) => Err(ApiError::SlowConsumer),
            },
        }
    };
    loop {
        match subscription.next().await? {
            Delivery::Events(events) => {
                for event in events {
                    put(Message::Event(event)).await?;
                }
            }
            Delivery::Bookmark { seq, caught_up } => put(Message::Bookmark { seq, caught_up }).await?,
            Delivery::End => return Ok(()),
        }
    }
}
