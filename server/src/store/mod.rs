//! Where logs are kept: one trait, a folder for each database.
//!
//! The trait is the lane protocol cut where the database ends and the decisions begin: [`Store::begin`] locks the heads of
//! some orgs and reads the clock, [`Batch::load`] brings what the commands name, pure code decides, [`Batch::write`]
//! takes what has changed, and [`Batch::commit`] makes it durable. Reads are single statements outside transactions.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::TimeDelta;
use thiserror::Error;

use crate::domain::{
    access::ApiToken,
    clock::{Clock, Time},
    id::{Digest, JobId, LogId, OrgId},
    job::{Job, JobContents, JobRecord},
};

mod audit;
mod changed;
mod changes;
mod copies;
mod detail;
mod expired;
mod extension;
mod image;
mod imports;
mod job_columns;
pub mod migrations;
pub mod postgres;
mod query;
mod ready;
mod record;
mod row_writes;
mod rows;
mod series;
pub mod sqlite;
mod state;
mod states;
pub mod tokens;
mod url;
mod value;
mod window;

pub use self::{
    audit::{About, Audit, LONGEST_PAUSE, Scheduled, Stretch},
    changed::{Changed, Differs},
    changes::{Changes, HeldBy, Loaded, MAX_SMALL_PAYLOAD, Needs, NewPayload, NextDue, Retention, StatusCounts},
    copies::{Restored, RevokeTokens, backup, renew_log_id, restore},
    expired::{Expired, Most, Slice},
    query::{
        EventFilter, EventPage, EventQuery, JobFilter, JobPage, ListQuery, SeriesKind, SeriesPoint, Statistics,
        StatisticsQuery, TypeStatistics,
    },
    ready::{ClaimOrder, FoundReady, Ready, ReadyJob},
    record::RecordId,
    series::{Bucket, RemovedFlow, Series, Tally, told_since},
    url::DatabaseUrl,
};
use self::{
    imports::{of_imported, other_than},
    query::{LIST_SCAN, SCAN_WINDOW},
};

/// Opens the store that the URL names.
///
/// # Errors
///
/// If the database can't be opened or migrated, is in use by another server, is newer than this one, or is served by a
/// role that must not serve it.
pub async fn open(url: &DatabaseUrl, options: OpenOptions) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        DatabaseUrl::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::open(path.as_ref(), options).await?)),
        DatabaseUrl::Postgres(url) => Ok(Arc::new(postgres::PostgresStore::open(url, options).await?)),
        DatabaseUrl::Other => Err(DatabaseUrl::refused()),
    }
}

/// True of an SQLite file that a server has: whoever writes to it meanwhile keeps that server waiting.
///
/// # Errors
///
/// If it can't be told.
pub fn is_served(url: &DatabaseUrl) -> Result<bool, StoreError> {
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::is_served(path.as_ref()),
        DatabaseUrl::Postgres(_) | DatabaseUrl::Other => Ok(false),
    }
}

/// How to open a store.
#[derive(Clone)]
pub struct OpenOptions {
    /// The clock of an embedded database; a database server has its own.
    pub clock: Arc<dyn Clock>,
    /// Whether to bring the database to this server's schema; otherwise one that is behind is refused.
    pub migrate: bool,
    /// Whether to refuse a role to which row-level security does not apply, instead of warning of it. PostgreSQL only.
    pub require_rls: bool,
    /// Transactions that may be open at the same time; at least 1. PostgreSQL only.
    pub write_connections: u32,
    /// Orgs whose batches one transaction may carry; at least 1.
    pub orgs_per_transaction: u32,
    /// Reads that may be under way at the same time; at least 1. PostgreSQL only.
    pub read_connections: u32,
    /// How long the row of a running job may lack what the log says, about; at most a year. Far behind, or of many, it is written earlier.
    pub fold_after: Duration,
    /// What the log beside the database may grow to before reads wait for it to begin anew, in bytes. SQLite only.
    pub max_wal: u64,
    /// What for. SQLite only: one server has the file for itself.
    pub file_use: FileUse,
}

/// What an SQLite file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileUse {
    /// To be served: no other server may have it.
    Serve,
    /// To be read or written beside a server, if there is one. It is neither created nor migrated.
    Beside,
    /// The same, but where no server has it, it is created and migrated first.
    Prepare,
}

/// Orgs whose batches share a transaction, unless it is said otherwise.
pub const ORGS_PER_TRANSACTION: u32 = 64;

impl OpenOptions {
    /// The defaults, with this clock.
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

/// What payload and result of a job may have together, in bytes, to be read with others.
pub const LARGE_JOB: i32 = 64 << 10;

/// What is found where one of several jobs should be.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum FoundJob {
    /// No such job.
    #[default]
    Nothing,
    /// The job.
    Whole(Arc<JobRecord>),
    /// It is there, and more than [`LARGE_JOB`], or takes long to find out about: to be read alone.
    Large,
}

