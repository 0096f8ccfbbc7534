//! Keeps one org's calls from taking the processors from all others. Which step is next is fair already (`scheduler`). But a server
//! that is always busy is interrupted by the system whenever other processes go on, such as a database on the same machine.
//!
//! While steps wait long and several orgs call, the org whose calls take most processor time is slowed: its requests are taken
//! up no faster than a rate, which falls until steps are prompt again, and rises as long as they are. So the org gets what the
//! others leave. An org that calls alone is never slowed.
//!
//! Only the calls' own steps are measured: not the bodies of event streams, nor what is done before it is known who calls. If
//! these keep the threads busy, nobody is slowed.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Response;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use prost::bytes::Bytes;
use tokio::{
    runtime::{Handle, RuntimeMetrics},
    time::{Instant, Sleep, sleep, sleep_until},
};
use tonic::{Status, body::Body};

use super::{reject::LayerFuture, status::ApiError};
use crate::{access::Credential, domain::id::OrgId, scheduler::Scheduler, telemetry::RateLimitedLog};

/// How long it is measured before rates change.
const ROUND: Duration = Duration::from_millis(100);
/// Steps that wait longer than this on average wait long. An idle server's wait some 0.02 ms; those of one whose processors others
/// keep busy 0.5 ms.
const LONG: Duration = Duration::from_millis(1);
/// How a rate changes after a round.
const FALL: f64 = 0.7;
const RISE: f64 = 1.05;
/// The part of the processors that an org's calls may always take.
const LEAST: f64 = 1.0 / 8.0;
/// The processor time of a call besides that of its future: its frames and its task.
const OVERHEAD: Duration = Duration::from_micros(20);
/// The longest wait of a request. One that would wait longer is refused then.
const LONGEST: Duration = Duration::from_secs(2);
/// A wait this short is none: timers are no more exact.
const SHORT: Duration = Duration::from_millis(1);

/// Orgs count as calling for this long after their last call.
const CALLED_OF_LATE: Duration = Duration::from_secs(1);
/// Steps have to wait long in this many rounds before an org is slowed: a single stall may have any cause.
const ROUNDS: u32 = 2;
/// An org is slowed if its calls take at least this part of the time for which the server's threads are busy.
const CAUSES: f64 = 1.0 / 3.0;

/// When requests may be taken up.
pub(super) struct ProcessorShares {
    orgs: Mutex<Orgs>,
    slowed: RateLimitedLog<OrgId>,
}

struct Orgs {
    processors: f64,
    /// The orgs that called lately, and those that are slowed.
    usage: HashMap<OrgId, Usage>,
    /// True if several orgs called lately.
    are_several: bool,
    /// Rounds in a row in which steps waited long.
    long: u32,
}

/// What an org's calls use.
#[derive(Default)]
struct Usage {
    /// Other calls; and heartbeats, reports and cancellations, which neither wait behind the others nor are refused.
    tracks: [Track; 2],
    called_at: Option<Instant>,
    /// Processor time that the calls of a track may take in a time, while the org is slowed: 1.5 is one and a half processors.
    slowed: Option<f64>,
}

#[derive(Clone, Copy, Default)]
struct Track {
    /// Calls that began in this round.
    begun: u32,
    /// Calls that ended in this round, and their processor time without [`OVERHEAD`].
    ended: u32,
    used: Duration,
    /// Mean processor time of a call in the last round in which any ended.
    per_call: Duration,
    /// When the next request may be taken up.
    next: Option<Instant>,
}

/// When a request is taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Now,
    At(Instant),
    /// Not at all: refused at this time, so that who repeats it at once waits, too.
    RefusedAt(Instant),
}

impl Start {
    /// Waits for it.
    ///
    /// # Errors
    ///
    /// [`ApiError::Slowed`] if the request is refused.
    pub(super) async fn wait(self) -> Result<(), ApiError> {
        match self {
            Self::Now => Ok(()),
            Self::At(at) => {
                sleep_until(at).await;
                Ok(())
            }
            Self::RefusedAt(at) => {
                sleep_until(at).await;
                Err(ApiError::Slowed)
            }
        }
    }

