//! What calls may take: how many may be under way, of all orgs, of one and about none, and how often an org may call. What requests may
//! hold is in `receiving.rs`. Calls that follow on claims find room where creates find none, so that no job is lost to a flood of them.
//!
//! Claims that wait and event streams have bounds of their own (`ledger/waiting.rs`, `ledger/places.rs`): they are not counted here,
//! but for how often they are called.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::{Layer, Service};

use super::{
    answers::whole,
    call::{is_dialogue, is_grpc},
    caller::Caller,
    receiving::{Kind, Requests},
    refusal::{Answer, refuse},
    status::ApiError,
};
use crate::{
    domain::id::OrgId,
    ledger::{LedgerError, with_reserve},
    net::GoesOn,
};

/// What calls may take. Every bound has a flag of the same name.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// Calls under way, of all orgs; as many again that are about none: checks of the health, and streams of health and reflection.
    pub calls: usize,
    /// Calls under way of one org.
    pub calls_per_org: usize,
    /// Calls a second of one org, with as many at once as a second allows; as many again of claims, of heartbeats, of reports, of batches of
    /// reports and of cancellations, so that none of these waits for another. `None`: as many as there come.
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

/// What bounds a call has: an extension of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    /// Those of most calls.
    Plain,
    /// A claim, which may wait.
    Claim,
    /// A heartbeat: it keeps jobs alive.
    Heartbeat,
    /// A report.
    Report,
    /// Many reports, as workers send the outcomes of their jobs.
    Reports,
    /// A cancellation: it may end a running job, and is a producer's.
    Cancel,
    /// A stream of events.
    Stream,
}

impl Sort {
    /// How many rates an org has.
    const COUNT: usize = 6;

    /// Which of an org's rates it counts against.
    const fn bucket(self) -> usize {
        match self {
            Self::Plain | Self::Stream => 0,
            Self::Claim => 1,
            Self::Heartbeat => 2,
            Self::Report => 3,
            Self::Reports => 4,
            Self::Cancel => 5,
        }
    }

    /// True of calls that find room where creates find none, as their commands do (`Command::is_vital`).
    const fn has_reserve(self) -> bool {
        match self {
            Self::Heartbeat | Self::Report | Self::Reports | Self::Cancel => true,
            Self::Plain | Self::Claim | Self::Stream => false,
        }
    }
}

/// Tells whether the database is away.
pub(super) type Stalled = Arc<dyn Fn() -> bool + Send + Sync>;

/// Orgs whose rates are remembered before those that do nothing are forgotten.
const ORGS: usize = 10_000;

/// The call about no org that goes on for as long as its caller likes, but for those of reflection.
const WATCH: &str = "/Watch";

/// Lets as many calls pass as may.
#[derive(Clone)]
pub(crate) struct LimitsLayer(Arc<Limiter>);

