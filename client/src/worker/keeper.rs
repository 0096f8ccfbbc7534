//! Keeps leases: one call for many jobs says that they are still worked on, and how far they are.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use jobledger_proto::v1::{HeartbeatRequest, HeartbeatResult, LeaseHeartbeat};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{Client, retry::Backoff};

/// Leases in one call, at most.
const AT_ONCE: usize = 1_000;
/// What one call may take: another may have better luck.
const CALL: Duration = Duration::from_secs(5);

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
    token: CancellationToken,
    state: Mutex<State>,
}

struct State {
    news: News,
    /// When news may be sent.
    news_at: Instant,
    /// When a sign of life has to be sent.
    beat_at: Instant,
    stop: Option<Stop>,
}

impl Held {
    /// Takes note of what the handler says.
    pub(super) fn tell(&self, say: impl FnOnce(&mut News)) {
        say(&mut lock(&self.state).news);
        if let Some(keeper) = self.keeper.upgrade() {
            keeper.wake.notify_one();
        }
    }

    /// Takes what was not reported yet.
    pub(super) fn take_news(&self) -> News {
        std::mem::take(&mut lock(&self.state).news)
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

    pub(super) fn stopped(&self) -> Option<Stop> {
        lock(&self.state).stop
    }
}

/// All jobs in this worker's hands.
pub(super) struct Keeper {
    client: Client,
    worker_id: String,
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
            beat_interval: lease / 3,
            news_interval,
            held: Mutex::default(),
            wake: Notify::new(),
        })
    }

    /// Keeps a lease from now on.
    pub(super) fn hold(self: &Arc<Self>, lease_token: String) -> Arc<Held> {
        let now = Instant::now();
        let state = State { news: News::default(), news_at: now, beat_at: now + self.beat_interval, stop: None };
        let held = Arc::new(Held {
            keeper: Arc::downgrade(self),
            lease_token: lease_token.clone(),
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
            match timeout(CALL, self.client.heartbeat(beat)).await {
                Ok(Ok(results)) => {
                    backoff.reset();
                    for ((held, _), result) in due.iter().zip(results) {
                        self.heard(held, &result);
                    }
                }
                failed => {
                    let wait = backoff.next(None);
                    let error = failed.err().map_or_else(|| "refused".to_owned(), |_| "no answer in time".to_owned());
                    tracing::warn!(error, leases = due.len(), wait_ms = wait.as_millis() as u64, "heartbeat failed");
                    let again = Instant::now() + wait;
                    for (held, news) in due {
                        let mut state = lock(&held.state);
                        state.news = std::mem::take(&mut state.news).or(news);
                        (state.news_at, state.beat_at) = (again, again);
                    }
                }
            }
        }
    }

    /// The leases that are due for a sign of life, or have news to be told, with the news; and when the next is.
    fn due(&self) -> (Vec<(Arc<Held>, News)>, Option<Instant>) {
        let now = Instant::now();
        let (mut due, mut next) = (Vec::new(), None::<Instant>);
        for held in lock(&self.held).values() {
            let mut state = lock(&held.state);
            if state.stop == Some(Stop::Lost) {
                continue;
            }
            let at = if state.news.is_empty() { state.beat_at } else { state.beat_at.min(state.news_at) };
            if at <= now && due.len() < AT_ONCE {
                state.news_at = now + self.news_interval;
                state.beat_at = now + self.beat_interval;
                due.push((Arc::clone(held), std::mem::take(&mut state.news)));
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        (due, next)
    }

    fn heard(&self, held: &Held, result: &HeartbeatResult) {
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
