//! Event streams that resume after a lost connection.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use jobledger_proto::v1::{
    Bookmark, Job, JobEvent, OrgEvent, StreamJobEventsRequest, StreamJobEventsResponse, stream_job_events_response,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};

use crate::{Client, Cursor, Error, retry::Backoff};

/// Items that the client buffers ahead of the consumer. When the buffer is full, flow control holds the server back.
const READ_AHEAD: usize = 16;

/// An item of a [`Subscription`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Item {
    /// A job of the snapshot. Its events up to `last_seq` are already reflected in it, but may be delivered all the same.
    Snapshot(Box<Job>),
    /// The connection was lost within the snapshot, which starts again: discard the jobs received so far.
    SnapshotRestarted,
    /// The next event.
    Event(Box<JobEvent>),
    /// The next event that is about no single job. Without filters these come too, since `seq` counts them.
    OrgEvent(Box<OrgEvent>),
    /// Every matching event up to this position was delivered: a cursor to store even if no event came. The first
    /// bookmark after a snapshot marks the end of the snapshot.
    Bookmark(Bookmark),
}

/// The matching events in the order of the org's log, each exactly once. With [`Follow::snapshot`] the matching jobs
/// come first, as they are.
///
/// If the connection or the server fails, the client reconnects for as long as it takes, and resumes after the last
/// `seq` that it received. The stream ends where the request says so ([`Follow::history_only`], or a job that has
/// finished), or with an error if the service refuses to go on. Dropping the subscription closes the stream.
///
/// A subscription to an org without a cursor starts at the head that the log has when [`Client::subscribe`] returns.
///
/// In builds with debug assertions the subscription checks the service's promise: an event that is missing, duplicated
/// or out of order ends it with [`Error::OutOfOrder`].
///
/// [`Follow::history_only`]: crate::Follow::history_only
/// [`Follow::snapshot`]: crate::Follow::snapshot
#[must_use]
pub struct Subscription {
    items: mpsc::Receiver<Result<Delivered, Error>>,
    /// The position after the last item that the consumer received, if there is a position to resume from.
    cursor: Option<Cursor>,
    /// True if the hook has not been called with `cursor` yet.
    is_news: bool,
    hook: Option<Hook>,
}

/// Called with each cursor that the consumer has reached.
type Hook = Box<dyn FnMut(&Cursor) + Send>;

/// An item and the cursor after it.
type Delivered = (Item, Option<Cursor>);

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("cursor", &self.cursor).finish_non_exhaustive()
    }
}

impl Subscription {
    pub(crate) async fn open(client: Client, request: StreamJobEventsRequest) -> Result<Self, Error> {
        let mut place = Place::new(request);
        let (sender, items) = mpsc::channel(READ_AHEAD);
        let request = &place.request;
        let begins_now = request.after_seq.is_none() && request.job_id.is_empty() && !request.include_snapshot;
        let stream = if begins_now {
            let first = place.connect_now(&client);
            let (stream, item) = timeout(client.timeout(), first).await.map_err(|_| Error::DeadlineExceeded)??;
            if let Some(item) = item {
                // An event was written after the server accepted the subscription: the stream starts right before it.
                match &item {
                    stream_job_events_response::Item::Event(event) => place.request.after_seq = Some(event.seq - 1),
                    stream_job_events_response::Item::OrgEvent(event) => place.request.after_seq = Some(event.seq - 1),
                    stream_job_events_response::Item::Bookmark(_) | stream_job_events_response::Item::Snapshot(_) => {}
                }
                let before = place.cursor();
                let delivered = place.take(item)?;
                sender.try_send(Ok(delivered)).expect("the queue is empty");
                return Ok(Self::start(client, place, stream, sender, items, before));
            }
            stream
        } else {
            place.connect(&client).await?
        };
        let cursor = place.cursor();
        Ok(Self::start(client, place, stream, sender, items, cursor))
    }

    fn start(
        client: Client,
        place: Place,
        stream: Streaming<StreamJobEventsResponse>,
        sender: mpsc::Sender<Result<Delivered, Error>>,
        items: mpsc::Receiver<Result<Delivered, Error>>,
        cursor: Option<Cursor>,
    ) -> Self {
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = follow(&client, place, stream, &sender) => {}
            }
        });
        Self { items, cursor, is_news: false, hook: None }
    }

    /// Calls `hook` each time the consumer asks for the next item, with the cursor after the previous item, which the consumer
    /// has processed by then. The hook runs for every item; one that writes to a file may want to do so now and then only.
    pub fn on_cursor(mut self, hook: impl FnMut(&Cursor) + Send + 'static) -> Self {
        self.hook = Some(Box::new(hook));
        self
    }

    /// The position after the last item that the consumer received. `None` while there is no position to resume from:
    /// within a snapshot, and before the first item of a job's whole history.
    pub fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }

    /// The next item; `None` after the end or an error. Cancel-safe: dropping the future loses no item.
    pub async fn next(&mut self) -> Option<Result<Item, Error>> {
        StreamExt::next(self).await
    }
}

