//! Keeps one org's calls from taking the processors from all others. The server's tasks run in the order in which they were
//! woken, whosever they are: an org that calls as fast as it can fills that queue, and every step of anybody's call waits in it.
//!
//! While steps wait long and several orgs call, the org whose calls take most processor time is slowed: its requests are taken
//! up no faster than a rate, which falls until steps are prompt again, and rises as long as they are. So the org gets what the
//! others leave. An org that calls alone is never slowed.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::Duration,
};

use http::Response;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use prost::bytes::Bytes;
use tokio::{
    task::yield_now,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tonic::{Status, body::Body};

use super::{reject::LayerFuture, status::ApiError};
use crate::{domain::id::OrgId, telemetry::RateLimitedLog};

/// How long it is measured before rates change.
const ROUND: Duration = Duration::from_millis(100);
/// The pause between two measurements of how long a step waits.
const PROBE: Duration = Duration::from_millis(3);
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

/// When requests may be taken up.
pub(super) struct ProcessorShares {
    orgs: Mutex<Orgs>,
    slowed: RateLimitedLog<OrgId>,
}

struct Orgs {
    processors: f64,
    /// The orgs that called in this round, and those that are slowed.
    usage: HashMap<OrgId, Usage>,
    /// True if several orgs called in the last round.
    are_several: bool,
}

/// What an org's calls use.
#[derive(Default)]
struct Usage {
    /// Processor time of this round, without [`OVERHEAD`].
    used: Duration,
    /// Calls of this round.
    calls: u32,
    /// Mean processor time of a call in the last round that had any.
    per_call: Duration,
    slowed: Option<Slowed>,
}

/// The rate of a slowed org.
#[derive(Clone, Copy)]
struct Slowed {
    /// Processor time that its calls may take in a time: 1.5 is one and a half processors.
    processors: f64,
    /// When the next request may be taken up; heartbeats, reports and cancellations do not wait behind other calls.
    next: [Instant; 2],
}

/// When a request is taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Now,
    At(Instant),
    /// Not at all: refused at this time, so that who repeats it at once waits, too.
    RefusedAt(Instant),
}

impl ProcessorShares {
    /// Shares the processors of the runtime in which this is called, for as long as somebody has what it returns. Tells after each
    /// round which orgs are slowed.
    pub(super) fn start(tell: impl Fn(Vec<OrgId>) + Send + 'static) -> Arc<Self> {
        let processors = tokio::runtime::Handle::current().metrics().num_workers() as f64;
        let orgs = Mutex::new(Orgs { processors, usage: HashMap::new(), are_several: false });
        let shares = Arc::new(Self { orgs, slowed: RateLimitedLog::default() });
        tokio::spawn(watch(Arc::downgrade(&shares), tell));
        shares
    }

    /// Waits until the org's next request may be taken up.
    ///
    /// # Errors
    ///
    /// [`ApiError::Slowed`] if that would take longer than [`LONGEST`].
    pub(super) async fn wait(&self, org: OrgId, is_vital: bool) -> Result<(), ApiError> {
        match self.begin(org, is_vital) {
            Start::Now => Ok(()),
            Start::At(at) => {
                sleep_until(at).await;
                Ok(())
            }
            Start::RefusedAt(at) => {
                sleep_until(at).await;
                Err(ApiError::Slowed)
            }
        }
    }

    /// A request's body whose message is passed on once the org's next request may be taken up. The body passes its message on
    /// in one frame, so that it is received, and its memory counted, while it waits.
    pub(super) fn receive(self: &Arc<Self>, body: Body, org: OrgId, is_vital: bool) -> Body {
        Body::new(Waiting { shares: Arc::clone(self), org, is_vital, body, state: State::Receives })
    }

    /// Measures the processor time of a call.
    pub(super) fn measure(self: &Arc<Self>, org: OrgId, call: LayerFuture) -> Measured {
        Measured { shares: Arc::clone(self), org, call, used: Duration::ZERO }
    }

    fn begin(&self, org: OrgId, is_vital: bool) -> Start {
        self.orgs.lock().begin(org, is_vital, Instant::now())
    }
}

