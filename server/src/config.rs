//! What a server can be told.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    access::AccessConfig,
    api::CallLimits,
    domain::clock::{Clock, SystemClock},
    ledger::Limits,
    net::{ConnectionLimits, TlsConfig},
    store::{DatabaseUrl, OpenOptions, Retention},
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
    /// Whether to bring the database to this server's schema at the start; otherwise one that is behind is refused.
    pub migrate: bool,
    /// Whether to refuse a role to which row-level security does not apply. PostgreSQL only.
    pub require_rls: bool,
    /// Transactions that may be open at the same time. PostgreSQL only.
    pub write_connections: u32,
    /// Orgs whose commands one transaction may carry.
    pub orgs_per_transaction: u32,
    /// Reads that may be under way at the same time. PostgreSQL only.
    pub read_connections: u32,
    /// How long the row of a running job may lack what the log says.
    pub fold_after: Duration,
    /// How long finished jobs are kept.
    pub retention: Retention,
    /// Bytes of the disk in which no jobs are created; `None`: a twentieth of it, a gibibyte at most. SQLite only.
    pub disk_reserve: Option<u64>,
    /// What lets callers in.
    pub access: AccessConfig,
    /// The certificates to serve with; `None`: without TLS.
    pub tls: Option<TlsConfig>,
    /// What connections may take.
    pub connections: ConnectionLimits,
    /// What calls may take.
    pub calls: CallLimits,
    /// Whether the REST calls of the service that jobledger replaces are answered.
    pub legacy_http: bool,
}

impl Config {
    /// The defaults, on this database.
    pub fn new(database_url: DatabaseUrl) -> Self {
        let clock = Arc::new(SystemClock);
        let options = OpenOptions::new(clock.clone());
        Self {
            database_url,
            limits: Limits::default(),
            shutdown_grace: Duration::from_secs(20),
            slow_consumer_after: Duration::from_secs(30),
            clock,
            migrate: options.migrate,
            require_rls: options.require_rls,
            write_connections: options.write_connections,
            orgs_per_transaction: options.orgs_per_transaction,
            read_connections: options.read_connections,
            fold_after: options.fold_after,
            retention: Retention::default(),
            disk_reserve: None,
            access: AccessConfig::default(),
            tls: None,
            connections: ConnectionLimits::default(),
            calls: CallLimits::default(),
            legacy_http: false,
        }
    }
}

impl Config {
    /// How the store is opened.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions {
            migrate: self.migrate,
            require_rls: self.require_rls,
            write_connections: self.write_connections,
            orgs_per_transaction: self.orgs_per_transaction,
            read_connections: self.read_connections,
            fold_after: self.fold_after,
            ..OpenOptions::new(Arc::clone(&self.clock))
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("database_url", &self.database_url)
            .field("limits", &self.limits)
            .field("access", &self.access)
            .field("tls", &self.tls)
            .field("connections", &self.connections)
            .field("calls", &self.calls)
            .field("shutdown_grace", &self.shutdown_grace)
            .field("slow_consumer_after", &self.slow_consumer_after)
            .finish_non_exhaustive()
    }
}
