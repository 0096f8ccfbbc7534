//! What the ledger asks of a database: [`Store`] with its transactions and announcements.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::TimeDelta;
use uuid::Uuid;

use super::{
    Audit, BulkPage, Changes, EventPage, EventQuery, HeardWorker, JobPage, LedgerInfo, ListQuery, Loaded, Needs, Reach,
    RecordId, Statistics, StatisticsQuery, StoreError, TokenKey, WorkerPage,
};
use crate::domain::{
    access::ApiToken,
    bulk::BulkOperation,
    clock::Time,
    id::{Digest, JobId, LogId, OrgId},
    job::{Job, JobContents, JobRecord},
};

/// Bytes of payload and result together up to which a job is read along with others.
pub const LARGE_JOB: i32 = 64 << 10;

/// The result of reading one of several jobs.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum FoundJob {
    /// No such job.
    #[default]
    Nothing,
    /// The job.
    Whole(Arc<JobRecord>),
    /// A job of more than [`LARGE_JOB`] bytes, or whose last lease extension takes long to find. [`Store::job`] reads it.
    Large,
}

/// A database that stores the logs of orgs.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// How many transactions may be open, and how many orgs each may carry.
    fn capacity(&self) -> Capacity;

    /// Begins a transaction, locks the heads of these orgs until it ends, and then reads the clock. It waits for the head of a
    /// single org, but skips those of several orgs that are not free: [`Batch::orgs`] names the others.
    async fn begin(&self, orgs: &[OrgId]) -> Result<Box<dyn Batch>, StoreError>;

    /// The log id that the database was last seen to have. `None` for SQLite: nothing can replace the open database.
    fn log_id(&self) -> Option<LogId> {
        None
    }

    /// Begins a transaction from cached states, without a round trip, for orgs with these needs and numbers of commands. `None`
    /// if the states lack something, or another server may have written to a log. If a state is stale, or the changes take more
    /// than one statement, writing or committing fails with [`StoreError::Conflict`].
    fn begin_cached(&self, needs: &[(OrgId, Needs, usize)]) -> Option<Box<dyn Batch>> {
        let _ = needs;
        None
    }

    /// Reads one job with payload and result.
    async fn job(&self, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError>;

    /// Reads some jobs, of any orgs, in the given order. A large job comes as [`FoundJob::Large`].
    async fn jobs(&self, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError>;

    /// Tells which of these jobs, of any orgs, are current: they exist, and no event or lease extension came after.
    async fn unchanged(&self, jobs: &[&Job]) -> Result<Vec<bool>, StoreError>;

    /// Reads the payloads and results of some jobs, in any order. Jobs that don't exist are left out.
    async fn contents(&self, org: OrgId, ids: &[JobId]) -> Result<Vec<(JobId, JobContents)>, StoreError>;

    /// Reads a page of jobs, newest first.
    async fn list(&self, org: OrgId, query: &ListQuery) -> Result<JobPage, StoreError>;

    /// Reads a bulk operation of an org.
    async fn bulk_operation(&self, org: OrgId, id: Uuid) -> Result<Option<BulkOperation>, StoreError>;

    /// Reads a page of an org's bulk operations, the newest first: those before a time and id, and at most `limit`.
    async fn bulk_operations(
        &self,
        org: OrgId,
        before: Option<(Time, Uuid)>,
        limit: usize,
    ) -> Result<BulkPage, StoreError>;

    /// Reads the next page of an org's events, with the head and the floor of the same snapshot.
    async fn events(&self, org: OrgId, query: &EventQuery) -> Result<EventPage, StoreError>;

    /// Reads the org's statistics as of one `seq` of its log.
    async fn statistics(&self, org: OrgId, query: &StatisticsQuery) -> Result<Statistics, StoreError>;

    /// Reads how far the logs of some orgs have come.
    async fn reaches(&self, orgs: &[OrgId]) -> Result<Vec<(OrgId, Reach)>, StoreError>;

    /// Announces to the database's other servers how far logs have come. Returns at once. What can't be sent is sent later, or
    /// the other servers find it by reading the heads.
    fn announce(&self, reaches: &[(OrgId, Reach)]);

    /// Listens to the announcements of the database's other servers. `None` for SQLite, which has one server.
    fn listen(&self) -> Option<Box<dyn Listener>>;

    /// Reads the ids of at most `limit` orgs that have a log: those after `after`, in ascending order.
    async fn orgs(&self, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, StoreError>;

    /// Takes up to `limit` orgs with due work. On PostgreSQL no other server gets them for as long as `hold`.
    async fn take_due(&self, what: DueWork, limit: usize, hold: Duration) -> Result<Vec<OrgId>, StoreError>;

    /// Reads the API token of an org, or of none, whose secret has this SHA-256.
    async fn token(&self, org: Option<OrgId>, digest: Digest) -> Result<Option<ApiToken>, StoreError>;

    /// Makes this API token of an org, unless the org has `most` of them already. At that number tokens that ended an hour ago make
    /// room. Returns the token with the database's time, or `None` without room.
    async fn create_token(&self, token: &ApiToken, most: usize) -> Result<Option<ApiToken>, StoreError>;

    /// Reads at most `limit` API tokens of an org whose ids come after `after`, in ascending order, with their last use.
    async fn list_tokens(&self, org: OrgId, after: Uuid, limit: usize) -> Result<Vec<ApiToken>, StoreError>;

    /// Revokes an API token of an org, unless it was revoked before. `None` if the org has no such token.
    async fn revoke_token(&self, org: OrgId, id: Uuid) -> Result<Option<ApiToken>, StoreError>;

    /// Reads at most `limit` API tokens that were revoked after this revision of the credentials ([`LedgerInfo::credentials`]).
    async fn revoked_tokens(&self, since: i64, limit: usize) -> Result<Vec<TokenKey>, StoreError>;

    /// Records that API tokens were used. Each token comes once, in ascending order: servers would deadlock otherwise.
    async fn use_tokens(&self, used: &[TokenKey]) -> Result<(), StoreError>;

    /// Writes workers, each once, in the order of orgs and ids. Removes workers of `orgs`, at least the orgs of `heard`, that were
    /// silent for longer than `known_for`.
    async fn note_workers(&self, heard: &[HeardWorker], orgs: &[OrgId], known_for: Duration) -> Result<(), StoreError>;

    /// Reads at most `limit` workers of an org whose ids come after `after`, in ascending order: those that were not silent for
    /// longer than `known_for`.
    async fn workers(
        &self,
        org: OrgId,
        after: &str,
        limit: usize,
        known_for: Duration,
    ) -> Result<WorkerPage, StoreError>;

    /// Reads the log id, whether retention is paused, and the revision of the API tokens, on the server's own connections.
    async fn about(&self) -> Result<LedgerInfo, StoreError>;

    /// Reads the log id for a caller, on the connections that callers share.
    async fn read_log_id(&self) -> Result<LogId, StoreError>;

    /// The reads of `verify`.
    fn audit(&self) -> &dyn Audit;

    /// Makes partitions for the coming months, and drops past ones that are empty. PostgreSQL only.
    async fn maintain(&self) -> Result<(), StoreError>;

    /// Checks that the database answers, and reads its clock, without touching a table.
    async fn ping(&self) -> Result<Time, StoreError>;

    /// The version of the last migration, or of PostgreSQL's functions, if this server doesn't know it.
    async fn newer_migration(&self) -> Result<Option<i64>, StoreError>;

    /// Records what the clock says. Returns how far it has moved since any server last recorded it, `None` for the first time.
    /// If that is more than `unseen`, forwards or back, retention pauses for `doubt` from now on.
    async fn note_clock(&self, unseen: TimeDelta, doubt: Duration) -> Result<Option<TimeDelta>, StoreError>;

    /// The space on the database's disk, if that disk is on this machine.
    async fn disk(&self) -> Option<Disk> {
        None
    }

    /// Closes the database. The store must not be used afterwards.
    async fn close(&self);
}

/// A transaction over the logs of some orgs. Dropping it before [`Batch::commit`] rolls it back.
#[async_trait]
pub trait Batch: Send {
    /// The database's clock, read after the heads were locked.
    fn now(&self) -> Time;

    /// The orgs whose heads are locked: all that were asked for, or some of several.
    fn orgs(&self) -> &[OrgId];

    /// Loads what the commands of each org name, in the same order. May be called once for each org.
    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError>;

    /// Reads jobs that this transaction has [found ready](Loaded::ready), in any order. They lack stage and progress, which a
    /// claim clears.
    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError>;

    /// Writes the changes of each org. May be called once for each org. Returns the records that the batches leave, in the same
    /// order, `None` for an org without one.
    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError>;

    /// Has keys of these orgs looked up for a second, since a decision depends on [keys being new](Loaded::assumes_new_keys).
    /// The batch must not be written afterwards.
    fn doubt_keys(&mut self, _orgs: &[OrgId]) {}

    /// True if the log of an org whose head is locked has this record, so the batch that wrote it was committed.
    ///
    /// # Errors
    ///
    /// [`StoreError::OutcomeUnknown`] if records of its age have been removed.
    async fn has(&mut self, org: OrgId, record: RecordId) -> Result<bool, StoreError>;

    /// Commits the transaction.
    ///
    /// # Errors
    ///
    /// [`StoreError::OutcomeUnknown`] if the transaction may or may not have been committed.
    async fn commit(self: Box<Self>) -> Result<(), StoreError>;
}

/// Receives the announcements of other servers.
#[async_trait]
pub trait Listener: Send {
    /// Waits for the next announcement. It reconnects by itself, without end. The future may be dropped.
    async fn next(&mut self) -> News;
}

/// What a listener received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// These logs have come at least this far.
    Reaches(Vec<(OrgId, Reach)>),
    /// Announcements may have been missed.
    Missed,
}

/// The space on a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Bytes that may still be written.
    pub free: u64,
    /// Size of the disk.
    pub total: u64,
}

/// How many transactions may be open, and how many orgs each may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Transactions that may be open at the same time, at least 1.
    pub transactions: usize,
    /// Orgs that one transaction may carry, at least 1.
    pub orgs: usize,
}

/// Kinds of work that may be due in an org.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueWork {
    /// Leases and attempts that end, waits that are over, rows to fold.
    Jobs,
    /// Finished jobs whose retention time is over.
    Retention,
}
