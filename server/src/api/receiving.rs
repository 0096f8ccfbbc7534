//! Requests on their way in: what they may hold until they are answered, and how long they may take to come whole.

use std::{
    collections::VecDeque,
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
use prost::bytes::Bytes;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use super::{limits::CallLimits, status::ApiError};
use crate::ledger::LedgerError;

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
    /// Bytes of requests.
    held: AtomicUsize,
    /// Requests that are waited for, about orgs and about none: neither hurries the other.
    awaited: [AtomicUsize; 2],
    draining: CancellationToken,
}

impl Requests {
    pub(super) fn new(limits: CallLimits, draining: CancellationToken) -> Arc<Self> {
        Arc::new(Self { limits, held: AtomicUsize::new(0), awaited: Default::default(), draining })
    }

    /// The request as it is to be read, and what it holds until that is dropped.
    pub(super) fn receive(self: &Arc<Self>, request: Request<Body>, kind: Kind) -> (Request<Body>, Arc<Held>) {
        let held = Arc::new(Held { requests: Arc::clone(self), bytes: AtomicUsize::new(0) });
        let (receiving, message) = (Arc::clone(&held), Message::new(kind == Kind::Plain));
        let request = request.map(|body| Body::new(Receiving { body, kind, held: receiving, late: None, message }));
        (request, held)
    }

    /// Waits for as long as a request may take to come whole: not long where others would find no room, or no place.
    async fn patience_ends(&self, kind: Kind) {
        let CallLimits { request_within, request_memory, calls_per_org, .. } = self.limits;
        let awaited = Awaited::new(&self.awaited[usize::from(kind.is_about_no_org())]);
        let began = Instant::now();
        loop {
            sleep_until((Instant::now() + WHERE_TIGHT).min(began + request_within)).await;
            let is_tight =
                self.held.load(Ordering::Relaxed) > request_memory / 2 || awaited.in_all() > calls_per_org / 4;
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
    bytes: AtomicUsize,
}

impl Held {
    /// True if there is room for more.
    fn take(&self, bytes: usize) -> bool {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.requests.held.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.requests.limits.request_memory
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.requests.held.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

/// A request's body, which has to come in time, and to find room.
struct Receiving {
    body: Body,
    kind: Kind,
    held: Arc<Held>,
    /// From the first wait on.
    late: Option<Pin<Box<dyn Future<Output = ApiError> + Send>>>,
    message: Message,
}

/// A gRPC message, held back until it is there: whoever decodes it makes room for all that its first bytes promise.
struct Message {
    frames: VecDeque<Frame<Bytes>>,
    /// Its first bytes: whether it is compressed, and its length.
    prefix: [u8; Message::PREFIX],
    received: usize,
    /// All of it is there, or will never be, or nobody wants it.
    is_whole: bool,
}

impl Message {
    /// The length of the first bytes.
    const PREFIX: usize = 5;

    fn new(is_whole: bool) -> Self {
        Self { frames: VecDeque::new(), prefix: [0; Self::PREFIX], received: 0, is_whole }
    }

    /// Learns from what has come whether that is all. An error if it promises more than it may.
    fn receive(&mut self, data: &[u8], limit: usize) -> Result<(), ApiError> {
        for (place, byte) in self.prefix.iter_mut().skip(self.received).zip(data) {
            *place = *byte;
        }
        self.received += data.len();
        if self.received >= Self::PREFIX && !self.is_whole {
            let [flag, length @ ..] = self.prefix;
            let length = u32::from_be_bytes(length) as usize;
            // What is no message is not too long a one: whoever decodes it says so, without making room.
            self.is_whole = flag != 0 || self.received >= Self::PREFIX + length;
            if flag == 0 && length > limit {
                return Err(ApiError::MessageTooLarge { limit });
            }
        }
        Ok(())
    }
}

impl http_body::Body for Receiving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.message.is_whole
                && let Some(frame) = self.message.frames.pop_front()
            {
                return Poll::Ready(Some(Ok(frame)));
            }
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref()
                        && let Err(error) = self.receive(data)
                    {
                        return Poll::Ready(Some(Err(error.into())));
                    }
                    if self.message.is_whole && self.message.frames.is_empty() {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    self.message.frames.push_back(frame);
                }
                // Cut short: that is for whoever decodes it to say.
                Poll::Ready(None) if !self.message.is_whole => self.message.is_whole = true,
                Poll::Pending if self.kind == Kind::Dialogue && self.message.is_whole => return Poll::Pending,
                Poll::Pending => return self.poll_late(context),
                ended => return ended,
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.message.frames.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.message.frames.is_empty() { self.body.size_hint() } else { SizeHint::default() }
    }
}

impl Receiving {
    fn receive(&mut self, data: &[u8]) -> Result<(), ApiError> {
        let CallLimits { request_memory, request_bytes, .. } = self.held.requests.limits;
        if self.kind == Kind::Dialogue && self.message.is_whole {
            // Whoever reads it bounds it, and holds one at a time.
            return Ok(());
        }
        let limit = if self.kind.is_about_no_org() { ABOUT_NO_ORG } else { request_bytes };
        self.message.receive(data, limit)?;
        match self.held.take(data.len()) {
            true => Ok(()),
            false => Err(ApiError::Overloaded { scope: "requests", limit: request_memory }),
        }
    }

    /// It has not come; but it had to by now?
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { held, late, kind, .. } = self;
        let late = late.get_or_insert_with(|| {
            let (requests, kind) = (Arc::clone(&held.requests), *kind);
            Box::pin(async move {
                tokio::select! {
                    () = requests.patience_ends(kind) => ApiError::RequestTooSlow,
                    // What has not come whole was not accepted.
                    () = requests.draining.cancelled() => LedgerError::Draining.into(),
                }
            })
        });
        late.as_mut().poll(context).map(|error| Some(Err(error.into())))
    }
}
