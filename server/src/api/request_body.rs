//! Incoming requests: how much memory they may hold until they are decoded, and how long they may take to arrive.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
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
    weight::{self, RequestShape},
};
use crate::{
    access::Credential,
    ledger::LedgerError,
    shares::{Full, Most, Part, Shares, Whose},
};

/// Bytes of a request about no org: it has at most the name of a service or a symbol.
pub(crate) const ABOUT_NO_ORG: usize = 4 << 10;
/// How long a request may take to arrive where memory or slots run short, and how often that is checked.
const WHERE_TIGHT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyKind {
    /// A call about an org.
    Call,
    /// A call about no org, which is small.
    AboutNoOrg,
    /// A call whose caller sends further messages: server reflection.
    Dialogue,
    Plain,
}

impl BodyKind {
    fn is_about_no_org(self) -> bool {
        matches!(self, Self::AboutNoOrg | Self::Dialogue)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    pub(super) kind: BodyKind,
    /// Bytes that its message may have.
    pub(super) most: usize,
    pub(super) has_reserve: bool,
}

/// Bounds what requests hold while they are received.
pub(super) struct Requests {
    limits: CallLimits,
    /// Requests about orgs and requests about none, which anybody may send, have separate pools. Neither takes memory
    /// from the other, nor shortens its time.
    about_orgs: RequestPool,
    about_none: RequestPool,
    draining: CancellationToken,
    /// While the database is away, requests are not answered. A lack of memory is then reported as UNAVAILABLE.
    is_stalled: Stalled,
}

/// What the requests of one kind hold, until they are decoded.
struct RequestPool {
    bytes: Arc<Shares<Whose>>,
    /// Counts requests that have not arrived whole.
    awaited: Arc<Shares<Whose>>,
}

impl RequestPool {
    fn new(bytes: Most) -> Self {
        let awaited = Most { in_all: usize::MAX, each: usize::MAX };
        Self { bytes: Shares::new(bytes), awaited: Shares::new(awaited) }
    }
}

impl Requests {
    pub(super) fn new(limits: CallLimits, draining: CancellationToken, is_stalled: Stalled) -> Arc<Self> {
        let most = Most { in_all: limits.request_memory, each: limits.request_memory_per_org };
        let quarter = Most { in_all: most.in_all / 4, each: most.each / 4 };
        let (about_orgs, about_none) = (RequestPool::new(most), RequestPool::new(quarter));
        Arc::new(Self { limits, about_orgs, about_none, draining, is_stalled })
    }

    fn pool(&self, kind: BodyKind) -> &RequestPool {
        if kind.is_about_no_org() { &self.about_none } else { &self.about_orgs }
    }

    /// Wraps the body of a request. The body gives its memory back when it is dropped, after decoding. A request with a
    /// reserve may take a quarter more memory, and its time is shortened only where it would take from that quarter.
    pub(super) fn receive(self: &Arc<Self>, request: Request<Body>, whose: Whose, how: How) -> Request<Body> {
        let bytes = self.pool(how.kind).bytes.nothing(whose);
        let held = ReservedMemory { requests: Arc::clone(self), how, bytes };
        let shape = (how.kind == BodyKind::Call).then(|| RequestShape::of(request.uri().path())).flatten();
        let credential = request.extensions().get::<Arc<Credential>>().cloned();
        request
            .map(|body| Body::new(Receiving { body, shape, credential, held, late: None, message: Message::default() }))
    }

    /// Waits until a request is too slow. That is after `request_within`, or earlier, at a check each second, if more than half
    /// of the memory is taken or more than a quarter of the calls are still arriving. With a reserve it takes all of either.
    async fn patience_ends(&self, whose: Whose, How { kind, has_reserve, .. }: How) {
        let CallLimits { request_within, calls, calls_per_org, .. } = self.limits;
        let RequestPool { bytes, awaited } = self.pool(kind);
        // These shares only count: nothing but time bounds how many requests are arriving.
        let waits = awaited.take(whose, 1);
        let part = bytes.nothing(whose);
        let most = bytes.most();
        let tight = if has_reserve { most } else { Most { in_all: most.in_all / 2, each: most.each / 2 } };
        let many = Most { in_all: calls, each: calls_per_org };
        let many = if has_reserve { many } else { Most { in_all: many.in_all / 4, each: many.each / 4 } };
        let began = Instant::now();
        loop {
            sleep_until((Instant::now() + WHERE_TIGHT).min(began + request_within)).await;
            let are_many = waits.as_ref().is_ok_and(|waits| waits.beside().exceeds(many));
            if are_many || part.beside().exceeds(tight) || began.elapsed() >= request_within {
                return;
            }
        }
    }
}

/// The memory that one request holds until it is decoded.
struct ReservedMemory {
    requests: Arc<Requests>,
    how: How,
    bytes: Part<Whose>,
}

impl ReservedMemory {
    /// Takes memory for more bytes. [`ApiError::Overloaded`] if there is none, or UNAVAILABLE if the database is away.
    fn take(&mut self, bytes: usize) -> Result<(), ApiError> {
        let How { kind, has_reserve, .. } = self.how;
        let most = self.requests.pool(kind).bytes.most();
        let full = match self.bytes.grow(bytes, if has_reserve { most.with_reserve() } else { most }) {
            Ok(()) => return Ok(()),
            Err(full) => full,
        };
        if !kind.is_about_no_org() && (self.requests.is_stalled)() {
            return Err(LedgerError::Unavailable.into());
        }
        Err(match full {
            Full::InAll => ApiError::Overloaded { scope: "requests", limit: most.in_all },
            Full::Each => ApiError::Overloaded { scope: "requests of one org", limit: most.each },
        })
    }
}

/// The body of a request, which has to find memory and to arrive in time.
struct Receiving {
    body: Body,
    /// The shape of a call's request, by which it is weighed.
    shape: Option<RequestShape>,
    /// The caller's credential. It may be revoked while the request is received.
    credential: Option<Arc<Credential>>,
    held: ReservedMemory,
    /// Set at the first wait. Resolves to the error once the request is too slow, or the server stops.
    late: Option<Pin<Box<dyn Future<Output = ApiError> + Send>>>,
    message: Message,
}

/// A message as far as it has arrived, held back until it is whole: a decoder would allocate the length that the first
/// bytes claim. It is kept in one piece, since a list of one-byte pieces takes a hundred times as much memory.
#[derive(Default)]
struct Message {
    /// The first piece as it arrived: usually the whole message.
    first: Bytes,
    /// The first piece and those after it, once there are several.
    rest: BytesMut,
    /// The frame that came after the message.
    trailers: Option<Frame<Bytes>>,
    /// The message was passed on, whole or as far as it will ever arrive.
    is_whole: bool,
}

impl Message {
    /// The length of gRPC's message prefix: a byte that says whether the message is compressed, and the message's length.
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

