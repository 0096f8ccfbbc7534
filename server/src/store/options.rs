//! How to open a store.

use std::{sync::Arc, time::Duration};

use crate::domain::clock::Clock;

/// How to open a store.
#[derive(Clone)]
pub struct OpenOptions {
    /// The clock of an embedded database. A database server has its own clock.
    pub clock: Arc<dyn Clock>,
    /// Whether to migrate the database to this server's schema. If false, a database that lacks migrations is refused.
    pub migrate: bool,
    /// Whether to refuse a role that bypasses row-level security, instead of logging a warning. PostgreSQL only.
    pub require_rls: bool,
    /// Transactions that may be open at the same time, at least 1. PostgreSQL only.
    pub write_connections: u32,
    /// Orgs whose batches one transaction may carry, at least 1.
    pub orgs_per_transaction: u32,
    /// Reads that may run at the same time, at least 1. PostgreSQL only.
    pub read_connections: u32,
    /// About how long the row of a running job may be behind, at most a year. Far behind, or one of many, it is folded earlier.
    pub fold_after: Duration,
    /// Size of the WAL in bytes beyond which reads wait until it restarts. SQLite only.
    pub max_wal: u64,
    /// What the file is opened for. SQLite only.
    pub file_use: FileUse,
}

/// What an SQLite file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileUse {
    /// To serve it: no other server may have it open.
    Serve,
    /// To read or write it while a server may have it open. The file is neither created nor migrated.
    Beside,
    /// Like [`FileUse::Beside`], but if no server has the file open, it is created and migrated first.
    Prepare,
}

/// Orgs whose batches share a transaction by default.
pub const ORGS_PER_TRANSACTION: u32 = 64;

impl OpenOptions {
    /// The default options with this clock.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            migrate: true,
            require_rls: false,
            write_connections: 8,
            orgs_per_transaction: ORGS_PER_TRANSACTION,
            read_connections: 20,
            fold_after: Duration::from_secs(10),
            max_wal: 256 << 20,
            file_use: FileUse::Serve,
        }
    }
}