impl Stream for Subscription {
    type Item = Result<Item, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if std::mem::take(&mut this.is_news)
            && let (Some(hook), Some(cursor)) = (&mut this.hook, &this.cursor)
        {
            hook(cursor);
        }
        Poll::Ready(ready!(this.items.poll_recv(context)).map(|delivered| {
            let (item, cursor) = delivered?;
            this.is_news = cursor.is_some();
            this.cursor = cursor;
            Ok(item)
        }))
    }
}

/// Moves items to the consumer, and opens a new stream whenever one breaks.
async fn follow(
    client: &Client,
    mut place: Place,
    mut stream: Streaming<StreamJobEventsResponse>,
    sender: &mpsc::Sender<Result<Delivered, Error>>,
) {
    let mut backoff = Backoff::default();
    loop {
        let error = match read(&mut stream, &mut place, &mut backoff, sender).await {
            // Only a history or the stream of a job ends by itself. Any other end is a cut connection.
            Ok(()) if place.has_end() || sender.is_closed() => return,
            Ok(()) => Error::from(Status::unavailable("the stream was cut")),
            Err(error) => error,
        };
        // The token may have been replaced since the stream was opened. If not, reopening fails with the same error.
        let may_be_known_again = matches!(error, Error::Unauthenticated { .. });
        if !error.is_transient() && !may_be_known_again {
            // A dropped subscription needs no error.
            let _ = sender.send(Err(error)).await;
            return;
        }
        let wait = backoff.next(error.retry_after());
        tracing::debug!(%error, after_seq = place.request.after_seq, wait_ms = wait.as_millis() as u64, "resuming");
        sleep(wait).await;
        if place.restart_snapshot() && sender.send(Ok((Item::SnapshotRestarted, None))).await.is_err() {
            return;
        }
        stream = loop {
            match place.connect(client).await {
                Ok(stream) => break stream,
                Err(error) if error.is_transient() => {
                    let wait = backoff.next(error.retry_after());
                    tracing::warn!(%error, after_seq = place.request.after_seq, "can't resume the event stream; trying again");
                    sleep(wait).await;
                }
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            }
        };
    }
}

