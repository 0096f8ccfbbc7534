//! Reads the log id for new streams; streams that open while a read is under way share the next one.

use std::{sync::Arc, time::Instant};

use tokio::sync::Mutex;

use super::{LedgerError, hub::Hub};
use crate::{domain::id::LogId, store::Store};

/// Reads the database's log id, one read at a time.
pub(super) struct LogIdentity {
    store: Arc<dyn Store>,
    hub: Arc<Hub>,
    /// When the last read began, and its result.
    last: Mutex<Option<(Instant, Result<LogId, LedgerError>)>>,
}

impl LogIdentity {
    pub(super) fn new(store: Arc<dyn Store>, hub: Arc<Hub>) -> Arc<Self> {
        Arc::new(Self { store, hub, last: Mutex::default() })
    }

    /// The log id as of some moment after the call. Calls that wait for a read in progress share the one after it.
    ///
    /// # Errors
    ///
    /// The error of the database.
    pub(super) async fn read(&self) -> Result<LogId, LedgerError> {
        let called = Instant::now();
        let mut last = self.last.lock().await;
        if let Some((began, found)) = &*last
            && *began >= called
        {
            return found.clone();
        }
        let (began, turn) = (Instant::now(), self.hub.turn());
        let found = self.store.read_log_id().await.map_err(LedgerError::from);
        if let Ok(log_id) = found {
            self.hub.is_of_log(turn, log_id);
        }
        *last = Some((began, found.clone()));
        found
    }
}