/// A database that keeps logs.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// How transactions may be used.
    fn capacity(&self) -> Capacity;

    /// Begins a transaction that holds the heads of these orgs until it ends, and reads the clock once they are held. It waits for the
    /// head of one org; of several it holds those that are free, see [`Batch::orgs`].
    async fn begin(&self, orgs: &[OrgId]) -> Result<Box<dyn Batch>, StoreError>;

    /// Which log the database is known to have, where another may take its place while it is open.
    fn log_id(&self) -> Option<LogId> {
        None
    }

    /// Begins a transaction on some orgs from memory alone, where these are all the needs of so many commands, and this server was the
    /// last to write the logs as far as it knows. If they are not as it has left them, or what is written takes more, writing or
    /// committing it is a [`StoreError::Conflict`], and nothing has happened.
    fn recall(&self, needs: &[(OrgId, Needs, usize)]) -> Option<Box<dyn Batch>> {
        let _ = needs;
        None
    }

    /// Reads one job with payload and result.
    async fn job(&self, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError>;

    /// Reads some jobs, of any orgs, in the order in which they are named; without those that are [large](FoundJob::Large).
    async fn jobs(&self, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError>;

    /// Which of these jobs, of any orgs, are still there as they are here: no event of theirs has come, and no lease was extended.
    async fn unchanged(&self, jobs: &[&Job]) -> Result<Vec<bool>, StoreError>;

    /// Reads the payloads and results of some jobs, in no order; without those that don't exist.
    async fn contents(&self, org: OrgId, ids: &[JobId]) -> Result<Vec<(JobId, JobContents)>, StoreError>;

    /// Reads a page of jobs, the newest first.
    async fn list(&self, org: OrgId, query: &ListQuery) -> Result<JobPage, StoreError>;

    /// Reads the next page of an org's events, with the head and the floor of the same snapshot.
    async fn events(&self, org: OrgId, query: &EventQuery) -> Result<EventPage, StoreError>;

    /// Reads the org's statistics as of one place in its log.
    async fn statistics(&self, org: OrgId, query: &StatisticsQuery) -> Result<Statistics, StoreError>;

    /// Reads how far the logs of some orgs reach.
    async fn reaches(&self, orgs: &[OrgId]) -> Result<Vec<(OrgId, Reach)>, StoreError>;

    /// Tells other servers on the same database how far logs reach. Returns at once; what can't be told now is told later,
    /// or found by those who look.
    fn announce(&self, reaches: &[(OrgId, Reach)]);

    /// Listens to what other servers on the same database announce; `None` where there are no others.
    fn listen(&self) -> Option<Box<dyn Listener>>;

    /// Reads some orgs that have a log: those after `after`, in the order of their ids, at most `limit`.
    async fn orgs(&self, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, StoreError>;

    /// Takes up to `limit` orgs in which something is due, and leaves them to the caller for as long as `hold`.
    async fn take_due(&self, what: DueWork, limit: usize, hold: Duration) -> Result<Vec<OrgId>, StoreError>;

    /// The API token of an org, or of none, whose secret has this SHA-256.
    async fn token(&self, org: Option<OrgId>, digest: Digest) -> Result<Option<ApiToken>, StoreError>;

    /// Notes that API tokens were used, by their orgs and digests: each once, in their order.
    async fn use_tokens(&self, used: &[(Option<OrgId>, Digest)]) -> Result<(), StoreError>;

    /// Reads what the database says of itself: by connections that no caller can take.
    async fn about(&self) -> Result<About, StoreError>;

    /// Reads the log's identity for a caller, who takes none of the connections of [`Store::about`] for it.
    async fn read_log_id(&self) -> Result<LogId, StoreError>;

    /// What a verification asks.
    fn audit(&self) -> &dyn Audit;

    /// Does what the database itself needs now and then: partitions of the months to come, and none that is empty and past.
    async fn maintain(&self) -> Result<(), StoreError>;

    /// Asks for a sign of life, and what the clock says; without touching a table.
    async fn ping(&self) -> Result<Time, StoreError>;

    /// The last migration, if it is one that this server doesn't know: a newer one has come since it was opened.
    async fn newer_migration(&self) -> Result<Option<i64>, StoreError>;

    /// Notes that the clock was seen, and tells how far it has come since any server did last; `None` if none has. If that is more than
    /// `unseen`, either way, retention waits for as long as `doubt` from then on.
    async fn note_clock(&self, unseen: TimeDelta, doubt: Duration) -> Result<Option<TimeDelta>, StoreError>;

    /// What room there is on the database's disk, where that is this machine's.
    async fn disk(&self) -> Option<Disk> {
        None
    }

    /// Lets go of the database. Nothing may be asked of the store afterwards.
    async fn close(&self);
}

/// A transaction over the logs of some orgs. Dropped before [`Batch::commit`], it never was.
#[async_trait]
pub trait Batch: Send {
    /// The database's clock, read after the heads were won.
    fn now(&self) -> Time;

    /// The orgs whose heads it holds: all that were asked for, or of several some.
    fn orgs(&self) -> &[OrgId];

    /// Brings what the commands on each of some orgs name, in the same order. Once for an org.
    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError>;

    /// Reads jobs that the same transaction has found to be [ready](Loaded::ready), in no order, without stage and progress, which a
    /// claim clears.
    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError>;

    /// Writes what has changed in each of some orgs. The records that the batch leaves in their logs, in the same order; `None` where
    /// nothing of one changes. Once for an org.
    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError>;

    /// Answers on these orgs rest on [keys being new](Loaded::assumes_new_keys): for a while they are looked up. Nothing may be written then.
    fn doubt_keys(&mut self, _orgs: &[OrgId]) {}

    /// True if this record is in the log of an org that the transaction holds, and so the batch happened that wrote it.
    ///
    /// # Errors
    ///
    /// [`StoreError::OutcomeUnknown`] if records of its age are kept no longer.
    async fn has(&mut self, org: OrgId, record: RecordId) -> Result<bool, StoreError>;

    /// Makes everything durable.
    ///
    /// # Errors
    ///
    /// [`StoreError::OutcomeUnknown`] if it can't be told whether the transaction was committed.
    async fn commit(self: Box<Self>) -> Result<(), StoreError>;
}

/// Hears what other servers announce.
#[async_trait]
pub trait Listener: Send {
    /// The next announcement. Reconnects by itself, for ever; may be dropped while it waits.
    async fn next(&mut self) -> News;
}

/// What was heard from other servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// These logs reach at least so far.
    Reaches(Vec<(OrgId, Reach)>),
    /// Announcements may have been missed.
    Missed,
}

/// A disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// What may still be written.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// How transactions may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Transactions that may be open at the same time; at least 1.
    pub transactions: usize,
    /// Orgs that one transaction may hold; at least 1.
    pub orgs: usize,
}

