//! Keeps leases: one call for many jobs says that they are still worked on, and how far they are.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use jobledger_proto::v1::{HeartbeatRequest, HeartbeatResult, LeaseHeartbeat};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{Client, Error, retry::Backoff};

/// Leases in one call, at most.
const AT_ONCE: usize = 1_000;
/// Bytes in one call, about: the service takes 256 KiB in a heartbeat (MESSAGE_TOO_LARGE beyond that).
const BYTES: usize = 224 << 10;
/// Bytes of one lease in a call beside its texts: a token, numbers and tags.
const LEASE: usize = 160;
/// What one call may take: another, at another server, may have better luck.
const CALL: Duration = Duration::from_secs(5);
/// A lease that could not be extended is tried again after this.
const AGAIN: Duration = Duration::from_millis(200);

/// What a handler said last, and was not reported yet.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct News {
    pub(super) stage: Option<String>,
    pub(super) progress: Option<i32>,
    pub(super) message: String,
}

impl News {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What was said earlier, where nothing was said since.
    fn or(self, earlier: Self) -> Self {
        Self {
            stage: self.stage.or(earlier.stage),
            progress: self.progress.or(earlier.progress),
            message: if self.message.is_empty() { earlier.message } else { self.message },
        }
    }
}

/// Why a job's handler was asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The job was canceled.
    Canceled,
    /// The lease is lost.
    Lost,
    /// The worker is stopping.
    Shutdown,
}

/// One job in this worker's hands.
pub(super) struct Held {
    keeper: Weak<Keeper>,
    lease_token: String,
    lease: Duration,
    token: CancellationToken,
    state: Mutex<State>,
}

struct State {
    news: News,
    /// What is on its way with a heartbeat that is not answered yet.
    on_its_way: News,
    /// When news may be sent.
    news_at: Instant,
    /// When a sign of life has to be sent.
    beat_at: Instant,
    /// The lease ends no sooner than this, for all that is known.
    alive_until: Instant,
    stop: Option<Stop>,
}

impl State {
    /// What was on its way is told again, then.
    fn put_back(&mut self, at: Instant) {
        let on_its_way = std::mem::take(&mut self.on_its_way);
        self.news = std::mem::take(&mut self.news).or(on_its_way);
        (self.news_at, self.beat_at) = (at, at);
    }
}

impl Held {
    /// Takes note of what the handler says.
    pub(super) fn tell(&self, say: impl FnOnce(&mut News)) {
        let is_first = {
            let mut state = lock(&self.state);
            let is_first = state.news.is_empty();
            say(&mut state.news);
            is_first
        };
        // What follows on news that is not told yet goes with it: a handler may say more than there are heartbeats.
        if is_first && let Some(keeper) = self.keeper.upgrade() {
            keeper.wake.notify_one();
        }
    }

    /// Takes what was not reported yet, for all that is known: what is on its way may arrive after the job has ended.
    pub(super) fn take_news(&self) -> News {
        let mut state = lock(&self.state);
        let on_its_way = std::mem::take(&mut state.on_its_way);
        std::mem::take(&mut state.news).or(on_its_way)
    }

    pub(super) fn token(&self) -> &CancellationToken {
        &self.token
    }

    pub(super) fn lease_token(&self) -> &str {
        &self.lease_token
    }

    /// Asks the handler to stop. That the lease is lost outweighs everything.
    pub(super) fn stop(&self, why: Stop) {
        let mut state = lock(&self.state);
        if state.stop.is_none() || why == Stop::Lost {
            state.stop = Some(why);
        }
        drop(state);
        self.token.cancel();
    }

    /// How long the lease goes on without a heartbeat.
    pub(super) fn lease(&self) -> Duration {
        self.lease
    }

    /// True while the lease may live. It may live on after that: it ends by an event in the log.
    pub(super) fn may_be_alive(&self) -> bool {
        Instant::now() <= lock(&self.state).alive_until
    }

    pub(super) fn stopped(&self) -> Option<Stop> {
        lock(&self.state).stop
    }
}

/// All jobs in this worker's hands.
pub(super) struct Keeper {
    client: Client,
    worker_id: String,
    lease: Duration,
    beat_interval: Duration,
    news_interval: Duration,
    held: Mutex<HashMap<String, Arc<Held>>>,
    wake: Notify,
}

impl Keeper {
    pub(super) fn new(client: Client, worker_id: String, lease: Duration, news_interval: Duration) -> Arc<Self> {
        Arc::new(Self {
            client,
            worker_id,
            lease,
            beat_interval: lease / 3,
            news_interval,
            held: Mutex::default(),
            wake: Notify::new(),
        })
    }

