//! Requests on their way in: what they may hold until they are answered, and how long they may take to come whole.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::Request;
use http_body::{Frame, SizeHint};
use prost::bytes::{Bytes, BytesMut};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use super::{
    limits::{CallLimits, Stalled},
    status::ApiError,
};
use crate::{
    access::Credential,
    ledger::{LedgerError, with_reserve},
};

/// What the name of a service or a symbol may take, in bytes: requests about no org are no more than that.
pub(crate) const ABOUT_NO_ORG: usize = 4 << 10;
/// How long a request may take to come whole where there is little room left for others.
const WHERE_TIGHT: Duration = Duration::from_secs(1);

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A call about an org.
    Call,
    /// A call about none: small.
    AboutNoOrg,
    /// One that goes on with further messages.
    Dialogue,
    /// Plain HTTP.
    Plain,
}

impl Kind {
    fn is_about_no_org(self) -> bool {
        matches!(self, Self::AboutNoOrg | Self::Dialogue)
    }
}

/// All requests.
pub(super) struct Requests {
    limits: CallLimits,
    /// Those about orgs, and those about none, which are anybody's: neither takes room from the other, nor hurries it.
    about_orgs: Pool,
    about_none: Pool,
    draining: CancellationToken,
    /// Requests are not answered while the database is away: that there is no room is then not their callers' fault.
    is_stalled: Stalled,
}

/// What some requests take.
struct Pool {
    /// Bytes, and how many there may be.
    held: AtomicUsize,
    memory: usize,
    /// Requests that are waited for.
    awaited: AtomicUsize,
}

impl Pool {
    fn new(memory: usize) -> Self {
        Self { held: AtomicUsize::new(0), memory, awaited: AtomicUsize::new(0) }
    }
}

impl Requests {
    pub(super) fn new(limits: CallLimits, draining: CancellationToken, is_stalled: Stalled) -> Arc<Self> {
        let memory = limits.request_memory;
        let (about_orgs, about_none) = (Pool::new(memory), Pool::new(memory / 4));
        Arc::new(Self { limits, about_orgs, about_none, draining, is_stalled })
    }

    fn pool(&self, kind: Kind) -> &Pool {
        if kind.is_about_no_org() { &self.about_none } else { &self.about_orgs }
    }

    /// The request as it is to be read, and what it holds until that is dropped. With a reserve there is a quarter more room for it, and
    /// others don't hurry it before they take of that.
    pub(super) fn receive(
        self: &Arc<Self>,
        request: Request<Body>,
        kind: Kind,
        has_reserve: bool,
    ) -> (Request<Body>, Arc<Held>) {
        let held = Arc::new(Held { requests: Arc::clone(self), kind, has_reserve, bytes: AtomicUsize::new(0) });
        let credential = request.extensions().get::<Arc<Credential>>().cloned();
        let receiving = Arc::clone(&held);
        let request = request.map(|body| {
            Body::new(Receiving { body, kind, credential, held: receiving, late: None, message: Message::default() })
        });
        (request, held)
    }

    /// Waits for as long as a request may take to come whole: not long where others would find no room, or no place.
    async fn patience_ends(&self, kind: Kind, has_reserve: bool) {
        let CallLimits { request_within, calls_per_org, .. } = self.limits;
        let pool = self.pool(kind);
        let awaited = Awaited::new(&pool.awaited);
        let began = Instant::now();
        loop {
            sleep_until((Instant::now() + WHERE_TIGHT).min(began + request_within)).await;
            let (much, many) =
                if has_reserve { (pool.memory, calls_per_org) } else { (pool.memory / 2, calls_per_org / 4) };
            let is_tight = pool.held.load(Ordering::Relaxed) > much || awaited.in_all() > many;
            if is_tight || began.elapsed() >= request_within {
                return;
            }
        }
    }
}

/// A request that is waited for.
struct Awaited<'a>(&'a AtomicUsize);

impl<'a> Awaited<'a> {
    fn new(all: &'a AtomicUsize) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(all)
    }

