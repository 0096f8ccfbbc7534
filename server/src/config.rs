//! The configuration of a server.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    access::AccessConfig,
    api::CallLimits,
    domain::clock::{Clock, SystemClock},
    ledger::Limits,
    net::{ConnectionLimits, TlsConfig},
    store::{DatabaseUrl, OpenOptions, Retention},
};

/// The configuration of a server.
#[derive(Clone)]
pub struct Config {
    /// The database of the ledger.
    pub database_url: DatabaseUrl,
    /// Bounds of queues, batches and memory.
    pub limits: Limits,
    /// How long a shutdown may take before it cuts off what is left.
    pub shutdown_grace: Duration,
    /// How long a subscriber may take nothing before its stream is ended.
    pub slow_consumer_after: Duration,
    /// The clock of an SQLite database, and the clock by which credentials expire. PostgreSQL has its own.
    pub clock: Arc<dyn Clock>,
    /// Whether to migrate the database to this server's schema at the start. Otherwise a database that lacks migrations is
    /// refused.
    pub migrate: bool,
    /// Whether to refuse a database role to which row-level security does not apply. PostgreSQL only.
    pub require_rls: bool,
    /// The number of connections that write, and so of open transactions. PostgreSQL only.
    pub write_connections: u32,
    /// How many orgs' batches one transaction may carry.
    pub orgs_per_transaction: u32,
    /// The number of connections that read for callers. PostgreSQL only.
    pub read_connections: u32,
    /// How long a running job's row may lag behind the log.
    pub fold_after: Duration,
    /// How long finished jobs are kept.
    pub retention: Retention,
    /// Bytes of free disk space below which creates are refused; `None`: a twentieth of the disk, 1 GiB at most. SQLite
    /// only.
    pub disk_reserve: Option<u64>,
    /// How callers are authenticated.
    pub access: AccessConfig,
    /// The certificates for TLS; `None`: no TLS.
    pub tls: Option<TlsConfig>,
    /// Limits of connections.
    pub connections: ConnectionLimits,
    /// Limits of calls.
    pub calls: CallLimits,
    /// Whether to answer the REST calls of the service that jobledger replaces.
    pub legacy_http: bool,
}

impl Config {
    /// The defaults, with this database.
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
    /// The options to open the store with.
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
