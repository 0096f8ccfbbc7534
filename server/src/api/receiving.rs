//! Requests on their way in: what they may hold until they are answered, and how long they may take to come whole.

use std::{
    future::Future,
    net::IpAddr,
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
    domain::id::OrgId,
    ledger::LedgerError,
    shares::{Full, Most, Part, Shares},
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

/// How a request is received.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    pub(super) kind: Kind,
    /// What its message may have, in bytes.
    pub(super) most: usize,
    pub(super) has_reserve: bool,
}

/// Whose part of the room a request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Whose {
    Org(OrgId),
    /// Somebody's at this address: it is about no org.
    Address(IpAddr),
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

/// What some requests take, until they are decoded.
struct Pool {
    bytes: Arc<Shares<Whose>>,
    /// Requests that are waited for.
    awaited: Arc<Shares<Whose>>,
}

impl Pool {
    fn new(bytes: Most) -> Self {
        let awaited = Most { in_all: usize::MAX, each: usize::MAX };
        Self { bytes: Shares::new(bytes), awaited: Shares::new(awaited) }
    }
}

impl Requests {
    pub(super) fn new(limits: CallLimits, draining: CancellationToken, is_stalled: Stalled) -> Arc<Self> {
        let most = Most { in_all: limits.request_memory, each: limits.request_memory_per_org };
        let quarter = Most { in_all: most.in_all / 4, each: most.each / 4 };
        let (about_orgs, about_none) = (Pool::new(most), Pool::new(quarter));
        Arc::new(Self { limits, about_orgs, about_none, draining, is_stalled })
    }

    fn pool(&self, kind: Kind) -> &Pool {
        if kind.is_about_no_org() { &self.about_none } else { &self.about_orgs }
    }

    /// The request as it is to be read. What it holds is given back once it is decoded: with its body, which nobody keeps longer. With a
    /// reserve there is a quarter more room for it, and others don't hurry it before they take of that.
    pub(super) fn receive(self: &Arc<Self>, request: Request<Body>, whose: Whose, how: How) -> Request<Body> {
        let bytes = self.pool(how.kind).bytes.nothing(whose);
        let held = Held { requests: Arc::clone(self), how, bytes };
        let shape = (how.kind == Kind::Call).then(|| RequestShape::of(request.uri().path())).flatten();
        let credential = request.extensions().get::<Arc<Credential>>().cloned();
        request
            .map(|body| Body::new(Receiving { body, shape, credential, held, late: None, message: Message::default() }))
    }

    /// Waits for as long as a request may take to come whole: not long where others would find no room, or no place.
    async fn patience_ends(&self, whose: Whose, How { kind, has_reserve, .. }: How) {
        let CallLimits { request_within, calls, calls_per_org, .. } = self.limits;
        let Pool { bytes, awaited } = self.pool(kind);
        // There is no bound on how many are waited for but the times.
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

/// What a request holds, until it is decoded.
struct Held {
    requests: Arc<Requests>,
    how: How,
    bytes: Part<Whose>,
}

impl Held {
    /// Room for more, if there is any.
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

/// A request's body, which has to come in time, and to find room.
struct Receiving {
    body: Body,
    /// What a call's is made of.
    shape: Option<RequestShape>,
    /// Whose it is. It may end while the request is waited for.
    credential: Option<Arc<Credential>>,
    held: Held,
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
                Poll::Pending if self.held.how.kind == Kind::Dialogue && self.message.is_whole => return Poll::Pending,
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
        let How { kind, most, .. } = self.held.how;
        match (kind, self.message.is_whole) {
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
        let is_whole = match kind {
            // It is whole when it ends; what is too long is refused by whoever reads it.
            Kind::Plain => has > most,
            _ => match self.message.length(most)? {
                Some(length) if has > length && kind != Kind::Dialogue => return Err(more_than_one()),
                length => length.is_some_and(|length| has >= length),
            },
        };
        if !is_whole {
            return Ok(None);
        }
        self.still_holds()?;
        let message = self.message.take();
        if kind == Kind::Dialogue {
            // It goes on, and its caller may be silent: who reads it holds one message at a time.
            self.held.bytes = self.held.requests.pool(kind).bytes.nothing(*self.held.bytes.key());
            self.late = None;
        }
        let weighed = self.shape.zip(message.get(Message::PREFIX..));
        if weighed.is_some_and(|(shape, message)| !shape.may_be_decoded(message)) {
            // Once it is decoded.
            return Err(ApiError::MessageTooLarge { limit: weight::MOST });
        }
        Ok(Some(message))
    }

    /// An error if whose it is was revoked while it came.
    fn still_holds(&self) -> Result<(), ApiError> {
        let refusal = self.credential.as_ref().and_then(|credential| credential.refusal());
        refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    /// It has not come; but it had to by now?
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { held, late, .. } = self;
        let late = late.get_or_insert_with(|| {
            let (requests, whose, how) = (Arc::clone(&held.requests), *held.bytes.key(), held.how);
            Box::pin(async move {
                tokio::select! {
                    () = requests.patience_ends(whose, how) => ApiError::RequestTooSlow,
                    // What has not come whole was not accepted.
                    () = requests.draining.cancelled() => LedgerError::Draining.into(),
                }
            })
        });
        late.as_mut().poll(context).map(|error| Some(Err(error.into())))
    }
}