/// Measures how long steps wait, and changes the rates after each round.
async fn watch(shares: Weak<ProcessorShares>, tell: impl Fn(Vec<OrgId>)) {
    loop {
        let began = Instant::now();
        let (mut waited, mut probes) = (Duration::ZERO, 0);
        let is_shared = shares.upgrade().is_some_and(|shares| shares.orgs.lock().are_several);
        if !is_shared {
            sleep(ROUND).await;
        }
        while is_shared && began.elapsed() < ROUND {
            sleep(PROBE).await;
            let since = Instant::now();
            // The task comes behind all that wait for a processor.
            yield_now().await;
            waited += since.elapsed();
            probes += 1;
        }
        let Some(shares) = shares.upgrade() else { return };
        let slowed = {
            let mut orgs = shares.orgs.lock();
            let slowed = orgs.end_round(waited / probes.max(1), began.elapsed(), Instant::now());
            // Afterwards only slowed orgs are left.
            tell(orgs.usage.keys().copied().collect());
            slowed
        };
        if let Some(org) = slowed
            && let Some(times) = shares.slowed.note(org)
        {
            tracing::info!(org_id = %org, times, "the processors are busy; slowing the org whose calls take most of their time");
        }
    }
}

impl Orgs {
    fn begin(&mut self, org: OrgId, is_vital: bool, now: Instant) -> Start {
        let usage = self.usage.entry(org).or_default();
        usage.calls += 1;
        let Some(slowed) = &mut usage.slowed else { return Start::Now };
        let next = &mut slowed.next[usize::from(is_vital)];
        let at = (*next).max(now);
        if at > now + LONGEST {
            return Start::RefusedAt(now + LONGEST);
        }
        *next = at + usage.per_call.div_f64(slowed.processors);
        if at <= now + SHORT { Start::Now } else { Start::At(at) }
    }

    /// Ends a round of this length, in which steps waited this long on average. Returns the org that is slowed from now on.
    fn end_round(&mut self, waited: Duration, took: Duration, now: Instant) -> Option<OrgId> {
        let mut most = None;
        self.are_several = self.usage.values().filter(|usage| usage.calls > 0).count() > 1;
        for (org, usage) in &mut self.usage {
            let used = usage.used + OVERHEAD * usage.calls;
            if usage.calls > 0 {
                usage.per_call = used / usage.calls;
            }
            let used = used.div_duration_f64(took);
            if most.is_none_or(|(_, most)| used > most) {
                most = Some((*org, used));
            }
            (usage.used, usage.calls) = (Duration::ZERO, 0);
            // Who calls alone has all processors, and so has who may take them all.
            let all = self.processors;
            usage.slowed = usage.slowed.filter(|_| self.are_several).filter(|slowed| slowed.processors < all);
            if let Some(slowed) = &mut usage.slowed
                && waited < LONG / 2
            {
                slowed.processors *= RISE;
            }
        }
        let least = LEAST * self.processors;
        let slowed =
            most.filter(|(_, used)| waited > LONG && self.are_several && *used > least).and_then(|(org, used)| {
                let usage = self.usage.get_mut(&org)?;
                let before = usage.slowed.unwrap_or(Slowed { processors: f64::INFINITY, next: [now; 2] });
                let processors = (before.processors.min(used) * FALL).max(least);
                usage.slowed = Some(Slowed { processors, ..before });
                Some(org)
            });
        self.usage.retain(|_, usage| usage.slowed.is_some());
        slowed
    }
}

/// See [`ProcessorShares::receive`].
struct Waiting {
    shares: Arc<ProcessorShares>,
    org: OrgId,
    is_vital: bool,
    body: Body,
    state: State,
}

enum State {
    Receives,
    Waits { frame: Option<Frame<Bytes>>, until: Pin<Box<Sleep>>, is_refused: bool },
    TakenUp,
}

impl http_body::Body for Waiting {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let State::Receives = self.state {
            let frame = match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                ended => return ended,
            };
            let (at, is_refused) = match self.shares.begin(self.org, self.is_vital) {
                Start::Now => {
                    self.state = State::TakenUp;
                    return Poll::Ready(Some(Ok(frame)));
                }
                Start::At(at) => (at, false),
                Start::RefusedAt(at) => (at, true),
            };
            self.state = State::Waits { frame: Some(frame), until: Box::pin(sleep_until(at)), is_refused };
        }
        if let State::Waits { frame, until, is_refused } = &mut self.state {
            std::task::ready!(until.as_mut().poll(context));
            let (frame, is_refused) = (frame.take(), *is_refused);
            self.state = State::TakenUp;
            return Poll::Ready(if is_refused { Some(Err(ApiError::Slowed.into())) } else { frame.map(Ok) });
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        !matches!(self.state, State::Waits { .. }) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if let State::Waits { .. } = self.state { SizeHint::default() } else { self.body.size_hint() }
    }
}