    /// Keeps a lease from now on.
    pub(super) fn hold(self: &Arc<Self>, lease_token: String) -> Arc<Held> {
        let now = Instant::now();
        let (news, on_its_way) = Default::default();
        let (beat_at, alive_until) = (now + self.beat_interval, now + self.lease);
        let state = State { news, on_its_way, news_at: now, beat_at, alive_until, stop: None };
        let held = Arc::new(Held {
            keeper: Arc::downgrade(self),
            lease_token: lease_token.clone(),
            lease: self.lease,
            token: CancellationToken::new(),
            state: Mutex::new(state),
        });
        lock(&self.held).insert(lease_token, Arc::clone(&held));
        self.wake.notify_one();
        held
    }

    /// Lets go of a lease that has ended.
    pub(super) fn let_go(&self, held: &Held) {
        lock(&self.held).remove(&held.lease_token);
    }

    /// How many leases there are to keep.
    pub(super) fn leases(&self) -> usize {
        lock(&self.held).len()
    }

    /// Keeps leases for as long as it is polled.
    pub(super) async fn run(&self) {
        let mut backoff = Backoff::default();
        loop {
            let (due, next) = self.due();
            if due.is_empty() {
                let next = next.unwrap_or_else(|| Instant::now() + self.beat_interval);
                tokio::select! {
                    () = self.wake.notified() => {}
                    () = sleep_until(next) => {}
                }
                continue;
            }
            let leases = due.iter().map(|(held, news)| LeaseHeartbeat {
                lease_token: held.lease_token.clone(),
                stage: news.stage.clone(),
                progress: news.progress,
                message: news.message.clone(),
            });
            let worker_id = self.worker_id.clone();
            let beat = HeartbeatRequest { worker_id, leases: leases.collect(), extend_by: None };
            let sent_at = Instant::now();
            // No longer than until the next one is due.
            let until = sent_at + CALL.min(self.beat_interval);
            let mut service = self.client.raw();
            let answer = self.client.bounded(until, async { service.heartbeat(beat).await }).await;
            match answer.map(|answer| answer.into_inner().results) {
                Ok(results) => {
                    backoff.reset();
                    for ((held, _), result) in due.iter().zip(results) {
                        self.heard(held, result, sent_at);
                    }
                }
                Err(error) => {
                    let wait = backoff.next(error.retry_after());
                    tracing::warn!(%error, leases = due.len(), wait_ms = wait.as_millis() as u64, "heartbeat failed");
                    let again = Instant::now() + wait;
                    for (held, _) in due {
                        lock(&held.state).put_back(again);
                    }
                }
            }
        }
    }

    /// The leases that are due for a sign of life, or have news to be told, with the news; and when the next is.
    fn due(&self) -> (Vec<(Arc<Held>, News)>, Option<Instant>) {
        let now = Instant::now();
        let (mut candidates, mut next) = (Vec::new(), None::<Instant>);
        for held in lock(&self.held).values() {
            let state = lock(&held.state);
            if state.stop == Some(Stop::Lost) {
                continue;
            }
            let at = if state.news.is_empty() { state.beat_at } else { state.beat_at.min(state.news_at) };
            if at <= now {
                candidates.push((state.beat_at, Arc::clone(held)));
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        // Where they are too many for one call, those whose leases end first.
        candidates.sort_unstable_by_key(|(beat_at, _)| *beat_at);
        let (mut due, mut bytes) = (Vec::new(), 0);
        for (_, held) in candidates.into_iter().take(AT_ONCE) {
            let mut state = lock(&held.state);
            bytes += LEASE + state.news.message.len() + state.news.stage.as_ref().map_or(0, String::len);
            if bytes > BYTES {
                break;
            }
            state.news_at = now + self.news_interval;
            state.beat_at = now + self.beat_interval;
            state.on_its_way = std::mem::take(&mut state.news);
            let news = state.on_its_way.clone();
            drop(state);
            due.push((held, news));
        }
        (due, next)
    }

    fn heard(&self, held: &Held, result: HeartbeatResult, sent_at: Instant) {
        let error = result.error.map(Error::from);
        let mut state = lock(&held.state);
        match (&result.expires_at, &error) {
            (Some(_), _) => {
                state.on_its_way = News::default();
                state.alive_until = sent_at + self.lease;
            }
            (None, Some(_)) => state.put_back(Instant::now() + AGAIN),
            (None, None) => {}
        }
        drop(state);
        if let Some(error) = error {
            tracing::warn!(%error, "a heartbeat was refused of one lease, or its news");
        }
        if result.lease_lost {
            // One whose outcome was accepted meanwhile has been let go of.
            if lock(&self.held).contains_key(&held.lease_token) {
                held.stop(Stop::Lost);
            }
        } else if result.cancel_requested {
            held.stop(Stop::Canceled);
        }
    }
}

/// What is behind these locks stays whole whatever panics beside them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
