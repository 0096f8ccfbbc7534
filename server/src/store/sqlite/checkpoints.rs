//! Copies SQLite's WAL into the database beside its writer. A commit that checkpoints copies 64 MiB and waits until the disk
//! has them, and all other commits wait for it. Here a connection of its own copies a few mebibytes at a time while the
//! writer goes on, and the disk takes them meanwhile. The writer waits only for the last of them, so that the WAL can begin anew.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{ConnectOptions as _, Connection as _, Error, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::{
    sync::{Mutex, MutexGuard, Notify},
    task::spawn_blocking,
    time::sleep,
};

/// How soon after a commit the WAL's length is checked.
const LOOK: Duration = Duration::from_millis(50);
/// Pages (8 MiB) that are copied at once. With more of them, those that are written often are copied less often.
const AT_ONCE: i64 = 2_048;
/// Pages (64 MiB) after which the WAL is to begin anew.
const ANEW: i64 = 16_384;
/// The writer waits for at most this many pages (1 MiB), until the WAL has so many (96 MiB) because it writes faster than they
/// are copied.
const LAST: i64 = 256;
const LATEST: i64 = 24_576;
/// How often a checkpoint copies what was written while it copied.
const ROUNDS: u32 = 4;

/// The pages of a WAL, as SQLite's `wal_checkpoint` tells them.
struct Pages {
    written: i64,
    copied: i64,
}

impl Pages {
    fn left(&self) -> i64 {
        self.written - self.copied
    }
}

pub(super) struct Checkpoints {
    options: SqliteConnectOptions,
    path: PathBuf,
    committed: Notify,
    copying: Mutex<Copying>,
    /// The WAL may have what a job had before it was erased. A process that was killed can't tell its successor.
    has_erased: AtomicBool,
}

/// What a checkpoint uses.
#[derive(Default)]
pub(super) struct Copying {
    /// Opened by the first checkpoint, and after one that failed.
    connection: Option<SqliteConnection>,
    /// The database, to have the disk take what was copied: SQLite does so only with the last page of the WAL. It is closed
    /// after all connections, because closing a file drops all locks that SQLite has on it in this process.
    database: Option<Arc<File>>,
    is_closed: bool,
}

impl Checkpoints {
    /// Checkpoints of the database at `path` go through a connection with these options.
    pub(super) fn new(path: &Path, options: SqliteConnectOptions) -> Self {
        Self {
            options,
            path: path.to_owned(),
            committed: Notify::new(),
            copying: Mutex::default(),
            has_erased: AtomicBool::new(true),
        }
    }

    /// To be called after each commit.
    pub(super) fn committed(&self) {
        self.committed.notify_one();
    }

    /// To be called after a commit that has erased jobs: the WAL is cut soon.
    pub(super) fn has_erased(&self) {
        self.has_erased.store(true, Ordering::Relaxed);
    }

    /// True if jobs were erased since the last call.
    pub(super) fn take_erased(&self) -> bool {
        self.has_erased.swap(false, Ordering::Relaxed)
    }

    /// Runs a checkpoint whenever one is due, until [`Checkpoints::close`] or until the writer is dropped.
    pub(super) async fn run(&self, writer: Weak<Mutex<Option<SqliteConnection>>>) {
        loop {
            self.committed.notified().await;
            sleep(LOOK).await;
            let Some(writer) = writer.upgrade() else { return };
            let mut copying = self.copying.lock().await;
            if copying.is_closed {
                return;
            }
            // If the checkpoint fails, a later commit does the work.
            if let Err(error) = self.copy_what_is_due(&mut copying, &writer).await {
                copying.connection = None;
                tracing::debug!(%error, "SQLite's WAL can't be copied beside its writer");
            }
        }
    }

    async fn copy_what_is_due(
        &self,
        copying: &mut Copying,
        writer: &Mutex<Option<SqliteConnection>>,
    ) -> Result<(), Error> {
        let mut pages = self.pages(copying).await?;
        if pages.left() < AT_ONCE && pages.written < ANEW {
            return Ok(());
        }
        for _ in 0..ROUNDS {
            if pages.left() <= LAST {
                break;
            }
            self.copy(copying).await?;
            let before = std::mem::replace(&mut pages, self.pages(copying).await?).copied;
            if pages.copied == before {
                // Somebody reads an old snapshot.
                return Ok(());
            }
            self.sync(copying).await?;
            pages = self.pages(copying).await?;
        }
        if pages.written >= ANEW && pages.left() <= LAST || pages.written >= LATEST {
            // The next transaction begins the WAL anew, unless somebody still reads from it.
            let _nobody_writes = writer.lock().await;
            self.copy(copying).await?;
        }
        Ok(())
    }

    async fn pages(&self, copying: &mut Copying) -> Result<Pages, Error> {
        let query = sqlx::query_as("/* pages */ PRAGMA wal_checkpoint(NOOP)");
        let (_, written, copied): (i64, i64, i64) = query.fetch_one(self.connection(copying).await?).await?;
        Ok(Pages { written, copied })
    }

    /// A PASSIVE checkpoint waits for nobody: it copies the WAL up to the oldest snapshot that is still being read.
    async fn copy(&self, copying: &mut Copying) -> Result<(), Error> {
        sqlx::query("/* copy */ PRAGMA wal_checkpoint(PASSIVE)").execute(self.connection(copying).await?).await?;
        Ok(())
    }

    async fn connection<'a>(&self, copying: &'a mut Copying) -> Result<&'a mut SqliteConnection, Error> {
        if copying.connection.is_none() {
            copying.connection = Some(self.options.connect().await?);
        }
        Ok(copying.connection.as_mut().expect("it was just set"))
    }

    /// Waits until the disk has what was copied.
    async fn sync(&self, copying: &mut Copying) -> Result<(), Error> {
        let database = match &copying.database {
            Some(database) => Arc::clone(database),
            None => Arc::clone(copying.database.insert(Arc::new(File::open(&self.path)?))),
        };
        spawn_blocking(move || database.sync_data()).await.map_err(io::Error::other)??;
        Ok(())
    }

    /// No checkpoint runs while the returned guard is alive.
    pub(super) async fn pause(&self) -> MutexGuard<'_, Copying> {
        self.copying.lock().await
    }

    /// Waits for a running checkpoint. None begins afterwards.
    pub(super) async fn close(&self) {
        let mut copying = self.copying.lock().await;
        copying.is_closed = true;
        if let Some(connection) = copying.connection.take() {
            // What can't be closed cleanly is told of the writer's connection, which is the last one.
            let _ = connection.close().await;
        }
    }

    /// To be called after all connections are closed.
    pub(super) async fn close_file(&self) {
        self.copying.lock().await.database = None;
    }
}