/// See [`ProcessorShares::measure`].
pub(super) struct Measured {
    shares: Arc<ProcessorShares>,
    org: OrgId,
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
        self.shares.orgs.lock().usage.entry(self.org).or_default().used += self.used;
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const CALLS: u32 = 1_000;

    fn orgs() -> (Orgs, OrgId, OrgId) {
        let [busy, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        (Orgs { processors: 2.0, usage: HashMap::new(), are_several: false }, busy, other)
    }

    /// A round in which this org's calls took a whole processor, and another org's nearly none.
    fn round(orgs: &mut Orgs, org: OrgId, other: Option<OrgId>, waited: Duration, now: Instant) -> Option<OrgId> {
        *orgs.usage.entry(org).or_default() = Usage {
            used: ROUND - OVERHEAD * CALLS,
            calls: CALLS,
            slowed: orgs.usage.get(&org).and_then(|usage| usage.slowed),
            ..Usage::default()
        };
        if let Some(other) = other {
            orgs.begin(other, false, now);
        }
        orgs.end_round(waited, ROUND, now)
    }

    #[test]
    fn who_takes_the_processors_is_slowed_until_steps_are_prompt() {
        let ((mut orgs, busy, other), now) = (orgs(), Instant::now());
        assert_eq!(round(&mut orgs, busy, Some(other), LONG, now), None, "it does not wait long");
        assert_eq!(orgs.begin(busy, false, now), Start::Now);
        assert_eq!(round(&mut orgs, busy, Some(other), 2 * LONG, now), Some(busy));
        // A call of 0.1 ms each 0.1 ms / 0.7.
        let starts: Vec<_> = (0..100).map(|_| orgs.begin(busy, false, now)).collect();
        assert_eq!(starts[0], Start::Now);
        let Start::At(last) = starts[99] else { panic!("{:?}", starts[99]) };
        let expected = 99.0 * 0.1 / 0.7;
        assert!(((last - now).as_secs_f64() * 1e3 - expected).abs() < 0.01, "{:?}", last - now);
        assert_eq!(orgs.begin(busy, true, now), Start::Now, "a heartbeat does not wait behind other calls");
        assert_eq!(orgs.begin(other, false, now), Start::Now);
        // It falls to its least, and not further.
        for _ in 0..20 {
            round(&mut orgs, busy, Some(other), 2 * LONG, now);
        }
        assert_eq!(orgs.usage[&busy].slowed.unwrap().processors, LEAST * 2.0);
        let refused =
            (0..100_000).map(|_| orgs.begin(busy, false, now)).find(|start| *start == Start::RefusedAt(now + LONGEST));
        assert!(refused.is_some(), "a wait has a bound");
        // It rises until it may take all.
        let mut rounds = 0;
        while orgs.usage.contains_key(&busy) {
            orgs.begin(busy, false, now);
            orgs.begin(other, false, now);
            orgs.end_round(Duration::ZERO, ROUND, now);
            rounds += 1;
        }
        assert!((40..60).contains(&rounds), "{rounds}");
    }

    #[test]
    fn who_calls_alone_or_little_is_not_slowed() {
        let ((mut orgs, busy, other), now) = (orgs(), Instant::now());
        assert_eq!(round(&mut orgs, busy, None, 9 * LONG, now), None, "it is alone");
        round(&mut orgs, busy, Some(other), 9 * LONG, now);
        assert!(orgs.usage[&busy].slowed.is_some());
        round(&mut orgs, busy, None, 9 * LONG, now);
        assert!(!orgs.usage.contains_key(&busy), "the other has gone");
        orgs.begin(busy, false, now);
        orgs.begin(other, false, now);
        assert_eq!(orgs.end_round(9 * LONG, ROUND, now), None, "neither takes much");
    }
}