    fn in_all(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a request holds, until it is answered.
pub(super) struct Held {
    requests: Arc<Requests>,
    kind: Kind,
    has_reserve: bool,
    bytes: AtomicUsize,
}

impl Held {
    /// Room for more, if there is any.
    fn take(&self, bytes: usize) -> Result<(), ApiError> {
        let pool = self.requests.pool(self.kind);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let most = if self.has_reserve { with_reserve(pool.memory) } else { pool.memory };
        if pool.held.fetch_add(bytes, Ordering::Relaxed) + bytes > most {
            if !self.kind.is_about_no_org() && (self.requests.is_stalled)() {
                return Err(LedgerError::Unavailable.into());
            }
            return Err(ApiError::Overloaded { scope: "requests", limit: pool.memory });
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.requests.pool(self.kind).held.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

/// A request's body, which has to come in time, and to find room.
struct Receiving {
    body: Body,
    kind: Kind,
    /// Whose it is. It may end while the request is waited for.
    credential: Option<Arc<Credential>>,
    held: Arc<Held>,
    /// From the first wait on.
    late: Option<Pin<Box<dyn Future<Output = ApiError> + Send>>>,
    message: Message,
}

/// What has come of a message, held back until it is whole: whoever decodes it makes room for all that its first bytes promise. In one
/// piece, since a piece for each of its bytes takes a hundred times as much as they do.
#[derive(Default)]
struct Message {
    /// The first piece, as it came: mostly it is all.
    first: Bytes,
    /// With those that followed it.
    rest: BytesMut,
    /// What came after all of it.
    trailers: Option<Frame<Bytes>>,
    /// All of it is there, or will never be; it has been passed on.
    is_whole: bool,
}

impl Message {
    /// Whether it is compressed, and its length: the first bytes (gRPC over HTTP/2, Length-Prefixed-Message).
    const PREFIX: usize = 5;

    fn data(&self) -> &[u8] {
        if self.rest.is_empty() { &self.first } else { &self.rest }
    }

    fn add(&mut self, data: Bytes) {
        if self.data().is_empty() {
            self.first = data;
            return;
        }
        if self.rest.is_empty() {
            self.rest.extend_from_slice(&std::mem::take(&mut self.first));
        }
        self.rest.extend_from_slice(&data);
    }

    /// All that has come, at once.
    fn take(&mut self) -> Bytes {
        self.is_whole = true;
        if self.rest.is_empty() { std::mem::take(&mut self.first) } else { std::mem::take(&mut self.rest).freeze() }
    }

    /// How long it says that it is, prefix included; `None` until it has. An error if that is more than it may be.
    fn length(&self, limit: usize) -> Result<Option<usize>, ApiError> {
        let Some(&[flag, a, b, c, d]) = self.data().first_chunk::<{ Self::PREFIX }>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        match (flag, length > limit) {
            (0, true) => Err(ApiError::MessageTooLarge { limit }),
            (0, false) => Ok(Some(Self::PREFIX + length)),
            // What is no message, or compressed, is for whoever decodes it to say, without making room.
            _ => Ok(Some(self.data().len())),
        }
    }
}

fn more_than_one() -> ApiError {
    ApiError::invalid("(message)", "must be one, and nothing after it")
}

impl http_body::Body for Receiving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.message.is_whole
                && let Some(trailers) = self.message.trailers.take()
            {
                return Poll::Ready(Some(Ok(trailers)));
            }
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => match self.receive(data) {
                        Ok(None) => {}
                        Ok(Some(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                        Err(error) => return Poll::Ready(Some(Err(error.into()))),
                    },
                    Err(trailers) if self.message.is_whole => return Poll::Ready(Some(Ok(trailers))),
                    Err(trailers) => {
                        self.message.trailers = Some(trailers);
                        return Poll::Ready(Some(Ok(Frame::data(self.message.take()))));
                    }
                },
                // Cut short: that is for whoever decodes it to say.
                Poll::Ready(None) if !self.message.is_whole => {
                    return Poll::Ready(Some(Ok(Frame::data(self.message.take()))));
                }
                Poll::Ready(None) if self.late.is_some() => {
                    return Poll::Ready(self.still_holds().err().map(|error| Err(error.into())));
                }
                Poll::Pending if self.kind == Kind::Dialogue && self.message.is_whole => return Poll::Pending,
                Poll::Pending => return self.poll_late(context),
                ended => return ended,
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.message.data().is_empty() && self.message.trailers.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.message.data().is_empty() { self.body.size_hint() } else { SizeHint::default() }
    }
}

impl Receiving {
    /// Takes in what has come; what is to be passed on, if there is anything.
    fn receive(&mut self, data: Bytes) -> Result<Option<Bytes>, ApiError> {
        let request_bytes = self.held.requests.limits.request_bytes;
        match (self.kind, self.message.is_whole) {
            // Whoever reads it bounds it, and holds one message at a time.
            (Kind::Dialogue, true) => return Ok(Some(data)),
            (Kind::Call | Kind::AboutNoOrg, true) if data.is_empty() => return Ok(None),
            (Kind::Call | Kind::AboutNoOrg, true) => return Err(more_than_one()),
            (Kind::Plain, true) => {
                self.held.take(data.len())?;
                return Ok(Some(data));
            }
            (_, false) => {}
        }
        self.held.take(data.len())?;
        self.message.add(data);
        let has = self.message.data().len();
        let is_whole = match self.kind {
            // It is whole when it ends; what is too long is refused by whoever reads it.
            Kind::Plain => has > request_bytes,
            kind => {
                let limit = if kind.is_about_no_org() { ABOUT_NO_ORG } else { request_bytes };
                match self.message.length(limit)? {
                    Some(length) if has > length && kind != Kind::Dialogue => return Err(more_than_one()),
                    length => length.is_some_and(|length| has >= length),
                }
            }
        };
        if !is_whole {
            return Ok(None);
        }
        self.still_holds()?;
        Ok(Some(self.message.take()))
    }

    /// An error if whose it is was revoked while it came.
    fn still_holds(&self) -> Result<(), ApiError> {
        let refusal = self.credential.as_ref().and_then(|credential| credential.refusal());
        refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    /// It has not come; but it had to by now?
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { held, late, kind, .. } = self;
        let late = late.get_or_insert_with(|| {
            let (requests, kind, has_reserve) = (Arc::clone(&held.requests), *kind, held.has_reserve);
            Box::pin(async move {
                tokio::select! {
                    () = requests.patience_ends(kind, has_reserve) => ApiError::RequestTooSlow,
                    // What has not come whole was not accepted.
                    () = requests.draining.cancelled() => LedgerError::Draining.into(),
                }
            })
        });
        late.as_mut().poll(context).map(|error| Some(Err(error.into())))
    }
}
