//! What calls may take: how many may be under way, of all orgs and of one, how often an org may call, and what requests may hold
//! while they are received and decided.
//!
//! Claims that wait and event streams have bounds of their own (`ledger/waiting.rs`, `ledger/places.rs`): they are not counted here,
//! but for how often they are called.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use http_body::{Frame, SizeHint};
use prost::bytes::Bytes;
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{
    call::is_grpc,
    caller::Caller,
    refusal::{Answer, refuse},
    status::ApiError,
};
use crate::{domain::id::OrgId, ledger::LedgerError};

/// What calls may take. Every bound has a flag of the same name.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// Calls under way, of all orgs.
    pub calls: usize,
    /// Calls under way of one org.
    pub calls_per_org: usize,
    /// Calls a second of one org, with as many at once as a second allows; `None`: as many as there come.
    pub rate_per_org: Option<u32>,
    /// Bytes of one request's message.
    pub request_bytes: usize,
    /// Bytes of requests that are being received or decided, in all.
    pub request_memory: usize,
    /// How long a request may take to come whole.
    pub request_within: Duration,
    /// How long a call may take, whatever its deadline says; event streams excepted.
    pub call_within: Duration,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self {
            calls: 16_384,
            calls_per_org: 8_192,
            rate_per_org: None,
            request_bytes: 4 << 20,
            request_memory: 64 << 20,
            request_within: Duration::from_secs(30),
            call_within: Duration::from_secs(120),
        }
    }
}

/// Orgs whose rates are remembered before those that do nothing are forgotten.
const ORGS: usize = 10_000;

/// How long a request may take to come whole where there is little room left for others.
const WHERE_TIGHT: Duration = Duration::from_secs(1);

/// Lets as many calls pass as may.
#[derive(Clone)]
pub(crate) struct LimitsLayer(Arc<Limiter>);

impl LimitsLayer {
    pub(crate) fn new(limits: CallLimits, draining: CancellationToken) -> Self {
        Self(Arc::new(Limiter {
            limits,
            state: Mutex::default(),
            held: AtomicUsize::new(0),
            awaited: AtomicUsize::new(0),
            draining,
        }))
    }
}

impl<S> Layer<S> for LimitsLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited { limiter: Arc::clone(&self.0), inner }
    }
}

/// See [`LimitsLayer`].
#[derive(Clone)]
pub(crate) struct Limited<S> {
    limiter: Arc<Limiter>,
    inner: S,
}

struct Limiter {
    limits: CallLimits,
    state: Mutex<State>,
    /// Bytes of requests.
    held: AtomicUsize,
    /// Requests that are waited for.
    awaited: AtomicUsize,
    draining: CancellationToken,
}

#[derive(Default)]
struct State {
    calls: usize,
    orgs: HashMap<OrgId, Org>,
}

/// What an org does.
struct Org {
    calls: usize,
    /// Calls that it may make at once, as of then.
    allowed: f64,
    as_of: Instant,
}

impl Limiter {
    /// Lets a call in, if there is room for it.
    fn enter(self: &Arc<Self>, org: OrgId, is_counted: bool) -> Result<Option<Entered>, ApiError> {
        let CallLimits { calls, calls_per_org, rate_per_org, .. } = self.limits;
        let mut state = self.state();
        let state = &mut *state;
        if is_counted && state.calls >= calls {
            return Err(ApiError::Overloaded { scope: "server", limit: calls });
        }
        if state.orgs.len() >= ORGS {
            let full = f64::from(rate_per_org.unwrap_or_default());
            state.orgs.retain(|_, org| org.calls > 0 || org.allowed + full * org.as_of.elapsed().as_secs_f64() < full);
        }
        let of_org = state.orgs.entry(org).or_insert_with(|| Org {
            calls: 0,
            allowed: f64::from(rate_per_org.unwrap_or_default()),
            as_of: Instant::now(),
        });
        if is_counted && of_org.calls >= calls_per_org {
            return Err(ApiError::Overloaded { scope: "org", limit: calls_per_org });
        }
        if let Some(rate) = rate_per_org {
            let (rate, now) = (f64::from(rate), Instant::now());
            of_org.allowed = (of_org.allowed + rate * (now - of_org.as_of).as_secs_f64()).min(rate);
            of_org.as_of = now;
            if of_org.allowed < 1.0 {
                let after = Duration::from_secs_f64((1.0 - of_org.allowed) / rate);
                return Err(ApiError::TooFast { rate: rate as u32, after });
            }
            of_org.allowed -= 1.0;
        }
        if !is_counted {
            return Ok(None);
        }
        state.calls += 1;
        of_org.calls += 1;
        Ok(Some(Entered { limiter: Arc::clone(self), org }))
    }

