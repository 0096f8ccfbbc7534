//! Keeps leases alive: one heartbeat call extends many leases and reports the progress of their jobs.

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

/// The service's limit of leases per heartbeat.
const AT_ONCE: usize = 1_000;
/// Upper bound of the estimated size of a heartbeat, in bytes: the service accepts 256 KiB (MESSAGE_TOO_LARGE beyond that).
const BYTES: usize = 224 << 10;
/// Estimated size of one lease in a heartbeat without its texts: a token, numbers and tags.
const LEASE: usize = 160;
/// Timeout of one heartbeat, short enough that a retry reaches another server before the leases expire.
const CALL: Duration = Duration::from_secs(5);
/// Wait before the next heartbeat of a lease that the server did not extend.
const AGAIN: Duration = Duration::from_millis(200);

/// The latest stage, progress and message that the handler has set and the worker has not reported yet.
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

    /// Fills what these news lack from earlier ones.
    fn or(self, earlier: Self) -> Self {
        Self {
            stage: self.stage.or(earlier.stage),
            progress: self.progress.or(earlier.progress),
            message: if self.message.is_empty() { earlier.message } else { self.message },
        }
    }
}

/// Why the worker asked a handler to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Canceled,
    Lost,
    Shutdown,
}

/// A claimed job of this worker, with its lease.
pub(super) struct Held {
    keeper: Weak<Keeper>,
    lease_token: String,
    lease: Duration,
    token: CancellationToken,
    state: Mutex<State>,
}

struct State {
    news: News,
    /// News in a heartbeat that is not answered yet.
    on_its_way: News,
    /// When the next news may be sent.
    news_at: Instant,
    /// When the next heartbeat is due, with or without news.
    beat_at: Instant,
    /// The lease ends no sooner than this, as far as the worker can tell.
    alive_until: Instant,
    stop: Option<Stop>,
}

impl State {
    /// Queues the unanswered news again, to be sent at `at`.
    fn put_back(&mut self, at: Instant) {
        let on_its_way = std::mem::take(&mut self.on_its_way);
        self.news = std::mem::take(&mut self.news).or(on_its_way);
        (self.news_at, self.beat_at) = (at, at);
    }
}

impl Held {
    /// Changes the news, and wakes the keeper.
    pub(super) fn tell(&self, say: impl FnOnce(&mut News)) {
        let is_first = {
            let mut state = lock(&self.state);
            let is_first = state.news.is_empty();
            say(&mut state.news);
            is_first
        };
        // Only the first news wakes the keeper; later news join it, however often the handler reports.
        if is_first && let Some(keeper) = self.keeper.upgrade() {
            keeper.wake.notify_one();
        }
    }

    /// Takes news that may not have arrived. An unanswered heartbeat may arrive too late, after the job has ended.
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

    /// Asks the handler to stop. A lost lease overrides any earlier reason.
    pub(super) fn stop(&self, why: Stop) {
        let mut state = lock(&self.state);
        if state.stop.is_none() || why == Stop::Lost {
            state.stop = Some(why);
        }
        drop(state);
        self.token.cancel();
    }

    /// How long the lease lasts without a heartbeat.
    pub(super) fn lease(&self) -> Duration {
        self.lease
    }

    /// True until the known end of the lease, which may live longer: it ends by an event, not by the clock.
    pub(super) fn may_be_alive(&self) -> bool {
        Instant::now() <= lock(&self.state).alive_until
    }

    pub(super) fn stopped(&self) -> Option<Stop> {
        lock(&self.state).stop
    }
}

/// All claimed jobs of this worker.
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

    pub(super) fn let_go(&self, held: &Held) {
        lock(&self.held).remove(&held.lease_token);
    }

    pub(super) fn leases(&self) -> usize {
        lock(&self.held).len()
    }

    /// Sends heartbeats for as long as it is polled.
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
            // At most until the next heartbeat is due.
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

    /// The leases whose heartbeat or news are due, with their news, and when the next lease is due.
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
        // If one call can't take all, the leases that end first go first.
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
            tracing::warn!(%error, "the heartbeat of a lease, or its progress, was refused");
        }
        if result.lease_lost {
            // If the job's outcome was accepted in the meantime, its lease is no longer kept, and has not been lost.
            if lock(&self.held).contains_key(&held.lease_token) {
                held.stop(Stop::Lost);
            }
        } else if result.cancel_requested {
            held.stop(Stop::Canceled);
        }
    }
}

/// A panic can't leave the data behind these locks inconsistent, so poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
