//! Copies large payloads, results and texts from SQLite's WAL into the database before a commit has to, since that
//! commit could copy 64 MiB while all others wait. A separate connection copies while the writer goes on. Small data
//! is left to commits: its pages are written often, and so are copied once.

use std::sync::atomic::{AtomicU64, Ordering};

use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
use tokio::sync::{Mutex, MutexGuard, Notify};

/// Bytes written between two checkpoints. Copying them takes the disk some milliseconds, for which commits may wait, too.
const AT_ONCE: u64 = 2 << 20;

pub(super) struct Checkpoints {
    options: SqliteConnectOptions,
    /// Bytes of large data committed since the last checkpoint began.
    written: AtomicU64,
    due: Notify,
    is_closed: Mutex<bool>,
}

impl Checkpoints {
    /// Each checkpoint opens a connection with these options.
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        Self { options, written: AtomicU64::new(0), due: Notify::new(), is_closed: Mutex::new(false) }
    }

    /// Counts committed bytes of large payloads, results and texts.
    pub(super) fn wrote(&self, bytes: usize) {
        let bytes = bytes as u64;
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes >= AT_ONCE {
            self.due.notify_one();
        }
    }

    /// Runs a checkpoint whenever one is due, until [`Checkpoints::close`].
    pub(super) async fn run(&self) {
        loop {
            self.due.notified().await;
            let is_closed = self.is_closed.lock().await;
            if *is_closed {
                return;
            }
            self.written.store(0, Ordering::Relaxed);
            // If the checkpoint fails, a later commit does the work.
            if let Err(error) = self.copy().await {
                tracing::debug!(%error, "SQLite's log can't be copied beside its writer");
            }
        }
    }

    /// A PASSIVE checkpoint waits for nobody: it copies the WAL up to the oldest snapshot that is still being read.
    async fn copy(&self) -> Result<(), sqlx::Error> {
        let mut connection = self.options.connect().await?;
        sqlx::query("/* copy */ PRAGMA wal_checkpoint(PASSIVE)").execute(&mut connection).await?;
        connection.close().await
    }

    /// No checkpoint runs while the returned guard is alive.
    pub(super) async fn pause(&self) -> MutexGuard<'_, bool> {
        self.is_closed.lock().await
    }

    /// Waits for a running checkpoint. None begins afterwards.
    pub(super) async fn close(&self) {
        *self.is_closed.lock().await = true;
    }
}
