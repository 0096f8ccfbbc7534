//! Keeps SQLite's WAL from growing without bound. SQLite can restart the WAL only when nobody reads, and overlapping
//! reads never leave such a moment. So once the WAL is too long, new reads wait until the running ones have ended. The same
//! after an erasure: until it is cut, the WAL has what was erased.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::{AssertSqlSafe, SqliteConnection, SqlitePool};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};

use super::{BUSY_TIMEOUT, checkpoints::Checkpoints, file::beside};

/// How often the length is checked.
const LOOK: Duration = Duration::from_millis(250);
/// How long new reads wait for running ones: at first, and at most.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// The pause after a failed attempt, and the time between two log lines about it.
const PAUSE: Duration = Duration::from_secs(1);
const SAY: Duration = Duration::from_secs(60);
/// The pause while another process (a backup, a verification) reads.
const WHILE_OTHERS_READ: Duration = Duration::from_secs(15);

/// Makes reads wait while it is closed.
#[derive(Clone)]
pub(super) struct Gate {
    is_open: watch::Sender<bool>,
    /// Waiting reads. Each has a connection that it does not use yet.
    waiting: Arc<AtomicUsize>,
}

impl Gate {
    pub(super) fn open() -> Self {
        Self { is_open: watch::Sender::new(true), waiting: Arc::default() }
    }

    /// Waits while the gate is closed.
    pub(super) async fn pass(&self) {
        let mut is_open = self.is_open.subscribe();
        if *is_open.borrow() {
            return;
        }
        let _waiting = Waiting::begin(&self.waiting);
        // Can't fail: the gate has the sender.
        let _ = is_open.wait_for(|is_open| *is_open).await;
    }
}

/// Counts a waiting read until it goes on or is canceled.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::SeqCst);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Watches the WAL of one database.
pub(super) struct Keeper {
    pub(super) gate: Gate,
    pub(super) path: PathBuf,
    /// Bytes above which the WAL is restarted.
    pub(super) limit: u64,
    pub(super) pools: [SqlitePool; 3],
    pub(super) writer: Weak<Mutex<Option<SqliteConnection>>>,
    pub(super) checkpoints: Arc<Checkpoints>,
}

impl Keeper {
    /// Runs until the store is dropped.
    pub(super) async fn run(self) {
        let (mut wait, mut said) = (SHORTEST_WAIT, None::<Instant>);
        loop {
            sleep(LOOK).await;
            let Some(writer) = self.writer.upgrade() else { return };
            let has_erased = self.checkpoints.take_erased();
            if self.bytes() <= self.limit && !has_erased {
                continue;
            }
            self.gate.is_open.send_replace(false);
            let is_idle = self.await_readers(wait).await;
            let paused = self.checkpoints.pause().await;
            let found = if is_idle { truncate(&writer).await } else { None };
            let (is_cut, others_read) = (found == Some(true), found == Some(false));
            drop(paused);
            self.gate.is_open.send_replace(true);
            if has_erased && !is_cut {
                self.checkpoints.has_erased();
            }
            let bytes = self.bytes();
            if bytes <= self.limit && has_erased {
                // Reads have been waiting.
                sleep(PAUSE).await;
                continue;
            }
            if bytes <= self.limit {
                tracing::info!("the SQLite WAL had grown because reads overlapped; it is reset");
                wait = SHORTEST_WAIT;
                continue;
            }
            wait = LONGEST_WAIT.min(wait * 2);
            if said.is_none_or(|said| said.elapsed() >= SAY) {
                said = Some(Instant::now());
                let mib = bytes >> 20;
                tracing::error!(
                    mib,
                    "the SQLite WAL keeps growing: a long read (a backup, a verification, another program) blocks its reset"
                );
            }
            // Other processes don't pass this gate, so holding up this process's reads would not help.
            sleep(if others_read { WHILE_OTHERS_READ } else { PAUSE }).await;
        }
    }

    fn bytes(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |file| file.len())
    }

    /// True once no read of this process is running; false after `wait`.
    async fn await_readers(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let idle = |pool: &SqlitePool| pool.num_idle();
        let all = |pool: &SqlitePool| pool.size() as usize;
        loop {
            let waiting = self.gate.waiting.load(Ordering::SeqCst);
            if self.pools.iter().map(idle).sum::<usize>() + waiting >= self.pools.iter().map(all).sum() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Checkpoints everything and restarts the WAL. Returns false if another process reads: it does not wait for it, as nobody could
/// write meanwhile. `None` if there is no connection to do it with, or if it is in use for long: reads wait at the gate.
async fn truncate(writer: &Arc<Mutex<Option<SqliteConnection>>>) -> Option<bool> {
    let mut slot = timeout(SHORTEST_WAIT, writer.lock()).await.ok()?;
    let writer = slot.as_mut()?;
    let attempt = async {
        sqlx::query("/* truncate */ PRAGMA busy_timeout = 0").execute(&mut *writer).await?;
        let query = sqlx::query_as("/* truncate */ PRAGMA wal_checkpoint(TRUNCATE)");
        let (is_busy, _, _): (i64, i64, i64) = query.fetch_one(&mut *writer).await?;
        Ok::<_, sqlx::Error>(is_busy == 0)
    };
    let done = attempt.await;
    let restored = format!("/* truncate */ PRAGMA busy_timeout = {}", BUSY_TIMEOUT.as_millis());
    if sqlx::query(AssertSqlSafe(restored)).execute(&mut *writer).await.is_err() {
        // The next transaction opens another connection.
        *slot = None;
    }
    Some(done.unwrap_or(false))
}

/// The WAL beside a database.
pub(super) fn path_of(database: &Path) -> PathBuf {
    beside(database, "-wal")
}
