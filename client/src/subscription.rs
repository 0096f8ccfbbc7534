//! Event streams that outlive their connections.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use jobledger_proto::v1::{
    Bookmark, Job, JobEvent, StreamJobEventsRequest, StreamJobEventsResponse, stream_job_events_response,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};

use crate::{Client, Cursor, Error, retry::Backoff};

/// Items that are read ahead of their consumer. When they wait, so does the server.
const READ_AHEAD: usize = 16;

/// What a subscription brings.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Item {
    /// A job of the snapshot. Events up to its `last_seq` are in it already, and come all the same.
    Snapshot(Box<Job>),
    /// The connection was lost within the snapshot, which begins anew: what came of it so far is void.
    SnapshotRestarted,
    /// The next event.
    Event(Box<JobEvent>),
    /// Nothing that matches is missing up to here: a cursor to store even when no event came. The first one after a
    /// snapshot says that it is complete.
    Bookmark(Bookmark),
}

/// Events in the order of the org's log, each exactly once; with [`Follow::snapshot`] the jobs as they are first.
///
/// A connection that is lost, or a server that goes away, is followed by another for as long as it takes: the stream
/// goes on after the last `seq` it brought. It ends by itself where the request says so ([`Follow::history_only`],
/// a finished job), and with an error when the service refuses to go on. Dropping it ends it.
///
/// A subscription to an org without a cursor begins where the log ends when [`Client::subscribe`] returns.
///
/// In builds with debug assertions it checks the service's promise: an event that is missing, comes twice or is out of order
/// ends it with [`Error::OutOfOrder`].
///
/// [`Follow::history_only`]: crate::Follow::history_only
/// [`Follow::snapshot`]: crate::Follow::snapshot
#[must_use]
pub struct Subscription {
    items: mpsc::Receiver<Result<Delivered, Error>>,
    /// Where the consumer is, once there is such a place.
    cursor: Option<Cursor>,
    /// The hook has not heard of the cursor yet.
    is_news: bool,
    hook: Option<Hook>,
}

/// Hears of each cursor that the consumer has come to.
type Hook = Box<dyn FnMut(&Cursor) + Send>;

/// An item, with the cursor after it.
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
                if let stream_job_events_response::Item::Event(event) = &item {
                    // It happened since the server took the subscription.
                    place.request.after_seq = Some(event.seq - 1);
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

    /// Calls this whenever the consumer comes for the next item, with the cursor after the one before: what it stores has been
    /// dealt with. Called for every item; a consumer that stores it in a file may want to do so now and then only.
    pub fn on_cursor(mut self, hook: impl FnMut(&Cursor) + Send + 'static) -> Self {
        self.hook = Some(Box::new(hook));
        self
    }

    /// Where the consumer is: after the last item that it was given. `None` where there is no place to go on from yet, within a
    /// snapshot.
    pub fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }

    /// The next item; `None` after the end or an error. May be dropped while it waits: nothing is lost.
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

/// Moves items from stream after stream to the consumer.
async fn follow(
    client: &Client,
    mut place: Place,
    mut stream: Streaming<StreamJobEventsResponse>,
    sender: &mpsc::Sender<Result<Delivered, Error>>,
) {
    let mut backoff = Backoff::default();
    loop {
        let error = match read(&mut stream, &mut place, &mut backoff, sender).await {
            // Only a history, or the stream of a job, has an end.
            Ok(()) if place.has_end() || sender.is_closed() => return,
            Ok(()) => Error::from(Status::unavailable("the stream was cut")),
            Err(error) => error,
        };
        // The token may have been replaced since the stream was opened; if not, that is said when it is opened again.
        let may_be_known_again = matches!(error, Error::Unauthenticated { .. });
        if !error.is_transient() && !may_be_known_again {
            // A consumer that is gone needs no error.
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
                    tracing::warn!(%error, after_seq = place.request.after_seq, "can't resume yet");
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

/// Moves the items of one stream. `Ok` at its proper end.
async fn read(
    stream: &mut Streaming<StreamJobEventsResponse>,
    place: &mut Place,
    backoff: &mut Backoff,
    sender: &mpsc::Sender<Result<Delivered, Error>>,
) -> Result<(), Error> {
    while let Some(message) = stream.message().await? {
        backoff.reset();
        // One that says nothing is from a newer server.
        let Some(item) = message.item else { continue };
        if sender.send(Ok(place.take(item)?)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Where a subscription is.
struct Place {
    /// What would resume it.
    request: StreamJobEventsRequest,
    log_id: String,
    /// Jobs of a snapshot that is not complete have come.
    is_in_snapshot: bool,
    /// The last `job_seq`, of a job's own stream.
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

    /// The same with the first message: the server tells at once where the log ends, and with that the place is fixed, whatever
    /// becomes of the connection.
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

    /// Takes note of the log that the service has: what resumes the subscription is to be of the same.
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

    /// True if jobs have come of a snapshot that has to be taken anew.
    fn restart_snapshot(&mut self) -> bool {
        std::mem::take(&mut self.is_in_snapshot)
    }

    /// Moves past the next item.
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

    /// From here on it is resumed by the cursor, with what the snapshot let through besides.
    fn pass_snapshot(&mut self) {
        self.is_in_snapshot = false;
        if std::mem::take(&mut self.request.include_snapshot) {
            self.request.include_leaving = true;
        }
    }

    /// Checks what the service promises: each event once and in order, and none missing where all are wanted.
    fn check(&mut self, event: &JobEvent) -> Result<(), Error> {
        let request = &self.request;
        let is_filtered = !(request.types.is_empty() && request.statuses.is_empty() && request.labels.is_empty());
        let follows = |last: i64, next: i64, is_dense: bool| if is_dense { next == last + 1 } else { next > last };
        let is_of_job = !request.job_id.is_empty();
        let is_next = request.after_seq.is_none_or(|last| follows(last, event.seq, !is_filtered && !is_of_job))
            && (!is_of_job || self.job_seq.is_none_or(|last| follows(last, event.job_seq, !is_filtered)));
        if !is_next {
            return Err(Error::OutOfOrder { after_seq: request.after_seq.unwrap_or_default(), found_seq: event.seq });
        }
        self.job_seq = Some(event.job_seq);
        Ok(())
    }
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