    /// A request's body whose message is passed on only then. The body passes its message on in one frame, so that it is received,
    /// and its memory counted, while it waits.
    pub(super) fn receive(self, body: Body, credential: Option<Arc<Credential>>) -> Body {
        let until = match self {
            Self::Now => return body,
            Self::At(at) | Self::RefusedAt(at) => Box::pin(sleep_until(at)),
        };
        let is_refused = matches!(self, Self::RefusedAt(_));
        Body::new(Waiting { body, credential, until, is_refused, state: State::Receives })
    }
}

impl ProcessorShares {
    /// Shares the processors of the runtime in which this is called, for as long as somebody has what it returns. Tells after each
    /// round which orgs are slowed.
    pub(super) fn start(scheduler: Arc<Scheduler>, tell: impl Fn(Vec<OrgId>) + Send + 'static) -> Arc<Self> {
        let processors = Handle::current().metrics().num_workers() as f64;
        let orgs = Mutex::new(Orgs { processors, usage: HashMap::new(), are_several: false, long: 0 });
        let shares = Arc::new(Self { orgs, slowed: RateLimitedLog::default() });
        tokio::spawn(watch(Arc::downgrade(&shares), scheduler, tell));
        shares
    }

    /// When the org's next request is taken up.
    pub(super) fn begin(&self, org: OrgId, is_vital: bool) -> Start {
        self.orgs.lock().begin(org, is_vital, Instant::now())
    }

    /// Measures the processor time of a call.
    pub(super) fn measure(self: &Arc<Self>, org: OrgId, is_vital: bool, call: LayerFuture) -> Measured {
        Measured { shares: Arc::clone(self), org, is_vital, call, used: Duration::ZERO }
    }
}

/// For how long the runtime's threads were busy, all together.
fn busy(metrics: &RuntimeMetrics) -> Duration {
    (0..metrics.num_workers()).map(|worker| metrics.worker_total_busy_duration(worker)).sum()
}

/// Measures how long steps wait, and changes the rates after each round.
async fn watch(shares: Weak<ProcessorShares>, scheduler: Arc<Scheduler>, tell: impl Fn(Vec<OrgId>)) {
    let metrics = Handle::current().metrics();
    loop {
        let (began, busy_before) = (Instant::now(), busy(&metrics));
        sleep(ROUND).await;
        let Some(shares) = shares.upgrade() else { return };
        let (waited, took) = (scheduler.mean_wait(), began.elapsed());
        let round = Round { waited, took, busy: busy(&metrics).saturating_sub(busy_before) };
        let slowed = {
            let mut orgs = shares.orgs.lock();
            let slowed = orgs.end_round(round, Instant::now());
            tell(orgs.usage.iter().filter(|(_, usage)| usage.slowed.is_some()).map(|(org, _)| *org).collect());
            slowed
        };
        if let Some(org) = slowed
            && let Some(times) = shares.slowed.note(org)
        {
            tracing::info!(org_id = %org, times, "the processors are busy; slowing the org whose calls take most of their time");
        }
    }
}

/// What was measured in a round.
#[derive(Clone, Copy)]
struct Round {
    /// How long steps waited, on average.
    waited: Duration,
    took: Duration,
    /// For how long the server's threads were busy, all together.
    busy: Duration,
}

impl Orgs {
    fn begin(&mut self, org: OrgId, is_vital: bool, now: Instant) -> Start {
        let usage = self.usage.entry(org).or_default();
        usage.called_at = Some(now);
        let track = &mut usage.tracks[usize::from(is_vital)];
        track.begun += 1;
        let Some(processors) = usage.slowed else { return Start::Now };
        let at = track.next.map_or(now, |next| next.max(now));
        if at > now + LONGEST {
            return if is_vital { Start::At(now + LONGEST) } else { Start::RefusedAt(now + LONGEST) };
        }
        track.next = Some(at + track.per_call.div_f64(processors));
        if at <= now + SHORT { Start::Now } else { Start::At(at) }
    }