impl LimitsLayer {
    /// `is_stalled` tells whether the database is away: who finds no room then is told so.
    pub(crate) fn new(
        limits: CallLimits,
        draining: CancellationToken,
        is_stalled: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        let is_stalled: Stalled = Arc::new(is_stalled);
        let places = || Arc::new(Semaphore::new(limits.calls));
        let (short, long) = (places(), places());
        Self(Arc::new(Limiter {
            limits,
            state: Mutex::default(),
            short,
            long,
            requests: Requests::new(limits, draining, Arc::clone(&is_stalled)),
            is_stalled,
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
    /// Places for what is about no org. Checks of the health are anybody's, and take none from streams, whose callers are known.
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
    requests: Arc<Requests>,
    is_stalled: Stalled,
}

#[derive(Default)]
struct State {
    calls: usize,
    orgs: HashMap<OrgId, Org>,
}

/// What an org does.
struct Org {
    calls: usize,
    /// Calls that it may make at once, as of then: of each sort as many as its rate.
    allowed: [f64; Sort::COUNT],
    as_of: Instant,
}

impl Limiter {
    /// Lets a call in, if there is room for it.
    fn enter(self: &Arc<Self>, org: OrgId, sort: Sort) -> Result<Option<Entered>, ApiError> {
        let CallLimits { calls, calls_per_org, rate_per_org, .. } = self.limits;
        // Claims that wait and streams have bounds of their own.
        let is_counted = !matches!(sort, Sort::Claim | Sort::Stream);
        let most = |limit| if sort.has_reserve() { with_reserve(limit) } else { limit };
        let mut state = self.state();
        let state = &mut *state;
        if is_counted && state.calls >= most(calls) {
            return Err(self.overloaded("server", calls));
        }
        if state.orgs.len() >= ORGS {
            let full = f64::from(rate_per_org.unwrap_or_default());
            let is_full = |org: &Org| {
                let more = full * org.as_of.elapsed().as_secs_f64();
                org.allowed.iter().all(|allowed| allowed + more >= full)
            };
            state.orgs.retain(|_, org| org.calls > 0 || !is_full(org));
        }
        let of_org = state.orgs.entry(org).or_insert_with(|| Org {
            calls: 0,
            allowed: [f64::from(rate_per_org.unwrap_or_default()); Sort::COUNT],
            as_of: Instant::now(),
        });
        if is_counted && of_org.calls >= most(calls_per_org) {
            return Err(self.overloaded("org", calls_per_org));
        }
        if let Some(rate) = rate_per_org {
            let (rate, now) = (f64::from(rate), Instant::now());
            let more = rate * (now - of_org.as_of).as_secs_f64();
            of_org.allowed = of_org.allowed.map(|allowed| (allowed + more).min(rate));
            of_org.as_of = now;
            let allowed = &mut of_org.allowed[sort.bucket()];
            if *allowed < 1.0 {
                let after = Duration::from_secs_f64((1.0 - *allowed) / rate);
                return Err(ApiError::TooFast { rate: rate as u32, after });
            }
            *allowed -= 1.0;
        }
        if !is_counted {
            return Ok(None);
        }
        state.calls += 1;
        of_org.calls += 1;
        Ok(Some(Entered { limiter: Arc::clone(self), org }))
    }

    /// Why a call finds no room: too many are under way, or none ends because the database is away.
    fn overloaded(&self, scope: &'static str, limit: usize) -> ApiError {
        if (self.is_stalled)() { LedgerError::Unavailable.into() } else { ApiError::Overloaded { scope, limit } }
    }

    /// The map stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let is_grpc = is_grpc(request.headers());
        let Some(org) = request.extensions().get::<Caller>().map(Caller::org) else {
            // Probes by plain HTTP have no request to speak of, and are answered whatever else goes on.
            return if is_grpc { self.about_no_org(request) } else { self.inner.call(request) };
        };
        let sort = request.extensions().get::<Sort>().copied().unwrap_or(Sort::Plain);
        let entered = match self.limiter.enter(org, sort) {
            Ok(entered) => entered,
            Err(error) => return refuse(error, request),
        };
        let goes_on = sort == Sort::Stream;
        let kind = if is_grpc { Kind::Call } else { Kind::Plain };
        let (request, held) = self.limiter.requests.receive(request, kind, sort.has_reserve());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let answer = if goes_on { on(answer) } else { whole(answer).await };
            drop((entered, held));
            Ok(answer)
        })
    }
}

/// An answer that goes on, with bounds of its own.
fn on(mut answer: Response<Body>) -> Response<Body> {
    answer.extensions_mut().insert(GoesOn);
    answer
}

impl<S> Limited<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer>,
{
    /// Passes on a call about no org. One that goes on holds its place until its answer is through.
    fn about_no_org(&mut self, request: Request<Body>) -> Answer {
        let path = request.uri().path();
        let kind = if is_dialogue(path) { Kind::Dialogue } else { Kind::AboutNoOrg };
        let is_long = kind == Kind::Dialogue || path.ends_with(WATCH);
        let places = if is_long { &self.limiter.long } else { &self.limiter.short };
        let Ok(place) = Arc::clone(places).try_acquire_owned() else {
            return refuse(ApiError::Overloaded { scope: "server", limit: self.limiter.limits.calls }, request);
        };
        let (request, held) = self.limiter.requests.receive(request, kind, false);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            drop(held);
            Ok(if is_long { on(answer.map(|body| until_through(body, place))) } else { whole(answer).await })
        })
    }
}

fn until_through(body: Body, place: OwnedSemaphorePermit) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _place = &place;
        frame
    }))
}
