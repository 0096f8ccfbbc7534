//! What calls may take: how many may be under way, of all orgs, of one and about none, and how often an org may call. What requests may
//! hold is in `receiving.rs`. Calls that follow on claims find room where creates find none, so that no job is lost to a flood of them.
//!
//! Claims that wait and event streams have bounds of their own (`ledger/waiting.rs`, `ledger/places.rs`): they are not counted here,
//! but for how often they are called.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::{Layer, Service};

use super::{
    answers::whole,
    call::{is_dialogue, is_grpc},
    caller::Caller,
    receiving::{ABOUT_NO_ORG, How, Kind, Requests, Whose},
    refusal::{Answer, refuse},
    status::ApiError,
};
use crate::{
    access::Credential,
    domain::id::OrgId,
    ledger::LedgerError,
    net::{GoesOn, Peer},
    shares::{Full, Most, Part, Shares, network},
    telemetry::Rarely,
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
    /// Bytes of one request's message, where it may have payloads or results.
    pub request_bytes: usize,
    /// Bytes of requests that are being received, in all.
    pub request_memory: usize,
    /// The same of one org, or for requests about none of one address.
    pub request_memory_per_org: usize,
    /// How long a request may take to come whole.
    pub request_within: Duration,
    /// How long a call may take, whatever its deadline says; event streams excepted.
    pub call_within: Duration,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self {
            calls: 16_384,
            calls_per_org: 16_384 / 3,
            rate_per_org: None,
            request_bytes: 4 << 20,
            request_memory: 64 << 20,
            request_memory_per_org: (64 << 20) / 3,
            request_within: Duration::from_secs(30),
            call_within: Duration::from_secs(120),
        }
    }
}

/// What bounds a call has: an extension of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sort {
    /// Those of most calls.
    Plain,
    /// A create, or many: with payloads.
    Create,
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
            Self::Plain | Self::Create | Self::Stream => 0,
            Self::Claim => 1,
            Self::Heartbeat => 2,
            Self::Report => 3,
            Self::Reports => 4,
            Self::Cancel => 5,
        }
    }

    /// True of calls whose requests have payloads or results.
    const fn is_large(self) -> bool {
        matches!(self, Self::Create | Self::Report | Self::Reports)
    }

    /// True of calls that find room where creates find none, as their commands do (`Command::is_vital`).
    const fn has_reserve(self) -> bool {
        match self {
            Self::Heartbeat | Self::Report | Self::Reports | Self::Cancel => true,
            Self::Plain | Self::Create | Self::Claim | Self::Stream => false,
        }
    }
}

/// What a request may take that has neither payloads nor results, in bytes: a thousand lease tokens are less.
const SMALL: usize = 256 << 10;

/// Tells whether the database is away.
pub(super) type Stalled = Arc<dyn Fn() -> bool + Send + Sync>;

/// Orgs whose rates are remembered before those that do nothing are forgotten.
const ORGS: usize = 10_000;

/// The call about no org that goes on for as long as its caller likes, but for those of reflection.
const WATCH: &str = "/Watch";

