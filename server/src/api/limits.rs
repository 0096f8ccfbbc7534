//! Bounds calls: how many may be under way in all, of one org and about none, and how often an org may call. The memory
//! of requests is bounded in `request_body.rs`. Heartbeats, reports and cancellations have a reserve, so a flood of
//! creates costs no job.
//!
//! Waiting claims and event streams have bounds of their own (`ledger/claim_waiters.rs`, `ledger/stream_slots.rs`). Here only their
//! rate counts.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::Ipv4Addr,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{
    buffered_response::whole,
    caller::Caller,
    deadline::is_grpc,
    processor_shares::ProcessorShares,
    reject::{LayerFuture, refuse},
    request_body::{ABOUT_NO_ORG, BodyKind, How, Requests},
    rpc::{CallClass, Rpc},
    status::{ApiError, plain},
};
use crate::{
    access::Credential,
    domain::id::OrgId,
    ledger::LedgerError,
    net::{Peer, StreamingResponse},
    scheduler::Scheduler,
    shares::{Full, Most, Part, Shares, Whose, network},
    telemetry::RateLimitedLog,
};

/// Bounds on calls. Each has a command-line option.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// Calls under way, of all orgs. As many again may be health checks, and as many again streams of health.
    pub calls: usize,
    /// Calls under way of one org.
    pub calls_per_org: usize,
    /// Calls a second of one org, which is also the largest burst. Claims, heartbeats, reports, batches of reports and
    /// cancellations each have the same rate of their own, so that none waits for another. `None`: unbounded.
    pub rate_per_org: Option<u32>,
    /// Bytes of one request's message, if it may have payloads or results.
    pub request_bytes: usize,
    /// Bytes of all requests that are being received.
    pub request_memory: usize,
    /// Bytes of requests that are being received of one org, or of one address where they are about none.
    pub request_memory_per_org: usize,
    /// How long a request may take to arrive whole.
    pub request_within: Duration,
    /// How long a call may take, whatever its deadline. Event streams are exempt.
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

/// Bytes of a request without payloads and results. A thousand lease tokens take less.
const SMALL: usize = 256 << 10;

/// Tells whether the database does not answer.
pub(super) type Stalled = Arc<dyn Fn() -> bool + Send + Sync>;

/// Orgs whose rates are kept. Beyond that, orgs that may make a full burst again are dropped.
const ORGS: usize = 10_000;

/// Open reflection streams. Each may hold an answer of 100 kB that its caller does not take.
const DIALOGUES: Most = Most { in_all: 300, each: 100 };

/// Applies [`CallLimits`].
#[derive(Clone)]
pub(crate) struct LimitsLayer(Arc<Limiter>);

impl LimitsLayer {
    /// While `is_stalled`, calls that find no room get UNAVAILABLE. `tell_slowed` gets the orgs that are
    /// slowed.
    pub(crate) fn new(
        limits: CallLimits,
        scheduler: Arc<Scheduler>,
        draining: CancellationToken,
        is_stalled: impl Fn() -> bool + Send + Sync + 'static,
        tell_slowed: impl Fn(Vec<OrgId>) + Send + 'static,
    ) -> Self {
        let is_stalled: Stalled = Arc::new(is_stalled);
        let most = Most { in_all: limits.calls, each: limits.calls_per_org };
        Self(Arc::new(Limiter {
            limits,
            rates: Mutex::default(),
            calls: Shares::new(most),
            short: Shares::new(most),
            long: Shares::new(most),
            dialogues: Shares::new(DIALOGUES),
            processors: ProcessorShares::start(scheduler, tell_slowed),
            refused: Shares::new(most),
            requests: Requests::new(limits, draining, Arc::clone(&is_stalled)),
            is_stalled,
            limited: RateLimitedLog::default(),
        }))
    }
}

impl<S> Layer<S> for LimitsLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited { limiter: Arc::clone(&self.0), inner }
    }
}

#[derive(Clone)]
pub(crate) struct Limited<S> {
    limiter: Arc<Limiter>,
    inner: S,
}

struct Limiter {
    limits: CallLimits,
    rates: Mutex<HashMap<OrgId, Rates>>,
    calls: Arc<Shares<OrgId>>,
    /// Slots of calls about no org. Anybody may make health checks, so they do not take slots from Watch streams, whose
    /// callers are known.
    short: Arc<Shares<Whose>>,
    long: Arc<Shares<Whose>>,
    dialogues: Arc<Shares<Whose>>,
    requests: Arc<Requests>,
    processors: Arc<ProcessorShares>,
    /// Slots of calls that are refused, while that waits since their org is slowed. A call without one is refused at once.
    refused: Arc<Shares<OrgId>>,
    is_stalled: Stalled,
    /// Limits that were reached, by org and class of call, for the log.
    limited: RateLimitedLog<(OrgId, CallClass)>,
}

/// The token buckets of one org.
struct Rates {
    /// Calls that the org may make at once, as of `as_of`: for each rate at most its calls of a second.
    allowed: [f64; CallClass::RATES],
    as_of: Instant,
}

impl Limiter {
    /// Admits a call if there is a slot for it and its org's rate allows it.
    fn enter(&self, org: OrgId, class: CallClass) -> Result<Option<Part<OrgId>>, ApiError> {
        // Waiting claims and streams have bounds of their own.
        let is_counted = !matches!(class, CallClass::Claim | CallClass::Stream);
        let entered = is_counted.then(|| self.place(org, class)).transpose()?;
        // Last, since a call that finds no slot does not count against the rate.
        if let Some(rate) = self.limits.rate_per_org {
            self.allow(org, class, rate)?;
        }
        Ok(entered)
    }

