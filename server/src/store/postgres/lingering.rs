//! Backends that outlive their connection.
//!
//! A backend that waits for a synchronous standby does not notice that its client has gone (PostgreSQL's `SyncRepWaitForLSN`). While the
//! standby is away every commit that times out leaves one such backend behind, until PostgreSQL has no connection left to give. So a
//! connection that is dropped during its commit keeps its place in the pool until its backend is gone.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, timeout},
};

use super::{connections::Connections, error::store_error};
use crate::{domain::clock::Time, store::StoreError};

/// The first pause between two queries for the backends, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long such a query may take, its connection included.
const LOOKS_WITHIN: Duration = Duration::from_secs(5);
/// How often the log says that some backends still wait.
const SAY: Duration = Duration::from_secs(60);

/// Which process of PostgreSQL serves a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Backend {
    pub(super) pid: i32,
    /// Process ids come again. `None` where the session's role may not see it: one that logged in as another.
    pub(super) started: Option<Time>,
}

/// The places of a pool that are kept for backends without a connection.
#[derive(Default)]
pub(super) struct Lingering {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    places: Vec<(Backend, OwnedSemaphorePermit)>,
    is_watched: bool,
}

impl Lingering {
    /// Keeps a place in the pool until this backend is gone.
    pub(super) fn keep(&self, backend: Backend, place: OwnedSemaphorePermit, home: &Arc<Connections>) {
        // Without a runtime nobody connects any more.
        let Ok(runtime) = Handle::try_current() else { return };
        let mut state = self.state();
        state.places.push((backend, place));
        if !std::mem::replace(&mut state.is_watched, true) {
            runtime.spawn(watch(Arc::downgrade(home)));
        }
    }

    /// Gives back the places of the backends that were asked about and are gone. True if no place is kept any more.
    fn keep_only(&self, asked: &[Backend], there: &[Backend]) -> bool {
        let mut state = self.state();
        state.places.retain(|(backend, _)| !asked.contains(backend) || there.contains(backend));
        state.is_watched = !state.places.is_empty();
        !state.is_watched
    }

    /// A vector stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks for the backends until all are gone, or the pool is closed.
async fn watch(home: Weak<Connections>) {
    let (mut pause, mut said) = (FIRST_PAUSE, None::<Instant>);
    loop {
        let Some(connections) = home.upgrade().filter(|home| !home.is_closed()) else { return };
        let lingering = connections.lingering();
        let asked: Vec<_> = lingering.state().places.iter().map(|(backend, _)| *backend).collect();
        // A connection to a host that has vanished says nothing for a quarter of an hour.
        let looked = timeout(LOOKS_WITHIN, look(&connections, &asked)).await;
        match looked.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned()))) {
            Ok(there) if lingering.keep_only(&asked, &there) => return,
            Ok(there) if said.is_none_or(|said| said.elapsed() >= SAY) => {
                said = Some(Instant::now());
                tracing::warn!(
                    connections = there.len(),
                    "commits that were given up still wait for a standby, and keep connections"
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

/// Which of these backends still work. Asks on a connection outside the pool, whose places may all be taken.
async fn look(home: &Connections, backends: &[Backend]) -> Result<Vec<Backend>, StoreError> {
    const SQL: &str = "/* lingering */ SELECT pid, backend_start FROM pg_stat_activity
        WHERE pid = ANY ($1) AND wait_event IS DISTINCT FROM 'ClientRead'";
    let (mut connection, _) = home.open().await?;
    let pids: Vec<_> = backends.iter().map(|backend| backend.pid).collect();
    let found: Vec<(i32, Option<Time>)> =
        sqlx::query_as(SQL).bind(pids).fetch_all(&mut connection).await.map_err(store_error)?;
    Ok(found.into_iter().map(|(pid, started)| Backend { pid, started }).collect())
}