/// Dialogues of reflection that may be open: each may have an answer of a hundred kilobytes that its caller does not take.
const DIALOGUES: Most = Most { in_all: 300, each: 100 };

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
        let places = || Shares::new(Most { in_all: limits.calls, each: limits.calls_per_org });
        let (short, long) = (places(), places());
        Self(Arc::new(Limiter {
            limits,
            rates: Mutex::default(),
            calls: Shares::new(Most { in_all: limits.calls, each: limits.calls_per_org }),
            short,
            long,
            dialogues: Shares::new(DIALOGUES),
            requests: Requests::new(limits, draining, Arc::clone(&is_stalled)),
            is_stalled,
            limited: Rarely::default(),
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
    rates: Mutex<HashMap<OrgId, Rates>>,
    /// Calls under way.
    calls: Arc<Shares<OrgId>>,
    /// Places for what is about no org. Checks of the health are anybody's, and take none from streams, whose callers are known.
    short: Arc<Shares<Whose>>,
    long: Arc<Shares<Whose>>,
    dialogues: Arc<Shares<Whose>>,
    requests: Arc<Requests>,
    is_stalled: Stalled,
    /// Orgs that have come to a limit with calls of some sort.
    limited: Rarely<(OrgId, Sort)>,
}

/// How often an org may call.
struct Rates {
    /// Calls that it may make at once, as of then: of each sort as many as its rate.
    allowed: [f64; Sort::COUNT],
    as_of: Instant,
}

impl Limiter {
    /// Lets a call in, if there is room for it.
    fn enter(&self, org: OrgId, sort: Sort) -> Result<Option<Part<OrgId>>, ApiError> {
        // Claims that wait and streams have bounds of their own.
        let is_counted = !matches!(sort, Sort::Claim | Sort::Stream);
        let entered = is_counted.then(|| self.place(org, sort)).transpose()?;
        // One that found no place is none that was made.
        if let Some(rate) = self.limits.rate_per_org {
            self.allow(org, sort, rate)?;
        }
        Ok(entered)
    }

    /// A place among the calls under way.
    fn place(&self, org: OrgId, sort: Sort) -> Result<Part<OrgId>, ApiError> {
        let most = self.calls.most();
        let mut place = self.calls.nothing(org);
        let full = place.grow(1, if sort.has_reserve() { most.with_reserve() } else { most });
        full.map_err(|full| match full {
            Full::InAll => self.overloaded("server", most.in_all),
            Full::Each => self.overloaded("org", most.each),
        })?;
        Ok(place)
    }

    /// Counts a call against its org's rate.
    fn allow(&self, org: OrgId, sort: Sort, rate: u32) -> Result<(), ApiError> {
        let full = f64::from(rate);
        let mut rates = self.rates();
        if rates.len() >= ORGS {
            let is_full = |org: &Rates| {
                let more = full * org.as_of.elapsed().as_secs_f64();
                org.allowed.iter().all(|allowed| allowed + more >= full)
            };
            rates.retain(|_, org| !is_full(org));
        }
        let now = Instant::now();
        let of_org = rates.entry(org).or_insert_with(|| Rates { allowed: [full; Sort::COUNT], as_of: now });
        let more = full * (now - of_org.as_of).as_secs_f64();
        of_org.allowed = of_org.allowed.map(|allowed| (allowed + more).min(full));
        of_org.as_of = now;
        let allowed = &mut of_org.allowed[sort.bucket()];
        if *allowed < 1.0 {
            return Err(ApiError::TooFast { rate, after: Duration::from_secs_f64((1.0 - *allowed) / full) });
        }
        *allowed -= 1.0;
        Ok(())
    }

    /// Takes note of a call that was refused for a limit.
    fn note(&self, org: OrgId, sort: Sort, limit: &str) {
        if let Some(times) = self.limited.note((org, sort)) {
            tracing::info!(org_id = %org, calls = ?sort, times, limit, "an org has come to a limit");
        }
    }

    /// Why a call finds no room: too many are under way, or none ends because the database is away.
    fn overloaded(&self, scope: &'static str, limit: usize) -> ApiError {
        if (self.is_stalled)() { LedgerError::Unavailable.into() } else { ApiError::Overloaded { scope, limit } }
    }

    /// The map stays whole whatever panics beside it.
    fn rates(&self) -> MutexGuard<'_, HashMap<OrgId, Rates>> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
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
            Err(error) => {
                match error {
                    ApiError::TooFast { .. } => self.limiter.note(org, sort, "--max-rate-per-org"),
                    ApiError::Overloaded { scope: "org", .. } => self.limiter.note(org, sort, "--max-calls-per-org"),
                    _ => {}
                }
                return refuse(error, request);
            }
        };
        let goes_on = sort == Sort::Stream;
        let kind = if is_grpc { Kind::Call } else { Kind::Plain };
        let most = if sort.is_large() || !is_grpc { self.limiter.limits.request_bytes } else { SMALL };
        let most = most.min(self.limiter.limits.request_bytes);
        let how = How { kind, most, has_reserve: sort.has_reserve() };
        let request = self.limiter.requests.receive(request, Whose::Org(org), how);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let answer = if goes_on { on(answer) } else { whole(answer, Some(org)).await };
            drop(entered);
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
        let (places, is_long) = match kind {
            Kind::Dialogue => (&self.limiter.dialogues, true),
            _ if path.ends_with(WATCH) => (&self.limiter.long, true),
            _ => (&self.limiter.short, false),
        };
        let peer = request.extensions().get::<Peer>().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.address.ip());
        let whose = Whose::Address(network(peer));
        // Whoever is known has a part of its org's: those behind one proxy don't share theirs.
        let org = request.extensions().get::<Arc<Credential>>().and_then(|credential| credential.principal.org);
        let Ok(place) = places.take(org.map_or(whose, Whose::Org), 1) else {
            return refuse(ApiError::Overloaded { scope: "server", limit: places.most().in_all }, request);
        };
        let how = How { kind, most: ABOUT_NO_ORG, has_reserve: false };
        let request = self.limiter.requests.receive(request, whose, how);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(if is_long { on(answer.map(|body| until_through(body, place))) } else { whole(answer, None).await })
        })
    }
}

fn until_through(body: Body, place: Part<Whose>) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _place = &place;
        frame
    }))
}