    fn place(&self, org: OrgId, class: CallClass) -> Result<Part<OrgId>, ApiError> {
        let most = self.calls.most();
        let mut place = self.calls.nothing(org);
        let full = place.grow(1, if class.has_reserve() { most.with_reserve() } else { most });
        full.map_err(|full| match full {
            Full::InAll => self.overloaded("server", most.in_all),
            Full::Each => self.overloaded("org", most.each),
        })?;
        Ok(place)
    }

    fn allow(&self, org: OrgId, class: CallClass, rate: u32) -> Result<(), ApiError> {
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
        let of_org = rates.entry(org).or_insert_with(|| Rates { allowed: [full; CallClass::RATES], as_of: now });
        let more = full * (now - of_org.as_of).as_secs_f64();
        of_org.allowed = of_org.allowed.map(|allowed| (allowed + more).min(full));
        of_org.as_of = now;
        let allowed = &mut of_org.allowed[class.rate()];
        if *allowed < 1.0 {
            return Err(ApiError::TooFast { rate, after: Duration::from_secs_f64((1.0 - *allowed) / full) });
        }
        *allowed -= 1.0;
        Ok(())
    }

    /// Logs, at most once a minute for an org and class, that a call was refused because of a limit.
    fn note(&self, org: OrgId, class: CallClass, limit: &str) {
        if let Some(times) = self.limited.note((org, class)) {
            tracing::info!(org_id = %org, calls = ?class, times, limit, "an org reached a limit; refusing its calls of this kind");
        }
    }

    /// Why a call finds no slot: too many are under way, or none ends because the database is away.
    fn overloaded(&self, scope: &'static str, limit: usize) -> ApiError {
        if (self.is_stalled)() { LedgerError::Unavailable.into() } else { ApiError::Overloaded { scope, limit } }
    }

    fn rates(&self) -> MutexGuard<'_, HashMap<OrgId, Rates>> {
        self.rates.lock()
    }
}

impl<S> Service<Request<Body>> for Limited<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = LayerFuture>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = LayerFuture;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> LayerFuture {
        let is_grpc = is_grpc(request.headers());
        let Some(org) = request.extensions().get::<Caller>().map(Caller::org) else {
            // Probes by plain HTTP have no body to speak of, and are answered however busy the server is.
            return if is_grpc { self.about_no_org(request) } else { self.inner.call(request) };
        };
        let class = request.extensions().get::<Rpc>().map_or(CallClass::Other, |rpc| rpc.class());
        let entered = match self.limiter.enter(org, class) {
            Ok(entered) => entered,
            Err(error) => {
                match error {
                    ApiError::TooFast { .. } => self.limiter.note(org, class, "--max-rate-per-org"),
                    ApiError::Overloaded { scope: "org", .. } => self.limiter.note(org, class, "--max-calls-per-org"),
                    _ => {}
                }
                return self.refuse_in_turn(org, class, error, request);
            }
        };
        let goes_on = class == CallClass::Stream;
        let kind = if is_grpc { BodyKind::Call } else { BodyKind::Plain };
        let most = if class.is_large() || !is_grpc { self.limiter.limits.request_bytes } else { SMALL };
        let most = most.min(self.limiter.limits.request_bytes);
        let how = How { kind, most, has_reserve: class.has_reserve() };
        let request = self.limiter.requests.receive(request, Whose::Org(org), how);
        let start = self.limiter.processors.begin(org, class.has_reserve());
        // Plain HTTP may have no body, and malformed calls have none.
        let has_body = is_grpc && !request.body().is_end_stream();
        let credential = request.extensions().get::<Arc<Credential>>().cloned();
        let request = if has_body { request.map(|body| start.receive(body, credential)) } else { request };
        let answer = self.limiter.processors.measure(org, class.has_reserve(), self.inner.call(request));
        Box::pin(async move {
            if !has_body && let Err(error) = start.wait().await {
                return Ok(if is_grpc { Status::from(error).into_http() } else { plain(error) });
            }
            let answer = answer.await?;
            let answer = if goes_on { on(answer) } else { whole(answer, Some(org)).await };
            drop(entered);
            Ok(answer)
        })
    }
}

/// Marks an answer that is a stream: it has bounds of its own, and is not counted as untaken.
fn on(mut answer: Response<Body>) -> Response<Body> {
    answer.extensions_mut().insert(StreamingResponse);
    answer
}

impl<S> Limited<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = LayerFuture>,
{
    /// Refuses a call about an org. That takes processor time, too: it waits as the org's calls do.
    fn refuse_in_turn(&self, org: OrgId, class: CallClass, error: ApiError, request: Request<Body>) -> LayerFuture {
        let answer = refuse(error, request);
        let Ok(place) = self.limiter.refused.take(org, 1) else { return answer };
        let start = self.limiter.processors.begin(org, class.has_reserve());
        Box::pin(async move {
            let _place = place;
            let answer = answer.await;
            let _ = start.wait().await;
            answer
        })
    }

    /// Admits a call about no org. A stream keeps its slot until it ends.
    fn about_no_org(&mut self, request: Request<Body>) -> LayerFuture {
        let rpc = request.extensions().get::<Rpc>().copied();
        let kind = if rpc == Some(Rpc::Reflection) { BodyKind::Dialogue } else { BodyKind::AboutNoOrg };
        let (places, is_long) = match kind {
            BodyKind::Dialogue => (&self.limiter.dialogues, true),
            _ if rpc == Some(Rpc::HealthWatch) => (&self.limiter.long, true),
            _ => (&self.limiter.short, false),
        };
        let peer = request.extensions().get::<Peer>().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.address.ip());
        let whose = Whose::Address(network(peer));
        // A caller with a credential takes the slots of its org, so that callers behind one proxy do not share theirs.
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
