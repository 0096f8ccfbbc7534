//! Event streams that outlive their connections.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use jobledger_proto::v1::{
    Bookmark, JobEvent, StreamJobEventsRequest, StreamJobEventsResponse, stream_job_events_response,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use crate::{Client, Error, retry::Backoff};

/// Items that are read ahead of their consumer. When they wait, so does the server.
const READ_AHEAD: usize = 16;

/// What a subscription brings.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Item {
    /// The next event.
    Event(Box<JobEvent>),
    /// Nothing that matches is missing up to here: a cursor to store even when no event came.
    Bookmark(Bookmark),
}

/// Events in the order of the org's log, each exactly once.
///
/// A connection that is lost, or a server that goes away, is followed by another for as long as it takes: the stream
/// goes on after the last `seq` it brought. It ends by itself where the request says so ([`Follow::history_only`],
/// a finished job), and with an error when the service refuses to go on. Dropping it ends it.
///
/// A subscription to an org without a cursor begins where the log ends when [`Client::subscribe`] returns.
///
/// [`Follow::history_only`]: crate::Follow::history_only
#[derive(Debug)]
#[must_use]
pub struct Subscription {
    items: mpsc::Receiver<Result<Item, Error>>,
}

impl Subscription {
    pub(crate) async fn open(client: Client, request: StreamJobEventsRequest) -> Result<Self, Error> {
        let mut request = request;
        let mut stream = client.open_stream(request.clone()).await?;
        let (sender, items) = mpsc::channel(READ_AHEAD);
        if request.after_seq.is_none() && request.job_id.is_empty() {
            // The server tells at once where the log ends: with that the place is fixed, whatever becomes of the
            // connection.
            let first = timeout(client.timeout(), stream.message()).await.map_err(|_| Error::DeadlineExceeded)??;
            if let Some(item) = first.and_then(|message| take(message, &mut request)) {
                sender.try_send(Ok(item)).expect("the queue is empty");
            }
        }
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = follow(&client, request, stream, &sender) => {}
            }
        });
        Ok(Self { items })
    }

    /// The next item; `None` after the end or an error. May be dropped while it waits: nothing is lost.
    pub async fn next(&mut self) -> Option<Result<Item, Error>> {
        self.items.recv().await
    }
}

impl Stream for Subscription {
    type Item = Result<Item, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.poll_recv(context)
    }
}

/// Moves items from stream after stream to the consumer.
async fn follow(
    client: &Client,
    mut request: StreamJobEventsRequest,
    mut stream: Streaming<StreamJobEventsResponse>,
    sender: &mpsc::Sender<Result<Item, Error>>,
) {
    let mut backoff = Backoff::default();
    loop {
        let error = match read(&mut stream, &mut request, &mut backoff, sender).await {
            // Only a history, or the stream of a job, has an end.
            Ok(()) if request.history_only || !request.job_id.is_empty() || sender.is_closed() => return,
            Ok(()) => Error::from(Status::unavailable("the stream was cut")),
            Err(error) => error,
        };
        if !error.is_unavailable() {
            // A consumer that is gone needs no error.
            let _ = sender.send(Err(error)).await;
            return;
        }
        let wait = backoff.next(error.retry_after());
        tracing::debug!(%error, after_seq = request.after_seq, wait_ms = wait.as_millis() as u64, "resuming");
        sleep(wait).await;
        stream = loop {
            match client.open_stream(request.clone()).await {
                Ok(stream) => break stream,
                // A server that is away may take longer than one call's deadline to return.
                Err(error) if error.is_unavailable() || matches!(error, Error::DeadlineExceeded) => {
                    tracing::warn!(%error, after_seq = request.after_seq, "can't resume yet");
                }
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            }
        };
    }
}

/// Moves the items of one stream, keeping the cursor in the request that would resume it. `Ok` at its proper end.
async fn read(
    stream: &mut Streaming<StreamJobEventsResponse>,
    request: &mut StreamJobEventsRequest,
    backoff: &mut Backoff,
    sender: &mpsc::Sender<Result<Item, Error>>,
) -> Result<(), Error> {
    while let Some(message) = stream.message().await? {
        backoff.reset();
        let Some(item) = take(message, request) else { continue };
        if sender.send(Ok(item)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// A message's item, with the cursor in the request moved past it; `None` for one from a newer server.
fn take(message: StreamJobEventsResponse, request: &mut StreamJobEventsRequest) -> Option<Item> {
    let (seq, item) = match message.item? {
        stream_job_events_response::Item::Event(event) => (event.seq, Item::Event(event)),
        stream_job_events_response::Item::Bookmark(bookmark) => (bookmark.seq, Item::Bookmark(bookmark)),
    };
    request.after_seq = Some(seq);
    Some(item)
}