    /// Waits for as long as a request may take to come whole: not long where others would find no room, or no place.
    async fn patience_ends(self: Arc<Self>) {
        let CallLimits { request_within, request_memory, calls_per_org, .. } = self.limits;
        let _awaited = Awaited::new(&self);
        let began = tokio::time::Instant::now();
        loop {
            sleep_until((tokio::time::Instant::now() + WHERE_TIGHT).min(began + request_within)).await;
            let is_tight = self.held.load(Ordering::Relaxed) > request_memory / 2
                || self.awaited.load(Ordering::Relaxed) > calls_per_org / 4;
            if is_tight || began.elapsed() >= request_within {
                return;
            }
        }
    }

    /// The map stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is waited for.
struct Awaited<'a>(&'a Limiter);

impl<'a> Awaited<'a> {
    fn new(limiter: &'a Limiter) -> Self {
        limiter.awaited.fetch_add(1, Ordering::Relaxed);
        Self(limiter)
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.0.awaited.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A call that is under way.
struct Entered {
    limiter: Arc<Limiter>,
    org: OrgId,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.limiter.state();
        state.calls -= 1;
        let has_rate = self.limiter.limits.rate_per_org.is_some();
        if let Some(org) = state.orgs.get_mut(&self.org) {
            org.calls -= 1;
            if org.calls == 0 && !has_rate {
                state.orgs.remove(&self.org);
            }
        }
    }
}

impl<S> Service<Request<Body>> for Limited<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        // What is about no org costs nothing.
        let Some(org) = request.extensions().get::<Caller>().map(Caller::org) else {
            return self.inner.call(request);
        };
        let is_counted =
            !request.uri().path().ends_with("/StreamJobEvents") && !request.uri().path().ends_with("/ClaimJobs");
        let entered = match self.limiter.enter(org, is_counted) {
            Ok(entered) => entered,
            Err(error) => return refuse(error, request),
        };
        let held = Arc::new(Held { limiter: Arc::clone(&self.limiter), bytes: AtomicUsize::new(0) });
        let receiving = Arc::clone(&held);
        let is_whole = !is_grpc(request.headers());
        let answer =
            self.inner.call(request.map(|body| {
                Body::new(Receiving { body, held: receiving, late: None, message: Message::new(is_whole) })
            }));
        Box::pin(async move {
            let answer = answer.await;
            drop((entered, held));
            answer
        })
    }
}

/// What a request holds, until it is answered.
struct Held {
    limiter: Arc<Limiter>,
    bytes: AtomicUsize,
}

impl Held {
    /// True if there is room for more.
    fn take(&self, bytes: usize) -> bool {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.limiter.held.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.limiter.limits.request_memory
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.limiter.held.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

/// A request's body, which has to come in time, and to find room.
struct Receiving {
    body: Body,
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

    /// Learns from what has come whether that is all.
    fn receive(&mut self, data: &[u8], most: usize) {
        for (place, byte) in self.prefix.iter_mut().skip(self.received).zip(data) {
            *place = *byte;
        }
        self.received += data.len();
        if self.received >= Self::PREFIX {
            let [_, length @ ..] = self.prefix;
            let length = u32::from_be_bytes(length) as usize;
            // What is too long is refused for what it promises.
            self.is_whole |= length > most || self.received >= Self::PREFIX + length;
        }
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
                    let CallLimits { request_memory: limit, request_bytes, .. } = self.held.limiter.limits;
                    if let Some(data) = frame.data_ref() {
                        if !self.held.take(data.len()) {
                            return Poll::Ready(Some(Err(ApiError::Overloaded { scope: "requests", limit }.into())));
                        }
                        self.message.receive(data, request_bytes);
                    }
                    if self.message.is_whole && self.message.frames.is_empty() {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    self.message.frames.push_back(frame);
                }
                // Cut short: that is for whoever decodes it to say.
                Poll::Ready(None) if !self.message.is_whole => self.message.is_whole = true,
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
    /// It has not come; but it had to by now?
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { held, late, .. } = self;
        let late = late.get_or_insert_with(|| {
            let limiter = Arc::clone(&held.limiter);
            Box::pin(async move {
                tokio::select! {
                    () = Arc::clone(&limiter).patience_ends() => ApiError::RequestTooSlow,
                    // What has not come whole was not accepted.
                    () = limiter.draining.cancelled() => LedgerError::Draining.into(),
                }
            })
        });
        late.as_mut().poll(context).map(|error| Some(Err(error.into())))
    }
}