    fn take(&mut self) -> Bytes {
        self.is_whole = true;
        if self.rest.is_empty() { std::mem::take(&mut self.first) } else { std::mem::take(&mut self.rest).freeze() }
    }

    /// The length that the message claims, prefix included; `None` before the prefix is whole.
    /// [`ApiError::MessageTooLarge`] if it exceeds `limit`.
    fn length(&self, limit: usize) -> Result<Option<usize>, ApiError> {
        let Some(&[flag, a, b, c, d]) = self.data().first_chunk::<{ Self::PREFIX }>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        match (flag, length > limit) {
            (0, true) => Err(ApiError::MessageTooLarge { limit }),
            (0, false) => Ok(Some(Self::PREFIX + length)),
            // The decoder refuses a compressed or malformed message, without allocating its length.
            _ => Ok(Some(self.data().len())),
        }
    }
}

fn more_than_one() -> ApiError {
    ApiError::invalid("(message)", "must be exactly one message, with no bytes after it")
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
                // The message was cut short: the decoder reports that.
                Poll::Ready(None) if !self.message.is_whole => {
                    return Poll::Ready(Some(Ok(Frame::data(self.message.take()))));
                }
                Poll::Ready(None) if self.late.is_some() => {
                    return Poll::Ready(self.still_holds().err().map(|error| Err(error.into())));
                }
                Poll::Pending if self.held.how.kind == BodyKind::Dialogue && self.message.is_whole => {
                    return Poll::Pending;
                }
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
    /// Takes in bytes that have arrived. Returns the bytes to pass on, if there are any.
    fn receive(&mut self, data: Bytes) -> Result<Option<Bytes>, ApiError> {
        let How { kind, most, .. } = self.held.how;
        match (kind, self.message.is_whole) {
            // The reflection service bounds further messages, and holds one at a time.
            (BodyKind::Dialogue, true) => return Ok(Some(data)),
            (BodyKind::Call | BodyKind::AboutNoOrg, true) if data.is_empty() => return Ok(None),
            (BodyKind::Call | BodyKind::AboutNoOrg, true) => return Err(more_than_one()),
            (BodyKind::Plain, true) => {
                self.held.take(data.len())?;
                return Ok(Some(data));
            }
            (_, false) => {}
        }
        self.held.take(data.len())?;
        self.message.add(data);
        let has = self.message.data().len();
        let is_whole = match kind {
            // Plain HTTP is whole when its body ends. Its handler refuses a body that is too long.
            BodyKind::Plain => has > most,
            _ => match self.message.length(most)? {
                Some(length) if has > length && kind != BodyKind::Dialogue => return Err(more_than_one()),
                length => length.is_some_and(|length| has >= length),
            },
        };
        if !is_whole {
            return Ok(None);
        }
        self.still_holds()?;
        let message = self.message.take();
        if kind == BodyKind::Dialogue {
            // The dialogue stays open and its caller may be silent. It gives its memory back, and its time is no longer
            // bounded.
            self.held.bytes = self.held.requests.pool(kind).bytes.nothing(*self.held.bytes.key());
            self.late = None;
        }
        let weighed = self.shape.zip(message.get(Message::PREFIX..));
        if weighed.is_some_and(|(shape, message)| !shape.may_be_decoded(message)) {
            // The bound on the decoded size.
            return Err(ApiError::MessageTooLarge { limit: weight::MOST });
        }
        Ok(Some(message))
    }

    /// The refusal of a credential that was revoked while its request arrived.
    fn still_holds(&self) -> Result<(), ApiError> {
        let refusal = self.credential.as_ref().and_then(|credential| credential.refusal());
        refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    /// Fails with the error of a request that has not arrived in time, and otherwise waits.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { held, late, .. } = self;
        let late = late.get_or_insert_with(|| {
            let (requests, whose, how) = (Arc::clone(&held.requests), *held.bytes.key(), held.how);
            Box::pin(async move {
                tokio::select! {
                    () = requests.patience_ends(whose, how) => ApiError::RequestTooSlow,
                    // A request that has not arrived whole was not accepted.
                    () = requests.draining.cancelled() => LedgerError::Draining.into(),
                }
            })
        });
        late.as_mut().poll(context).map(|error| Some(Err(error.into())))
    }
}
