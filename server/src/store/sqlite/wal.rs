//! Keeps the log that SQLite has beside the database (`-wal`) from growing without end. It can begin anew only in a moment in which
//! nobody reads, and where reads overlap that moment never comes by itself: once it is too long, reads are kept waiting until those
//! that are under way are through.

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
    time::{Instant, sleep},
};

use super::{BUSY_TIMEOUT, checkpoints::Checkpoints, file::beside};

/// How often its length is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How long reads are kept waiting for others at first, and at most.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// The wait between two tries, and between two times that it is said that they are in vain.
const PAUSE: Duration = Duration::from_secs(1);
const SAY: Duration = Duration::from_secs(60);
/// The wait where another process reads: a backup, a verification.
const WHILE_OTHERS_READ: Duration = Duration::from_secs(15);

/// Keeps reads waiting while it is closed.
#[derive(Clone)]
pub(super) struct Gate {
    is_open: watch::Sender<bool>,
    /// Reads that wait, each with a connection that it does not use yet.
    waiting: Arc<AtomicUsize>,
}

impl Gate {
    pub(super) fn open() -> Self {
        Self { is_open: watch::Sender::new(true), waiting: Arc::default() }
    }

    /// Waits while it is closed.
    pub(super) async fn pass(&self) {
        let mut is_open = self.is_open.subscribe();
        if *is_open.borrow() {
            return;
        }
        let _waiting = Waiting::begin(&self.waiting);
        // The sender lives in this gate.
        let _ = is_open.wait_for(|is_open| *is_open).await;
    }
}

/// A read that waits, or is given up.
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

/// Watches over one file's log.
pub(super) struct Keeper {
    pub(super) gate: Gate,
    pub(super) path: PathBuf,
    /// What it may grow to, in bytes.
    pub(super) limit: u64,
    pub(super) pools: [SqlitePool; 3],
    pub(super) writer: Weak<Mutex<Option<SqliteConnection>>>,
    pub(super) checkpoints: Arc<Checkpoints>,
}

impl Keeper {
    /// Keeps it short for as long as the store is there.
    pub(super) async fn run(self) {
        let (mut wait, mut said) = (SHORTEST_WAIT, None::<Instant>);
        loop {
            sleep(LOOK).await;
            let Some(writer) = self.writer.upgrade() else { return };
            if self.bytes() <= self.limit {
                continue;
            }
            self.gate.is_open.send_replace(false);
            let is_idle = self.await_readers(wait).await;
            let paused = self.checkpoints.pause().await;
            let others_read = is_idle && !truncate(&writer).await;
            drop(paused);
            self.gate.is_open.send_replace(true);
            let bytes = self.bytes();
            if bytes <= self.limit {
                tracing::info!("SQLite's log had grown long for reads that overlapped; it begins anew");
                wait = SHORTEST_WAIT;
                continue;
            }
            wait = LONGEST_WAIT.min(wait * 2);
            if said.is_none_or(|said| said.elapsed() >= SAY) {
                said = Some(Instant::now());
                let mib = bytes >> 20;
                tracing::error!(
                    mib,
                    "SQLite's log grows: somebody reads for long, as a backup, a verification or another program does"
                );
            }
            // Others don't wait for this process: there is no use in having its own reads wait for them.
            sleep(if others_read { WHILE_OTHERS_READ } else { PAUSE }).await;
        }
    }

    fn bytes(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |file| file.len())
    }

    /// True if nobody of this process reads any more.
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

/// Brings everything into the database and begins the log anew. False if somebody reads, whom it does not wait for: nobody can write
/// meanwhile.
async fn truncate(writer: &Arc<Mutex<Option<SqliteConnection>>>) -> bool {
    let mut slot = writer.lock().await;
    let Some(writer) = slot.as_mut() else { return true };
    let attempt = async {
        sqlx::query("/* truncate */ PRAGMA busy_timeout = 0").execute(&mut *writer).await?;
        let query = sqlx::query_as("/* truncate */ PRAGMA wal_checkpoint(TRUNCATE)");
        let (is_busy, _, _): (i64, i64, i64) = query.fetch_one(&mut *writer).await?;
        Ok::<_, sqlx::Error>(is_busy == 0)
    };
    let done = attempt.await;
    let restored = format!("/* truncate */ PRAGMA busy_timeout = {}", BUSY_TIMEOUT.as_millis());
    if sqlx::query(AssertSqlSafe(restored)).execute(&mut *writer).await.is_err() {
        // The next one opens another.
        *slot = None;
    }
    done.unwrap_or(false)
}

/// The log beside a database.
pub(super) fn path_of(database: &Path) -> PathBuf {
    beside(database, "-wal")
}
