//! What a server can be told.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    domain::clock::{Clock, SystemClock},
    ledger::Limits,
    store::DatabaseUrl,
};

/// How a server runs.
#[derive(Clone)]
pub struct Config {
    /// Where the ledger is kept.
    pub database_url: DatabaseUrl,
    /// Bounds of queues, batches and memory.
    pub limits: Limits,
    /// How long a stop may take before what is left is cut off.
    pub shutdown_grace: Duration,
    /// How long a subscriber may take nothing before its stream is ended.
    pub slow_consumer_after: Duration,
    /// The clock of the embedded database.
    pub clock: Arc<dyn Clock>,
}

impl Config {
    /// The defaults, on this database.
    pub fn new(database_url: DatabaseUrl) -> Self {
        Self {
            database_url,
            limits: Limits::default(),
            shutdown_grace: Duration::from_secs(10),
            slow_consumer_after: Duration::from_secs(30),
            clock: Arc::new(SystemClock),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("database_url", &self.database_url)
            .field("limits", &self.limits)
            .field("shutdown_grace", &self.shutdown_grace)
            .field("slow_consumer_after", &self.slow_consumer_after)
            .finish_non_exhaustive()
    }
}
