//! Brings large payloads, results and texts from SQLite's log (`-wal`) into the database before a commit has to. That would copy up to 64 MiB while
//! all other commits wait for it; a connection of its own copies while the writer goes on, and leaves the commit that comes last little to
//! do. What is small is left to that commit: it is written often, and so goes to the database once.

use std::sync::atomic::{AtomicU64, Ordering};

use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
use tokio::sync::{Mutex, MutexGuard, Notify};

/// Once so many bytes were written, they are copied: some milliseconds of a disk's time, for which commits may have to wait, too.
const AT_ONCE: u64 = 2 << 20;

/// See the module.
pub(super) struct Checkpoints {
    options: SqliteConnectOptions,
    /// What was written since it was last copied, in bytes.
    written: AtomicU64,
    due: Notify,
    is_closed: Mutex<bool>,
}

impl Checkpoints {
    /// By connections that are opened so.
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        Self { options, written: AtomicU64::new(0), due: Notify::new(), is_closed: Mutex::new(false) }
    }

    /// So many bytes of large payloads, results and texts were committed.
    pub(super) fn wrote(&self, bytes: usize) {
        let bytes = bytes as u64;
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes >= AT_ONCE {
            self.due.notify_one();
        }
    }

    /// Copies whenever it is due.
    pub(super) async fn run(&self) {
        loop {
            self.due.notified().await;
            let is_closed = self.is_closed.lock().await;
            if *is_closed {
                return;
            }
            self.written.store(0, Ordering::Relaxed);
            // Where it can't be done, a commit does it.
            if let Err(error) = self.copy().await {
                tracing::debug!(%error, "SQLite's log can't be copied beside its writer");
            }
        }
    }

    /// Copies what nobody reads in the log any more.
    async fn copy(&self) -> Result<(), sqlx::Error> {
        let mut connection = self.options.connect().await?;
        sqlx::query("/* copy */ PRAGMA wal_checkpoint(PASSIVE)").execute(&mut connection).await?;
        connection.close().await
    }

    /// Nothing is copied while what this returns is kept.
    pub(super) async fn pause(&self) -> MutexGuard<'_, bool> {
        self.is_closed.lock().await
    }

    /// Lets go of the database, once what is under way is through.
    pub(super) async fn close(&self) {
        *self.is_closed.lock().await = true;
    }
}