/// The end of an org's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// `seq` of the last event; 0 before the first.
    pub seq: i64,
    /// The lowest `seq` from which on the log is whole.
    pub floor: i64,
    /// `recorded_at` of the last event.
    pub recorded_at: Option<Time>,
    /// How many types the org's jobs have.
    pub types: i64,
    /// How many batches have made a job ready.
    pub ready_gen: i64,
    /// What the org has.
    pub stock: Stock,
}

/// What an org has in the database, by which its quotas go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stock {
    /// Its jobs, those that have ended among them.
    pub jobs: i64,
    /// What they and their events take, about, in bytes: [`Job::weight`] and [`JobEvent::weight`](crate::domain::event::JobEvent::weight) of
    /// all, those events among them that are still to go of jobs that are gone.
    pub bytes: i64,
}

impl Head {
    /// The head of a log without events.
    pub const EMPTY: Self =
        Self { seq: 0, floor: 1, recorded_at: None, types: 0, ready_gen: 0, stock: Stock { jobs: 0, bytes: 0 } };

    /// What others are told of it.
    pub const fn reach(&self) -> Reach {
        Reach { seq: self.seq, ready_gen: self.ready_gen }
    }
}

/// How far a log has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    /// `seq` of the last event.
    pub seq: i64,
    /// How many batches have made a job ready.
    pub ready_gen: i64,
}

impl Reach {
    /// The farther of two, each way.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { seq: self.seq.max(other.seq), ready_gen: self.ready_gen.max(other.ready_gen) }
    }
}

/// What may be due in an org.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueWork {
    /// Leases and attempts that end, waits that are over.
    Jobs,
    /// Finished jobs that are kept no longer.
    Retention,
}

/// What can go wrong with a database, in terms of what to do about it.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It doesn't answer, or not in time. Nothing was committed.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// It gave the transaction up for the sake of another. Nothing was committed; it may be run again.
    #[error("the transaction got in the way of another: {0}")]
    Conflict(String),
    /// It refused data that validation let through. Nothing was committed.
    #[error("the database refused the data: {0}")]
    Refused(String),
    /// The disk is full. Nothing was committed; reads still work.
    #[error("the database's disk is full: {0}")]
    Full(String),
    /// The connection broke while the transaction was being committed.
    #[error("it is not known whether the transaction was committed: {0}")]
    OutcomeUnknown(String),
    /// It can't be used: wrong file, wrong version, in use, damaged.
    #[error("{0}")]
    Unusable(String),
}