    /// Ends a round. Returns the org that is slowed from now on, if there is one.
    fn end_round(&mut self, round: Round, now: Instant) -> Option<OrgId> {
        let Round { waited, took, busy } = round;
        let is_calling = |usage: &Usage| usage.called_at.is_some_and(|at| now - at < CALLED_OF_LATE);
        self.are_several = self.usage.values().filter(|usage| is_calling(usage)).count() > 1;
        self.long = if waited > LONG { self.long + 1 } else { 0 };
        let mut most = None;
        for (org, usage) in &mut self.usage {
            let used = usage.tracks.iter_mut().map(Track::end_round).sum::<Duration>();
            if most.is_none_or(|(_, most)| used > most) {
                most = Some((*org, used));
            }
            if waited <= LONG {
                usage.slowed = usage.slowed.map(|processors| processors * RISE);
            }
            // Who calls alone has all processors, and so has who may take them all.
            let all = self.processors;
            usage.slowed = usage.slowed.filter(|processors| self.are_several && *processors < all);
        }
        self.usage.retain(|_, usage| usage.slowed.is_some() || is_calling(usage));
        let (org, used) = most.filter(|_| self.are_several && self.long >= ROUNDS)?;
        let (least, processors) = (LEAST * self.processors, used.div_duration_f64(took));
        if processors <= least || used < busy.mul_f64(CAUSES) {
            return None;
        }
        let usage = self.usage.get_mut(&org)?;
        usage.slowed = Some((usage.slowed.map_or(processors, |slowed| slowed.min(processors)) * FALL).max(least));
        Some(org)
    }
}

impl Track {
    /// The processor time that the calls used in the round that ends.
    fn end_round(&mut self) -> Duration {
        if self.ended > 0 {
            self.per_call = self.used / self.ended + OVERHEAD;
        }
        let used = self.used + OVERHEAD * self.begun;
        (self.begun, self.ended, self.used) = (0, 0, Duration::ZERO);
        used
    }
}

/// See [`Start::receive`].
struct Waiting {
    body: Body,
    /// The caller's credential. It may be revoked during the wait.
    credential: Option<Arc<Credential>>,
    until: Pin<Box<Sleep>>,
    is_refused: bool,
    state: State,
}

/// What a body gave, or its end.
type Received = Option<Result<Frame<Bytes>, Status>>;

enum State {
    Receives,
    /// With what it has received: the message, or why there is none.
    Waits(Received),
    TakenUp,
}

impl http_body::Body for Waiting {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Received> {
        if let State::Receives = self.state {
            self.state = State::Waits(ready!(Pin::new(&mut self.body).poll_frame(context)));
        }
        if let State::Waits(received) = &mut self.state {
            let received = received.take();
            if self.until.as_mut().poll(context).is_pending() {
                self.state = State::Waits(received);
                return Poll::Pending;
            }
            self.state = State::TakenUp;
            let refusal = self.credential.as_ref().and_then(|credential| credential.refusal());
            let error = refusal.map(ApiError::from).or(self.is_refused.then_some(ApiError::Slowed));
            return Poll::Ready(error.map_or(received, |error| Some(Err(error.into()))));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.state, State::TakenUp) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if let State::TakenUp = self.state { self.body.size_hint() } else { SizeHint::default() }
    }
}

/// See [`ProcessorShares::measure`].
pub(super) struct Measured {
    shares: Arc<ProcessorShares>,
    org: OrgId,
    is_vital: bool,
    call: LayerFuture,
    used: Duration,
}

impl Future for Measured {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let since = Instant::now();
        let polled = self.call.as_mut().poll(context);
        self.used += since.elapsed();
        polled
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        let mut orgs = self.shares.orgs.lock();
        let track = &mut orgs.usage.entry(self.org).or_default().tracks[usize::from(self.is_vital)];
        track.used += self.used;
        track.ended += 1;
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const CALLS: u32 = 1_000;

