//! How servers on one database hear of each other's commits.
//!
//! After a commit its org and the head of its log are announced by NOTIFY, on a connection of its own: many orgs in one
//! message, at once when idle, gathered while the last message is on its way. Never inside a batch: NOTIFY takes a lock
//! across the whole cluster at its commit. A message carries no data, so losing one delays, never loses.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions as _, PgConnection,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::error::store_error;
use crate::{
    domain::id::OrgId,
    store::{Listener, News, StoreError},
};

/// The channel of all servers.
const CHANNEL: &str = "jobledger";
/// Something is said this often even where there is nothing to say, so that a listener can tell silence from a dead line.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// A listener that hears nothing for so long gives its connection up.
const SILENCE: Duration = Duration::from_secs(10);
/// How long sending a message, or opening a connection, may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The wait before a connection is opened again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);
/// PostgreSQL takes payloads below 8,000 bytes.
const MAX_PAYLOAD: usize = 7_900;

/// Tells other servers how far logs reach.
pub(super) struct Announcer {
    shared: Arc<Shared>,
    stopping: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    /// The newest head of each org that is not announced yet.
    waiting: Mutex<HashMap<OrgId, i64>>,
    wake: Notify,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<OrgId, i64>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, heads: impl IntoIterator<Item = (OrgId, i64)>) {
        let mut waiting = self.waiting();
        for (org, seq) in heads {
            let newest = waiting.entry(org).or_default();
            *newest = seq.max(*newest);
        }
    }
}

impl Announcer {
    pub(super) fn start(options: PgConnectOptions) -> Self {
        let shared = Arc::<Shared>::default();
        let stopping = CancellationToken::new();
        let task = tokio::spawn(announce(Arc::clone(&shared), options, stopping.clone()));
        Self { shared, stopping, task: Mutex::new(Some(task)) }
    }

    pub(super) fn announce(&self, heads: &[(OrgId, i64)]) {
        self.shared.add(heads.iter().copied());
        self.shared.wake.notify_one();
    }

    /// Says what is still to be said, if that can be done at once.
    pub(super) async fn stop(&self) {
        self.stopping.cancel();
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // It bounds itself.
            let _ = task.await;
        }
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

async fn announce(shared: Arc<Shared>, options: PgConnectOptions, stopping: CancellationToken) {
    let mut connection = None;
    loop {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = shared.wake.notified() => {}
            () = sleep(HEARTBEAT) => {}
        }
        let heads = std::mem::take(&mut *shared.waiting());
        let sent = timeout(ANSWER_WITHIN, send_all(&mut connection, &options, &heads)).await;
        let sent = sent.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned())));
        if stopping.is_cancelled() {
            return;
        }
        if let Err(error) = sent {
            tracing::warn!(%error, "could not announce what was committed; other servers find it a little later");
            connection = None;
            shared.add(heads);
            shared.wake.notify_one();
            tokio::select! {
                () = stopping.cancelled() => {}
                () = sleep(RECONNECT_PAUSE) => {}
            }
        }
    }
}

async fn send_all(
    connection: &mut Option<PgConnection>,
    options: &PgConnectOptions,
    heads: &HashMap<OrgId, i64>,
) -> Result<(), StoreError> {
    let connection = match connection {
        Some(connection) => connection,
        None => connection.insert(options.connect().await.map_err(store_error)?),
    };
    for message in messages(heads) {
        sqlx::query("/* announce */ SELECT pg_notify($1, $2)")
            .bind(CHANNEL)
            .bind(message)
            .execute(&mut *connection)
            .await
            .map_err(store_error)?;
    }
    Ok(())
}

/// Heads as `org:seq` words, in messages that fit. Without any, one empty message: the heartbeat.
fn messages(heads: &HashMap<OrgId, i64>) -> Vec<String> {
    let mut messages = vec![String::new()];
    for (org, seq) in heads {
        let word = format!("{}:{seq} ", org.0.simple());
        match messages.last_mut() {
            Some(last) if last.len() + word.len() <= MAX_PAYLOAD => last.push_str(&word),
            _ => messages.push(word),
        }
    }
    messages
}

/// What a message says. Words that are not understood are from a newer server, and passed over.
fn heads(message: &str) -> Vec<(OrgId, i64)> {
    let head = |word: &str| {
        let mut parts = word.split(':');
        Some((OrgId(Uuid::try_parse(parts.next()?).ok()?), parts.next()?.parse().ok()?))
    };
    message.split_ascii_whitespace().filter_map(head).collect()
}

/// Hears what other servers announce.
pub(super) struct Ear {
    options: PgConnectOptions,
    listener: Option<PgListener>,
}

impl Ear {
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self { options, listener: None }
    }

    async fn connect(&self) -> Result<PgListener, sqlx::Error> {
        // A pool of one, since that is what a listener takes its connection from; it never outlives the listener.
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(ANSWER_WITHIN)
            .connect_lazy_with(self.options.clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        Ok(listener)
    }
}

#[async_trait]
impl Listener for Ear {
    async fn next(&mut self) -> News {
        loop {
            let Some(listener) = &mut self.listener else {
                match timeout(ANSWER_WITHIN, self.connect()).await {
                    Ok(Ok(listener)) => {
                        self.listener = Some(listener);
                        return News::Missed;
                    }
                    Ok(Err(error)) => tracing::warn!(%error, "can't listen to other servers; looking instead"),
                    Err(_) => tracing::warn!("can't listen to other servers: no answer in time; looking instead"),
                }
                sleep(RECONNECT_PAUSE).await;
                continue;
            };
            match timeout(SILENCE, listener.try_recv()).await {
                Ok(Ok(Some(message))) => {
                    let heads = heads(message.payload());
                    if !heads.is_empty() {
                        return News::Heads(heads);
                    }
                }
                // Lost, broken, or so silent that it must be: every server says something every few seconds.
                Ok(Ok(None) | Err(_)) => self.listener = None,
                Err(_) => {
                    tracing::warn!("heard nothing from any server, not even this one; listening anew");
                    self.listener = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_travel_in_messages_that_fit() {
        let all: HashMap<_, _> = (0..1_000).map(|n| (OrgId(Uuid::from_u128(n)), i64::MAX - n as i64)).collect();
        let messages = messages(&all);
        assert!(messages.len() > 1 && messages.iter().all(|message| message.len() < 8_000));
        let told: HashMap<_, _> = messages.iter().flat_map(|message| heads(message)).collect();
        assert_eq!(told, all);
        assert_eq!(super::messages(&HashMap::new()), [""], "a heartbeat");
        assert_eq!(heads("x y:1 00000000000000000000000000000001:7:9"), [(OrgId(Uuid::from_u128(1)), 7)]);
    }
}
