//! Backends that go on after their connection was given up.
//!
//! One that waits for a synchronous standby does not look whether anybody is there: while the standby is away it stays, and so would
//! one for each commit that was given up, until PostgreSQL has no connection left. So each keeps its place among a server's connections
//! until it is gone.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use sqlx::Connection as _;
use tokio::{runtime::Handle, sync::OwnedSemaphorePermit, time::sleep};

use super::{connections::Connections, error::store_error};
use crate::{domain::clock::Time, store::StoreError};

/// The first pause between two looks, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Which process of PostgreSQL serves a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Backend {
    pub(super) pid: i32,
    /// Process ids come again.
    pub(super) started: Time,
}

/// See the module.
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
    /// Keeps a place until this backend is gone.
    pub(super) fn keep(&self, backend: Backend, place: OwnedSemaphorePermit, home: &Arc<Connections>) {
        // Without a runtime nobody connects any more.
        let Ok(runtime) = Handle::try_current() else { return };
        let mut state = self.state();
        state.places.push((backend, place));
        if !std::mem::replace(&mut state.is_watched, true) {
            runtime.spawn(watch(Arc::downgrade(home)));
        }
    }

    /// Gives back the places of those that are not among these any more. True if all are back.
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

/// Looks until none is left, or the connections are closed.
async fn watch(home: Weak<Connections>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let Some(connections) = home.upgrade().filter(|home| !home.is_closed()) else { return };
        let lingering = connections.lingering();
        let asked: Vec<_> = lingering.state().places.iter().map(|(backend, _)| *backend).collect();
        match look(&connections, &asked).await {
            Ok(there) if lingering.keep_only(&asked, &there) => return,
            Ok(there) => tracing::debug!(backends = there.len(), "commits that were given up still wait for a standby"),
            Err(error) => tracing::debug!(%error, "can't see whether commits that were given up are over"),
        }
        drop(connections);
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Those of some backends that still do something, by a connection beside the places, since there may be none.
async fn look(home: &Connections, backends: &[Backend]) -> Result<Vec<Backend>, StoreError> {
    const SQL: &str = "/* lingering */ SELECT pid, backend_start FROM pg_stat_activity
        WHERE pid = ANY ($1) AND wait_event IS DISTINCT FROM 'ClientRead'";
    let (mut connection, _) = home.open().await?;
    let pids: Vec<_> = backends.iter().map(|backend| backend.pid).collect();
    let found: Vec<(i32, Time)> =
        sqlx::query_as(SQL).bind(pids).fetch_all(&mut connection).await.map_err(store_error)?;
    let _ = connection.close().await;
    Ok(found.into_iter().map(|(pid, started)| Backend { pid, started }).collect())
}
