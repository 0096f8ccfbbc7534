//! The ledger in one SQLite file.
//!
//! One connection writes, under `BEGIN IMMEDIATE`; pools of read-only connections read. WAL lets readers go on while
//! the writer commits, and `synchronous=FULL` makes a commit survive a power cut.

mod audit;
mod backup;
mod batch;
mod bulk;
mod checkpoints;
mod columns;
mod database;
mod erasure;
mod error;
mod expired;
mod file;
mod heads;
mod import;
mod list;
mod load;
mod migrations;
mod own_log;
mod read;
mod restore;
mod series;
mod set;
mod statistics;
mod tokens;
mod wal;
mod workers;
mod write;

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use chrono::TimeDelta;
use sqlx::{
    ConnectOptions, Connection, Sqlite, SqliteConnection, SqlitePool,
    query::Query,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

pub(super) use self::database::SqliteFile;
use self::{
    checkpoints::Checkpoints,
    columns::{Columns, micros},
    error::store_error,
    file::{create, find, is_open_to_others, lock, resolve},
    wal::{Gate, Keeper},
};
use super::{
    Audit, Batch, BulkPage, Capacity, Disk, DueWork, EventPage, EventQuery, FileUse, FoundJob, HeardWorker, JobPage,
    LedgerInfo, ListQuery, Listener, OpenOptions, Reach, Statistics, StatisticsQuery, Store, StoreError, TokenKey,
    WorkerPage,
};
use crate::{
    domain::{
        access::ApiToken,
        bulk::BulkOperation,
        clock::{Clock, Time},
        id::{Digest, JobId, LogId, OrgId},
        job::{Job, JobContents, JobRecord},
    },
    store::{rows::Columns as _, states::States},
};

/// The oldest SQLite that may be linked. 3.51.3 fixed a corruption of WAL files on reset.
const OLDEST_SQLITE: &str = "3.51.3";
/// Readers for callers: as many as the ledger has turns of reads in all, so that no read with a turn waits here.
const READ_CONNECTIONS: u32 = 16;
/// Readers for the server's own work (credentials, due orgs, pings). No caller can occupy them.
const OWN_CONNECTIONS: u32 = 3;
/// Readers of jobs by id: the most processors that these reads should keep busy.
const JOB_CONNECTIONS: u32 = 2;
/// How long a read waits for a free connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a transaction waits for another process that writes (an import, a backup).
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Rows that SQLite's thread reads ahead before it waits for the reader. Few, because an event may have a mebibyte.
const ROW_BUFFER: usize = 8;
/// The same for jobs without payloads and results: for batches, and for reads of several jobs.
const JOB_BUFFER: usize = 1_024;
/// SQLite's page cache of the writer. A negative value is in KiB.
const WRITER_CACHE: &str = "-65536";
/// Prepared statements that the writer caches. Their texts differ by the number of rows and by the columns that the
/// rows share. Preparing a statement of many rows takes a millisecond.
const WRITER_STATEMENTS: usize = 256;
/// WAL pages (128 MiB) after which commits checkpoint, because checkpoints beside the writer failed, or because overlapping
/// reads never left a moment for the WAL to begin anew.
const CHECKPOINT_PAGES: &str = "32768";

/// An open SQLite ledger.
pub struct SqliteStore {
    /// The tasks that keep the WAL short. They end with the store.
    _keeping: Option<[AbortOnDropHandle<()>; 2]>,
    checkpoints: Arc<Checkpoints>,
    /// `None` after a transaction was abandoned: its connection is dropped with it, and the next transaction opens another.
    writer: Arc<Mutex<Option<SqliteConnection>>>,
    write_options: SqliteConnectOptions,
    orgs_per_transaction: usize,
    readers: SqlitePool,
    job_readers: SqlitePool,
    own: SqlitePool,
    path: PathBuf,
    clock: Arc<dyn Clock>,
    states: Arc<States>,
    /// Locked until the store is closed, so that a second server on the same file is refused.
    lock: parking_lot::Mutex<Option<File>>,
}

/// How readers and the writer connect.
fn connect_options(path: &Path) -> (SqliteConnectOptions, SqliteConnectOptions) {
    let base = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .row_buffer_size(ROW_BUFFER)
        .disable_statement_logging();
    let write = base
        .clone()
        .row_buffer_size(JOB_BUFFER)
        .statement_cache_capacity(WRITER_STATEMENTS)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", WRITER_CACHE)
        // SQLite's statement journals stay in memory too.
        .pragma("temp_store", "MEMORY")
        // What is removed or overwritten is not left in free space: an erased job may have been written many times before.
        .pragma("secure_delete", "ON")
        .pragma("wal_autocheckpoint", CHECKPOINT_PAGES);
    (base, write)
}

/// A pool of `most` readers, which wait at the gate before they are used.
fn read_pool(most: u32, gate: &Gate) -> SqlitePoolOptions {
    let pool = SqlitePoolOptions::new().max_connections(most).acquire_timeout(ACQUIRE_TIMEOUT);
    let new = gate.clone();
    let pool = pool.after_connect(move |_, _| {
        let gate = new.clone();
        Box::pin(async move {
            gate.pass().await;
            Ok(())
        })
    });
    let idle = gate.clone();
    let pool = pool.before_acquire(move |_, _| {
        let gate = idle.clone();
        Box::pin(async move {
            gate.pass().await;
            Ok(true)
        })
    });
    // Readers stay open. After a failed commit the writer's connection is replaced. If it were the file's only
    // connection, SQLite would recover the whole WAL, and take frames for committed that were never synced to the disk.
    pool.idle_timeout(None).max_lifetime(None)
}

impl SqliteStore {
    /// Opens the file. Creates and migrates it where `options` allow that.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unusable`] if another server has it open, if a newer server migrated it, or if it is no database.
    pub async fn open(path: &Path, options: OpenOptions) -> Result<Self, StoreError> {
        let path = &if options.file_use == FileUse::Beside { find(path)? } else { resolve(path)? };
        let lock = match options.file_use {
            FileUse::Serve => Some(lock(path).await?),
            FileUse::Prepare => file::prepare(path).await?,
            FileUse::Beside => None,
        };
        let may_change = lock.is_some();
        if may_change {
            create(path)?;
        }
        own_log::check(path).await?;
        // Uses the path, not an open file: closing a file drops all locks that SQLite has on it in this process.
        if std::fs::metadata(path).is_ok_and(|found| is_open_to_others(&found)) {
            tracing::warn!(file = %path.display(), "other users can access the database and its -wal and -shm files: chmod 600");
        }
        let (base, write_options) = connect_options(path);
        let unusable = |error: sqlx::Error| StoreError::Unusable(format!("can't open {}: {error}", path.display()));
        let mut writer = write_options.connect().await.map_err(unusable)?;
        assert_version(&mut writer).await?;
        migrations::prepare(&mut writer, options.migrate && may_change).await?;
        if let Some(lock) = &lock {
            own_log::mark(path, &mut writer, lock).await?;
        }
        let base = base.read_only(true);
        let gate = Gate::open();
        let pool = |most| read_pool(most, &gate);
        let of_jobs = base.clone().row_buffer_size(JOB_BUFFER);
        let job_readers = pool(JOB_CONNECTIONS).connect_with(of_jobs).await.map_err(unusable)?;
        let readers = pool(READ_CONNECTIONS).connect_with(base.clone()).await.map_err(unusable)?;
        let own = pool(OWN_CONNECTIONS).connect_with(base).await.map_err(unusable)?;
        let writer = Arc::new(Mutex::new(Some(writer)));
        let checkpoints = Arc::new(Checkpoints::new(path, write_options.clone()));
        let keeper = Keeper {
            gate,
            path: wal::path_of(path),
            limit: options.max_wal,
            pools: [readers.clone(), job_readers.clone(), own.clone()],
            writer: Arc::downgrade(&writer),
            checkpoints: Arc::clone(&checkpoints),
        };
        let (copying, of_copying) = (Arc::clone(&checkpoints), Arc::downgrade(&writer));
        let keeping = (options.file_use == FileUse::Serve).then(|| {
            let copying = tokio::spawn(async move { copying.run(of_copying).await });
            [tokio::spawn(keeper.run()), copying].map(AbortOnDropHandle::new)
        });
        Ok(Self {
            _keeping: keeping,
            checkpoints,
            writer,
            write_options,
            orgs_per_transaction: options.orgs_per_transaction as usize,
            readers,
            job_readers,
            own,
            path: path.to_owned(),
            clock: options.clock,
            states: Arc::new(States::new(options.fold_after)),
            lock: parking_lot::Mutex::new(lock.filter(|_| options.file_use == FileUse::Serve)),
        })
    }

    /// Runs one statement on the writer connection, outside a batch. The process may be another one than the server.
    async fn write(&self, query: Query<'_, Sqlite, SqliteArguments>) -> Result<(), StoreError> {
        let (mut slot, mut writer) = self.take_writer().await?;
        query.execute(&mut writer).await.map_err(store_error)?;
        *slot = Some(writer);
        self.checkpoints.committed();
        Ok(())
    }

    /// The connection that writes, and its slot, to which it is given back only if all went well: else nobody knows in which
    /// state it is. Batches wait for it.
    async fn take_writer(&self) -> Result<(MutexGuard<'_, Option<SqliteConnection>>, SqliteConnection), StoreError> {
        let mut slot = self.writer.lock().await;
        let writer = match slot.take() {
            Some(writer) => writer,
            None => self.connect_writer().await?,
        };
        Ok((slot, writer))
    }

    async fn connect_writer(&self) -> Result<SqliteConnection, StoreError> {
        self.write_options.connect().await.map_err(store_error)
    }
}

async fn assert_version(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let version: String = sqlx::query_scalar("/* assert_version */ SELECT sqlite_version()")
        .fetch_one(connection)
        .await
        .map_err(store_error)?;
    let number = |text: &str| text.split('.').map(|part| part.parse().unwrap_or(0)).collect::<Vec<u32>>();
    if number(&version) < number(OLDEST_SQLITE) {
        return Err(StoreError::Unusable(format!("SQLite {version} is linked, {OLDEST_SQLITE} or later is needed")));
    }
    Ok(())
}

#[async_trait]
impl Store for SqliteStore {
    fn capacity(&self) -> Capacity {
        Capacity { transactions: 1, orgs: self.orgs_per_transaction }
    }

    async fn begin(&self, orgs: &[OrgId]) -> Result<Box<dyn Batch>, StoreError> {
        let mut slot = Arc::clone(&self.writer).lock_owned().await;
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => self.connect_writer().await?,
        };
        // SQLite has one writer, so this locks the heads of all orgs.
        sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await.map_err(store_error)?;
        let known = (Arc::clone(&self.states), Arc::clone(&self.checkpoints));
        Ok(Box::new(batch::SqliteBatch::new(slot, connection, self.clock.now(), known, orgs)))
    }

    async fn job(&self, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        read::job(&self.readers, org, id).await
    }

    async fn jobs(&self, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError> {
        read::jobs(&self.job_readers, names).await
    }

    async fn unchanged(&self, jobs: &[&Job]) -> Result<Vec<bool>, StoreError> {
        read::unchanged(&self.job_readers, jobs).await
    }

    async fn bulk_operation(&self, org: OrgId, id: Uuid) -> Result<Option<BulkOperation>, StoreError> {
        bulk::one(&mut *self.readers.acquire().await.map_err(store_error)?, org, id).await
    }

    async fn bulk_operations(
        &self,
        org: OrgId,
        before: Option<(Time, Uuid)>,
        limit: usize,
    ) -> Result<BulkPage, StoreError> {
        bulk::page(&self.readers, org, before, limit).await
    }

    async fn events(&self, org: OrgId, query: &EventQuery) -> Result<EventPage, StoreError> {
        read::events(&self.readers, org, query).await
    }

    async fn statistics(&self, org: OrgId, query: &StatisticsQuery) -> Result<Statistics, StoreError> {
        statistics::statistics(&self.readers, &*self.clock, org, query).await
    }

    async fn contents(&self, org: OrgId, ids: &[JobId]) -> Result<Vec<(JobId, JobContents)>, StoreError> {
        read::contents(&self.readers, org, ids).await
    }

    async fn list(&self, org: OrgId, query: &ListQuery) -> Result<JobPage, StoreError> {
        list::list(&self.readers, org, query).await
    }

    async fn reaches(&self, orgs: &[OrgId]) -> Result<Vec<(OrgId, Reach)>, StoreError> {
        read::reaches(&self.own, orgs).await
    }

    /// Nothing to do: no other server may have the file open.
    fn announce(&self, _reaches: &[(OrgId, Reach)]) {}

    fn listen(&self) -> Option<Box<dyn Listener>> {
        None
    }

    async fn orgs(&self, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, StoreError> {
        read::orgs(&self.own, after, limit).await
    }

    async fn take_due(&self, what: DueWork, limit: usize, _hold: Duration) -> Result<Vec<OrgId>, StoreError> {
        let mut due = read::due(&self.own, &*self.clock, what, limit).await?;
        if what == DueWork::Jobs {
            // The sweep also folds, so orgs whose rows have been behind for long count as due.
            let stale = self.states.stale(self.clock.now(), limit - due.len());
            due.extend(stale.into_iter().filter(|org| !due.contains(org)).collect::<Vec<_>>());
        }
        Ok(due)
    }

    async fn token(&self, org: Option<OrgId>, digest: Digest) -> Result<Option<ApiToken>, StoreError> {
        tokens::find(&self.own, org, digest).await
    }

    async fn create_token(&self, token: &ApiToken, most: usize) -> Result<Option<ApiToken>, StoreError> {
        let now = self.clock.now();
        // Batches wait for the writer: it is taken only if there is something to write.
        if !tokens::may_have_room(&self.readers, token.org, most, now).await? {
            return Ok(None);
        }
        let (mut slot, mut writer) = self.take_writer().await?;
        let created = tokens::create(&mut writer, token, most, now).await?;
        *slot = Some(writer);
        self.checkpoints.committed();
        Ok(created)
    }

    async fn list_tokens(&self, org: OrgId, after: Uuid, limit: usize) -> Result<Vec<ApiToken>, StoreError> {
        tokens::page(&self.readers, org, after, limit).await
    }

    async fn revoke_token(&self, org: OrgId, id: Uuid) -> Result<Option<ApiToken>, StoreError> {
        if let Some(token) = tokens::of_org(&self.readers, org, id).await?
            && token.revoked_at.is_none()
        {
            let (mut slot, mut writer) = self.take_writer().await?;
            tokens::end_of(&mut writer, id, self.clock.now()).await?;
            *slot = Some(writer);
            self.checkpoints.committed();
        }
        tokens::of_org(&self.readers, org, id).await
    }

    async fn revoked_tokens(&self, since: i64, limit: usize) -> Result<Vec<TokenKey>, StoreError> {
        tokens::revoked(&self.own, since, limit).await
    }

    async fn use_tokens(&self, used: &[TokenKey]) -> Result<(), StoreError> {
        self.write(tokens::note_use(used, self.clock.now())).await
    }

    async fn note_workers(&self, heard: &[HeardWorker], orgs: &[OrgId], known_for: Duration) -> Result<(), StoreError> {
        let now = self.clock.now();
        if !heard.is_empty() {
            self.write(workers::note(heard, now)).await?;
        }
        self.write(workers::forget(orgs, known_for, now)).await
    }

    async fn workers(
        &self,
        org: OrgId,
        after: &str,
        limit: usize,
        known_for: Duration,
    ) -> Result<WorkerPage, StoreError> {
        workers::page(&self.readers, org, after, limit, known_for, self.clock.now()).await
    }

    async fn about(&self) -> Result<LedgerInfo, StoreError> {
        read::about(&self.own, &*self.clock).await
    }

    async fn read_log_id(&self) -> Result<LogId, StoreError> {
        Ok(read::about(&self.readers, &*self.clock).await?.log_id)
    }

    fn audit(&self) -> &dyn Audit {
        self
    }

    async fn maintain(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn ping(&self) -> Result<Time, StoreError> {
        sqlx::query("/* ping */ SELECT 1").execute(&self.own).await.map_err(store_error)?;
        Ok(self.clock.now())
    }

    async fn newer_migration(&self) -> Result<Option<i64>, StoreError> {
        let sql = "/* newer_migration */ SELECT coalesce(max(version), 0) FROM _sqlx_migrations";
        let last = sqlx::query_scalar(sql).fetch_one(&self.own).await.map_err(store_error)?;
        Ok(crate::store::migrations::newer(last))
    }

    async fn note_clock(&self, unseen: TimeDelta, doubt: Duration) -> Result<Option<TimeDelta>, StoreError> {
        let sql = "/* note_clock */ SELECT clock_seen_at FROM ledger";
        let row = sqlx::query(sql).fetch_one(&self.own).await.map_err(store_error)?;
        let (before, now) = (Columns::of(&row).optional_time()?, self.clock.now());
        let sql = "/* note_clock */ UPDATE ledger SET clock_seen_at = $1,
            retention_paused_until = CASE WHEN abs($1 - clock_seen_at) > $2 THEN $3 ELSE retention_paused_until END";
        let unseen = unseen.num_microseconds().unwrap_or(i64::MAX);
        self.write(sqlx::query(sql).bind(micros(now)).bind(unseen).bind(micros(now + doubt))).await?;
        Ok(before.map(|before| now - before))
    }

    async fn disk(&self) -> Option<Disk> {
        let path = self.path.clone();
        // On its own thread, because a disk may hang.
        let found = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&path)).await.ok()?.ok()?;
        Some(Disk { free: found.f_bavail * found.f_frsize, total: found.f_blocks * found.f_frsize })
    }

    async fn close(&self) {
        self.checkpoints.close().await;
        self.readers.close().await;
        self.job_readers.close().await;
        self.own.close().await;
        if let Some(writer) = self.writer.lock().await.take()
            && let Err(error) = writer.close().await
        {
            tracing::warn!(%error, "the database was not closed cleanly; its log is replayed at the next start");
        }
        self.checkpoints.close_file().await;
        drop(self.lock.lock().take());
    }
}