/// Moves the items of one stream. `Ok` at the end of the stream, or if the subscription was dropped.
async fn read(
    stream: &mut Streaming<StreamJobEventsResponse>,
    place: &mut Place,
    backoff: &mut Backoff,
    sender: &mpsc::Sender<Result<Delivered, Error>>,
) -> Result<(), Error> {
    while let Some(message) = stream.message().await? {
        backoff.reset();
        // A message without a known item comes from a newer server.
        let Some(item) = message.item else { continue };
        if sender.send(Ok(place.take(item)?)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The position of a subscription.
struct Place {
    /// The request that resumes the subscription from its position.
    request: StreamJobEventsRequest,
    log_id: String,
    /// True if jobs of an incomplete snapshot were received.
    is_in_snapshot: bool,
    /// The last `job_seq`, checked if the stream is of one job.
    job_seq: Option<i64>,
}

impl Place {
    fn new(request: StreamJobEventsRequest) -> Self {
        Self { log_id: request.log_id.clone(), request, is_in_snapshot: false, job_seq: None }
    }

    async fn connect(&mut self, client: &Client) -> Result<Streaming<StreamJobEventsResponse>, Error> {
        let (stream, log_id) = client.open_stream(self.request.clone()).await?;
        self.is_of_log(log_id);
        Ok(stream)
    }

    /// Opens the stream and reads its first message. The server sends a bookmark with the log's head at once, which
    /// fixes the start of the subscription even if the connection breaks later.
    async fn connect_now(
        &mut self,
        client: &Client,
    ) -> Result<(Streaming<StreamJobEventsResponse>, Option<stream_job_events_response::Item>), Error> {
        let mut backoff = Backoff::default();
        loop {
            let mut stream = self.connect(client).await?;
            match stream.message().await.map_err(Error::from) {
                Ok(first) => return Ok((stream, first.and_then(|message| message.item))),
                Err(error) if error.is_transient() => sleep(backoff.next(error.retry_after())).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Records the log id that the service sent, so that a later request is refused if the log has changed.
    fn is_of_log(&mut self, log_id: String) {
        if !log_id.is_empty() {
            self.log_id = log_id;
        }
        if self.request.after_seq.is_some() {
            self.request.log_id.clone_from(&self.log_id);
        }
    }

    fn has_end(&self) -> bool {
        self.request.history_only || !self.request.job_id.is_empty()
    }

    fn cursor(&self) -> Option<Cursor> {
        self.request.after_seq.map(|seq| Cursor { log_id: self.log_id.clone(), seq })
    }

    /// Resets the snapshot. True if jobs of an incomplete snapshot were delivered, which the consumer has to discard.
    fn restart_snapshot(&mut self) -> bool {
        std::mem::take(&mut self.is_in_snapshot)
    }

    /// Advances the position past an item.
    fn take(&mut self, item: stream_job_events_response::Item) -> Result<Delivered, Error> {
        let (seq, item) = match item {
            stream_job_events_response::Item::Snapshot(job) => {
                self.is_in_snapshot = true;
                return Ok((Item::Snapshot(job), None));
            }
            stream_job_events_response::Item::Event(event) => {
                if cfg!(debug_assertions) {
                    self.check(&event)?;
                }
                (event.seq, Item::Event(event))
            }
            stream_job_events_response::Item::OrgEvent(event) => {
                if cfg!(debug_assertions) {
                    self.check_seq(event.seq)?;
                }
                (event.seq, Item::OrgEvent(event))
            }
            stream_job_events_response::Item::Bookmark(bookmark) => {
                self.pass_snapshot();
                self.is_of_log(bookmark.log_id.clone());
                (bookmark.seq, Item::Bookmark(bookmark))
            }
        };
        self.request.after_seq = Some(seq);
        self.request.log_id.clone_from(&self.log_id);
        Ok((item, self.cursor()))
    }

    /// Ends the snapshot. Later requests resume by cursor. They set `include_leaving`, so that the same events pass as
    /// with `include_snapshot`.
    fn pass_snapshot(&mut self) {
        self.is_in_snapshot = false;
        if std::mem::take(&mut self.request.include_snapshot) {
            self.request.include_leaving = true;
        }
    }

    /// Checks the service's promise: each event once and in order, and without a filter none missing.
    fn check(&mut self, event: &JobEvent) -> Result<(), Error> {
        let is_of_job = !self.request.job_id.is_empty();
        let is_next = self.job_seq.is_none_or(|last| follows(last, event.job_seq, !self.is_filtered()));
        self.check_seq(event.seq)?;
        if is_of_job && !is_next {
            return Err(self.out_of_order(event.seq));
        }
        self.job_seq = Some(event.job_seq);
        Ok(())
    }

    /// Checks that an event is the next one of the org, or a later one where there is a filter.
    fn check_seq(&self, seq: i64) -> Result<(), Error> {
        let is_dense = !self.is_filtered() && self.request.job_id.is_empty();
        if self.request.after_seq.is_none_or(|last| follows(last, seq, is_dense)) {
            return Ok(());
        }
        Err(self.out_of_order(seq))
    }

    fn is_filtered(&self) -> bool {
        let request = &self.request;
        !(request.types.is_empty() && request.statuses.is_empty() && request.labels.is_empty())
    }

    fn out_of_order(&self, found_seq: i64) -> Error {
        Error::OutOfOrder { after_seq: self.request.after_seq.unwrap_or_default(), found_seq }
    }
}

/// True if one event follows on another: as the very next one if none is left out.
fn follows(last: i64, next: i64, is_dense: bool) -> bool {
    if is_dense { next == last + 1 } else { next > last }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: i64, job_seq: i64) -> stream_job_events_response::Item {
        let event = JobEvent { seq, job_seq, ..JobEvent::default() };
        stream_job_events_response::Item::Event(Box::new(event))
    }

    fn take(request: StreamJobEventsRequest, events: &[(i64, i64)]) -> Option<(i64, i64)> {
        let mut place = Place::new(request);
        for (seq, job_seq) in events {
            if let Err(error) = place.take(event(*seq, *job_seq)) {
                let Error::OutOfOrder { after_seq, found_seq } = error else { panic!("{error}") };
                return Some((after_seq, found_seq));
            }
        }
        None
    }

    #[test]
    fn a_hole_a_repetition_or_a_step_back_is_noticed() {
        let org = StreamJobEventsRequest { after_seq: Some(4), ..Default::default() };
        assert_eq!(take(org.clone(), &[(5, 1), (6, 1)]), None);
        assert_eq!(take(org.clone(), &[(6, 1)]), Some((4, 6)));
        assert_eq!(take(org.clone(), &[(5, 1), (5, 1)]), Some((5, 5)));
        let some = StreamJobEventsRequest { types: vec!["t".to_owned()], ..org };
        assert_eq!(take(some.clone(), &[(9, 1), (12, 3)]), None);
        assert_eq!(take(some, &[(9, 1), (8, 3)]), Some((9, 8)));
        let job = StreamJobEventsRequest { job_id: "j".to_owned(), ..Default::default() };
        assert_eq!(take(job.clone(), &[(3, 1), (9, 2)]), None);
        assert_eq!(take(job, &[(3, 1), (9, 3)]), Some((3, 9)));
    }

    #[test]
    fn a_subscription_resumes_after_its_snapshot_and_not_within_it() {
        let mut place = Place::new(StreamJobEventsRequest { include_snapshot: true, ..Default::default() });
        let job = stream_job_events_response::Item::Snapshot(Box::default());
        assert_eq!(place.take(job).unwrap().1, None);
        assert!(place.restart_snapshot() && !place.restart_snapshot());
        assert!(place.request.include_snapshot && place.request.after_seq.is_none());
        let bookmark = Bookmark { seq: 7, ..Default::default() };
        place.take(stream_job_events_response::Item::Bookmark(bookmark)).unwrap();
        let request = &place.request;
        assert!(!request.include_snapshot && request.include_leaving && request.after_seq == Some(7));
    }
}
