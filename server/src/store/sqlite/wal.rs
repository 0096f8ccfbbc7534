//! Keeps the log that SQLite has beside the database (`-wal`) from growing without end. It can begin anew only in a moment in which
//! nobody reads, and where reads overlap that moment never comes by itself: once it is too long, reads are kept waiting until those
//! that are under way are through.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use sqlx::{SqliteConnection, SqlitePool};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep},
};

/// How often its length is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How long reads are kept waiting for others at first, and at most.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// The wait between two tries, and between two times that it is said that they are in vain.
const PAUSE: Duration = Duration::from_secs(1);
const SAY: Duration = Duration::from_secs(60);

/// Keeps reads waiting while it is closed.
#[derive(Clone)]
pub(super) struct Gate(watch::Sender<bool>);

impl Gate {
    pub(super) fn open() -> Self {
        Self(watch::Sender::new(true))
    }

    /// Waits while it is closed.
    pub(super) async fn pass(&self) {
        // The sender lives in this gate.
        let _ = self.0.subscribe().wait_for(|is_open| *is_open).await;
    }
}

/// Watches over one file's log.
pub(super) struct Keeper {
    pub(super) gate: Gate,
    pub(super) path: PathBuf,
    /// What it may grow to, in bytes.
    pub(super) limit: u64,
    pub(super) pools: [SqlitePool; 2],
    pub(super) writer: Weak<Mutex<Option<SqliteConnection>>>,
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
            self.gate.0.send_replace(false);
            if self.await_readers(wait).await {
                truncate(&writer).await;
            }
            self.gate.0.send_replace(true);
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
            sleep(PAUSE).await;
        }
    }

    fn bytes(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |file| file.len())
    }

    /// True if nobody of this process reads any more.
    async fn await_readers(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let is_idle = |pool: &SqlitePool| pool.num_idle() == pool.size() as usize;
        loop {
            if self.pools.iter().all(is_idle) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Brings everything into the database and begins the log anew, unless another process reads.
async fn truncate(writer: &Arc<Mutex<Option<SqliteConnection>>>) {
    let mut slot = writer.lock().await;
    let Some(writer) = slot.as_mut() else { return };
    if let Err(error) = sqlx::query("/* truncate */ PRAGMA wal_checkpoint(TRUNCATE)").execute(writer).await {
        tracing::debug!(%error, "SQLite's log can't begin anew yet");
    }
}

/// The log beside a database.
pub(super) fn path_of(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}