    fn orgs() -> (Orgs, OrgId, OrgId) {
        let [busy, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        (Orgs { processors: 2.0, usage: HashMap::new(), are_several: false, long: 0 }, busy, other)
    }

    /// A round in which this org's calls took a whole processor, and another org's nearly none.
    fn round(orgs: &mut Orgs, org: OrgId, other: Option<OrgId>, waited: Duration, now: Instant) -> Option<OrgId> {
        let usage = orgs.usage.entry(org).or_default();
        usage.called_at = Some(now);
        let track = &mut usage.tracks[0];
        (track.begun, track.ended, track.used) = (CALLS, CALLS, ROUND - OVERHEAD * CALLS);
        if let Some(other) = other {
            orgs.begin(other, false, now);
        }
        orgs.end_round(Round { waited, took: ROUND, busy: ROUND * 2 }, now)
    }

    #[test]
    fn who_takes_the_processors_is_slowed_until_steps_are_prompt() {
        let ((mut orgs, busy, other), now) = (orgs(), Instant::now());
        for _ in 0..9 {
            assert_eq!(round(&mut orgs, busy, Some(other), LONG, now), None, "it does not wait long");
        }
        assert_eq!(round(&mut orgs, busy, Some(other), 2 * LONG, now), None, "it may be a stall");
        assert_eq!(orgs.begin(busy, false, now), Start::Now);
        assert_eq!(round(&mut orgs, busy, Some(other), 2 * LONG, now), Some(busy));
        // A call of 0.1 ms each 0.1 ms / 0.7. Those that only begin don't make calls cheaper.
        let starts: Vec<_> = (0..100).map(|_| orgs.begin(busy, false, now)).collect();
        assert_eq!(starts[0], Start::Now);
        let Start::At(last) = starts[99] else { panic!("{:?}", starts[99]) };
        let expected = 99.0 * 0.1 / 0.7;
        assert!(((last - now).as_secs_f64() * 1e3 - expected).abs() < 0.01, "{:?}", last - now);
        assert_eq!(orgs.begin(other, false, now), Start::Now);
        // It falls to its least, and not further.
        for _ in 0..20 {
            round(&mut orgs, busy, Some(other), 2 * LONG, now);
        }
        assert_eq!(orgs.usage[&busy].slowed, Some(LEAST * 2.0));
        let refused = (0..100_000)
            .map(|_| orgs.begin(busy, false, now))
            .find(|start| !matches!(start, Start::Now | Start::At(_)));
        assert_eq!(refused, Some(Start::RefusedAt(now + LONGEST)), "a wait has a bound");
        // A heartbeat neither waits behind other calls, nor is it ever refused.
        assert_eq!(orgs.begin(busy, true, now), Start::Now);
        orgs.usage.get_mut(&busy).unwrap().tracks[1].per_call = Duration::from_secs(9);
        assert_eq!([(); 3].map(|()| orgs.begin(busy, true, now))[2], Start::At(now + LONGEST));
        // It rises until it may take all.
        let mut rounds = 0;
        while orgs.usage[&busy].slowed.is_some() {
            orgs.begin(busy, false, now);
            orgs.begin(other, false, now);
            orgs.end_round(Round { waited: LONG, took: ROUND, busy: ROUND }, now);
            rounds += 1;
        }
        assert!((40..60).contains(&rounds), "{rounds}");
    }

    #[test]
    fn who_calls_alone_or_little_or_causes_no_wait_is_not_slowed() {
        let ((mut orgs, busy, other), mut now) = (orgs(), Instant::now());
        for _ in 0..9 {
            assert_eq!(round(&mut orgs, busy, None, 9 * LONG, now), None, "it is alone");
        }
        round(&mut orgs, busy, Some(other), 9 * LONG, now);
        assert!(orgs.usage[&busy].slowed.is_some());
        now += CALLED_OF_LATE / 2;
        round(&mut orgs, busy, None, 9 * LONG, now);
        assert!(orgs.usage[&busy].slowed.is_some(), "the other called lately");
        now += CALLED_OF_LATE / 2;
        round(&mut orgs, busy, None, 9 * LONG, now);
        assert!(orgs.usage[&busy].slowed.is_none(), "the other has gone");
        now += CALLED_OF_LATE;
        for _ in 0..9 {
            orgs.begin(busy, false, now);
            orgs.begin(other, false, now);
            assert_eq!(
                orgs.end_round(Round { waited: 9 * LONG, took: ROUND, busy: ROUND }, now),
                None,
                "neither takes much"
            );
        }
        assert_eq!(orgs.usage.len(), 2);
        orgs.end_round(Round { waited: LONG, took: ROUND, busy: ROUND }, now + CALLED_OF_LATE);
        assert!(orgs.usage.is_empty(), "they are forgotten");
        // What keeps the threads busy is mostly not its calls.
        for _ in 0..9 {
            orgs.begin(other, false, now);
            let usage = orgs.usage.entry(busy).or_default();
            usage.called_at = Some(now);
            usage.tracks[0].used = ROUND / 2;
            assert_eq!(orgs.end_round(Round { waited: 9 * LONG, took: ROUND, busy: ROUND * 2 }, now), None);
        }
    }
}
