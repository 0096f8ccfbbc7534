//! Backends that outlive their connections.
//!
//! A backend that waits for a synchronous standby does not notice that its client has gone (PostgreSQL's `SyncRepWaitForLSN`).
//! While the standby is away, each commit that times out leaves such a backend behind, until PostgreSQL has no connection left.
//! So a connection that is dropped during its commit keeps its slot in the pool until its backend is gone.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    runtime::Handle,
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, timeout},
};

use super::{connections::Connections, error::store_error};
use crate::{domain::clock::Time, store::StoreError};

/// The pause between two queries for the backends: the first one, and the longest. It doubles in between.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long such a query may take, connecting included.
const LOOKS_WITHIN: Duration = Duration::from_secs(5);
/// How often the log repeats that some backends still wait.
const SAY: Duration = Duration::from_secs(60);

/// The PostgreSQL process that serves a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Backend {
    pub(super) pid: i32,
    /// Process ids are reused, so the start time counts too. `None` if the session changed to a role that may not see it.
    pub(super) started: Option<Time>,
}

/// The slots of a pool that backends without a connection occupy.
#[derive(Default)]
pub(super) struct Lingering {
    state: Mutex<LingeringState>,
}

#[derive(Default)]
struct LingeringState {
    places: Vec<(Backend, OwnedSemaphorePermit)>,
    is_watched: bool,
}

impl Lingering {
    /// Keeps a slot occupied until this backend is gone.
    pub(super) fn keep(&self, backend: Backend, place: OwnedSemaphorePermit, home: &Arc<Connections>) {
        // Without a runtime nothing connects any more, so the slot may become free.
        let Ok(runtime) = Handle::try_current() else { return };
        let mut state = self.state();
        state.places.push((backend, place));
        if !std::mem::replace(&mut state.is_watched, true) {
            runtime.spawn(watch(Arc::downgrade(home)));
        }
    }

    /// Frees the slots of the backends that were asked about and are gone. True if no slot is occupied any more.
    fn keep_only(&self, asked: &[Backend], there: &[Backend]) -> bool {
        let mut state = self.state();
        state.places.retain(|(backend, _)| !asked.contains(backend) || there.contains(backend));
        state.is_watched = !state.places.is_empty();
        !state.is_watched
    }

    fn state(&self) -> MutexGuard<'_, LingeringState> {
        self.state.lock()
    }
}

/// Queries the backends until all are gone, or the pool is closed.
async fn watch(home: Weak<Connections>) {
    let (mut pause, mut said) = (FIRST_PAUSE, None::<Instant>);
    loop {
        let Some(connections) = home.upgrade().filter(|home| !home.is_closed()) else { return };
        let lingering = connections.lingering();
        let asked: Vec<_> = lingering.state().places.iter().map(|(backend, _)| *backend).collect();
        // A connection to a host that has vanished reports no error for a quarter of an hour.
        let looked = timeout(LOOKS_WITHIN, still_there(&connections, &asked)).await;
        match looked.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned()))) {
            Ok(there) if lingering.keep_only(&asked, &there) => return,
            Ok(there) if said.is_none_or(|said| said.elapsed() >= SAY) => {
                said = Some(Instant::now());
                tracing::warn!(
                    connections = there.len(),
                    "timed-out commits still wait for a synchronous standby and occupy connections"
                );
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "can't see whether commits that were given up are over"),
        }
        drop(connections);
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Which of these backends still work. Uses a connection outside the pool, whose slots may all be occupied.
async fn still_there(home: &Connections, backends: &[Backend]) -> Result<Vec<Backend>, StoreError> {
    const SQL: &str = "/* lingering */ SELECT pid, backend_start FROM pg_stat_activity
        WHERE pid = ANY ($1) AND wait_event IS DISTINCT FROM 'ClientRead'";
    let (mut connection, _) = home.open().await?;
    let pids: Vec<_> = backends.iter().map(|backend| backend.pid).collect();
    let found: Vec<(i32, Option<Time>)> =
        sqlx::query_as(SQL).bind(pids).fetch_all(&mut connection).await.map_err(store_error)?;
    Ok(found.into_iter().map(|(pid, started)| Backend { pid, started }).collect())
}
