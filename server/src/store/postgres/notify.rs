//! How servers on one database learn of each other's commits.
//!
//! After a commit the server announces the org and the head of its log by NOTIFY, on a connection of its own. A message has
//! many orgs. It is sent at once if the connection is idle, and otherwise gathers orgs until the last message was sent. A batch
//! itself never uses NOTIFY, which takes a cluster-wide lock at its commit. Messages carry no data, so a lost one delays events
//! but loses none.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
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
    store::{Listener, News, Reach, StoreError},
};

/// All servers listen to this channel.
const CHANNEL: &str = "jobledger";
/// A server sends a message this often even if there is no news, so that a listener can tell silence from a dead connection.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// A listener that receives nothing for so long replaces its connection.
const SILENCE: Duration = Duration::from_secs(10);
/// How long sending messages, or opening a connection, may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);
/// PostgreSQL accepts payloads below 8,000 bytes.
const MAX_PAYLOAD: usize = 7_900;

/// Announces to other servers how far logs reach.
pub(super) struct Announcer {
    shared: Arc<Shared>,
    stopping: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    /// How far each org's log reaches, if that is not announced yet.
    waiting: Mutex<HashMap<OrgId, Reach>>,
    wake: Notify,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<OrgId, Reach>> {
        self.waiting.lock()
    }

    fn add(&self, reaches: impl IntoIterator<Item = (OrgId, Reach)>) {
        let mut waiting = self.waiting();
        for (org, reach) in reaches {
            let farthest = waiting.entry(org).or_default();
            *farthest = reach.max(*farthest);
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

    pub(super) fn announce(&self, reaches: &[(OrgId, Reach)]) {
        self.shared.add(reaches.iter().copied());
        self.shared.wake.notify_one();
    }

    /// Makes one last try to send what is waiting.
    pub(super) async fn stop(&self) {
        self.stopping.cancel();
        let task = self.task.lock().take();
        if let Some(task) = task {
            // That try has a time-out of its own.
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
        let reaches = std::mem::take(&mut *shared.waiting());
        let sent = timeout(ANSWER_WITHIN, send_all(&mut connection, &options, &reaches)).await;
        let sent = sent.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned())));
        if stopping.is_cancelled() {
            return;
        }
        if let Err(error) = sent {
            tracing::warn!(%error, "can't notify other servers of commits; they will see them with a delay");
            connection = None;
            shared.add(reaches);
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
    reaches: &HashMap<OrgId, Reach>,
) -> Result<(), StoreError> {
    let connection = match connection {
        Some(connection) => connection,
        None => connection.insert(options.connect().await.map_err(store_error)?),
    };
    for message in messages(reaches) {
        sqlx::query("/* announce */ SELECT pg_notify($1, $2)")
            .bind(CHANNEL)
            .bind(message)
            .execute(&mut *connection)
            .await
            .map_err(store_error)?;
    }
    Ok(())
}

/// The reaches as words `org:seq:ready_gen`, in messages that fit. If there are none, one empty message: the heartbeat.
fn messages(reaches: &HashMap<OrgId, Reach>) -> Vec<String> {
    let mut messages = vec![String::new()];
    for (org, Reach { seq, ready_gen }) in reaches {
        let word = format!("{}:{seq}:{ready_gen} ", org.0.simple());
        match messages.last_mut() {
            Some(last) if last.len() + word.len() <= MAX_PAYLOAD => last.push_str(&word),
            _ => messages.push(word),
        }
    }
    messages
}

/// The reaches in a message. Skips words in another form, which a newer server sends. An older one sends no `ready_gen`: it is
/// 0 then.
fn reaches(message: &str) -> Vec<(OrgId, Reach)> {
    let reach = |word: &str| {
        let mut parts = word.split(':');
        let (org, seq) = (parts.next()?, parts.next()?.parse().ok()?);
        let ready_gen = parts.next().and_then(|part| part.parse().ok()).unwrap_or_default();
        Some((OrgId(Uuid::try_parse(org).ok()?), Reach { seq, ready_gen }))
    };
    message.split_ascii_whitespace().filter_map(reach).collect()
}

/// Receives what servers announce.
pub(super) struct NotifyListener {
    options: PgConnectOptions,
    listener: Option<PgListener>,
}

impl NotifyListener {
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self { options, listener: None }
    }

    async fn connect(&self) -> Result<PgListener, sqlx::Error> {
        // A listener takes its connection from a pool. This one has a single connection, and never outlives the listener.
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
impl Listener for NotifyListener {
    async fn next(&mut self) -> News {
        loop {
            let Some(listener) = &mut self.listener else {
                match timeout(ANSWER_WITHIN, self.connect()).await {
                    Ok(Ok(listener)) => {
                        self.listener = Some(listener);
                        return News::Missed;
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "can't listen for notifications of other servers; polling instead")
                    }
                    Err(_) => tracing::warn!(
                        "can't listen for notifications of other servers: no answer in time; polling instead"
                    ),
                }
                sleep(RECONNECT_PAUSE).await;
                continue;
            };
            match timeout(SILENCE, listener.try_recv()).await {
                Ok(Ok(Some(message))) => {
                    let reaches = reaches(message.payload());
                    if !reaches.is_empty() {
                        return News::Reaches(reaches);
                    }
                }
                // The connection is lost, broken, or so silent that it must be: every server sends something every few seconds.
                Ok(Ok(None) | Err(_)) => self.listener = None,
                Err(_) => {
                    tracing::warn!("no notifications arrive, not even this server's own; reconnecting the listener");
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
    fn reaches_travel_in_messages_that_fit() {
        let reach = |n: u128| Reach { seq: i64::MAX - n as i64, ready_gen: i64::MAX };
        let all: HashMap<_, _> = (0..1_000).map(|n| (OrgId(Uuid::from_u128(n)), reach(n))).collect();
        let messages = messages(&all);
        assert!(messages.len() > 1 && messages.iter().all(|message| message.len() < 8_000));
        let told: HashMap<_, _> = messages.iter().flat_map(|message| reaches(message)).collect();
        assert_eq!(told, all);
        assert_eq!(super::messages(&HashMap::new()), [""], "a heartbeat");
        let heard = |ready_gen| [(OrgId(Uuid::from_u128(1)), Reach { seq: 7, ready_gen })];
        assert_eq!(reaches("x y:1 00000000000000000000000000000001:7:9:later"), heard(9));
        assert_eq!(reaches("00000000000000000000000000000001:7"), heard(0));
    }
}
