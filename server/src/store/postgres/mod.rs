//! The ledger in a PostgreSQL database, which any number of servers share.
//!
//! A batch locks its org's head row, so an org's log is serial across servers. Servers announce what they commit by NOTIFY
//! (`notify.rs`). Each unit of work names its org to row-level security for its transaction only. Server and database both
//! bound its time.

mod audit;
mod batch;
mod begin;
mod bulk;
mod cache;
mod cached_batch;
mod columns;
mod connections;
mod database;
mod erasure;
mod error;
mod expired;
mod fold;
mod import;
mod jobs;
mod lingering;
mod list;
mod load;
mod migrations;
mod notify;
mod read;
mod roles;
mod series;
mod settings;
mod statement;
mod statistics;
mod tokens;
mod warnings;
mod workers;
mod write;

use std::{str::FromStr, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::TimeDelta;
use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;
use uuid::Uuid;

pub(super) use self::database::PostgresDatabase;
pub use self::roles::role_sql;
use self::{cache::Cache, connections::Connections, error::store_error, notify::Announcer};
use super::{
    Audit, Batch, BulkPage, Capacity, DueWork, EventPage, EventQuery, FoundJob, HeardWorker, JobPage, LedgerInfo,
    ListQuery, Listener, Needs, OpenOptions, Reach, Statistics, StatisticsQuery, Store, StoreError, TokenKey,
    WorkerPage,
};
use crate::domain::{
    access::ApiToken,
    bulk::BulkOperation,
    clock::Time,
    id::{Digest, JobId, LogId, OrgId},
    job::{Job, JobContents, JobRecord},
};

/// The oldest PostgreSQL that is supported, as in `server_version_num`.
const OLDEST_SERVER: i32 = 140_000;
/// How many months ahead partitions of `job_event` are made. Not more: a read without an upper time bound visits each of them.
const MONTHS_AHEAD: i32 = 2;

/// The settings of every session: bounds on how long anything takes, and keepalives that notice a vanished peer. A server that
/// vanishes while it has an org's head locked blocks that org for no longer than these bounds.
const SESSION: [(&str, &str); 11] = [
    // Whatever the database's default is: a statement that has waited for a lock must see what was committed meanwhile.
    ("default_transaction_isolation", "read committed"),
    ("statement_timeout", "10s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "5s"),
    ("client_connection_check_interval", "2s"),
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "2"),
    ("tcp_keepalives_count", "2"),
    ("tcp_user_timeout", "9s"),
    ("jit", "off"),
    // If a commit's wait for a standby is cut short, only a warning says so.
    ("client_min_messages", "warning"),
];

/// Settings of connections that read. The little that they write (due times of orgs, when the clock was seen) may be lost with
/// a primary. If it waited for a standby, it would occupy the connections that reads need.
const NOT_REPLICATED: [(&str, &str); 1] = [("synchronous_commit", "local")];

/// Every statement is planned once, for tables of any size: a plan made for a small table must not walk it once it is large.
/// First rows come in the order of an index, never from a sort of all rows. If the statistics are older than such rows,
/// PostgreSQL expects one row, which costs nothing to sort.
const ONE_PLAN: [(&str, &str); 4] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_sort", "off"),
    ("enable_incremental_sort", "off"),
];
/// Batches look rows up one by one, by keys among their arguments.
const BY_KEY: [(&str, &str); 3] =
    [("enable_hashjoin", "off"), ("enable_mergejoin", "off"), ("enable_bitmapscan", "off")];

/// Opened at the start: a new one under load would take a caller's time.
const OWN_CONNECTIONS: u32 = 3;

/// A ledger in a PostgreSQL database.
pub struct PostgresStore {
    writers: Arc<Connections>,
    readers: Arc<Connections>,
    /// For the server's own work, so that calls can't occupy its connections: credentials, due work, pings.
    own: Arc<Connections>,
    write_connections: usize,
    orgs_per_transaction: usize,
    options: PgConnectOptions,
    announcer: Announcer,
    memory: Arc<Cache>,
}

fn connect_options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options = PgConnectOptions::from_str(url)
        .map_err(|error| StoreError::Unusable(format!("not a PostgreSQL URL: {error}")))?;
    Ok(options.disable_statement_logging().application_name("jobledger"))
}

/// Opens a connection outside the pools.
async fn connect(options: &PgConnectOptions) -> Result<PgConnection, StoreError> {
    let host = options.get_host();
    let fail = |reason: String| StoreError::Unavailable(format!("can't connect to PostgreSQL at {host}: {reason}"));
    match timeout(Duration::from_secs(10), options.connect()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(match store_error(error) {
            StoreError::Unavailable(reason) => fail(reason),
            other => other,
        }),
        Err(_) => Err(fail("no answer in time".to_owned())),
    }
}

impl PostgresStore {
    /// Opens the database, and migrates it if `options.migrate` is set.
    ///
    /// # Errors
    ///
    /// If it does not answer, is older than PostgreSQL 14, is not UTF-8, lacks migrations that this server may not apply, was
    /// migrated by a newer server, or is served by a role that must not serve it.
    pub(super) async fn open(url: &str, options: OpenOptions) -> Result<Self, StoreError> {
        let base = connect_options(url)?;
        let mut connection = connect(&base).await?;
        assert_usable(&mut connection).await?;
        migrations::prepare(&mut connection, options.migrate).await?;
        roles::check(&mut connection, options.require_rls).await?;
        let readers = |most| Connections::new(base.clone(), &[&SESSION, &ONE_PLAN, &NOT_REPLICATED], most);
        let store = Self {
            writers: Connections::new(base.clone(), &[&SESSION, &ONE_PLAN, &BY_KEY], options.write_connections),
            readers: readers(options.read_connections),
            own: readers(OWN_CONNECTIONS),
            write_connections: options.write_connections as usize,
            orgs_per_transaction: options.orgs_per_transaction as usize,
            announcer: Announcer::start(base.clone().options(SESSION).application_name("jobledger-notify")),
            options: base.options(SESSION),
            memory: Arc::new(Cache::new(options.fold_after)),
        };
        store.own.open_all(OWN_CONNECTIONS).await?;
        store.about().await?;
        store.maintain().await.map_err(|error| match error {
            StoreError::Unusable(reason) => StoreError::Unusable(format!(
                "{reason} (`jobledger migrate role-sql` prints the rights that a role needs to serve)"
            )),
            other => other,
        })?;
        Ok(store)
    }
}

/// Refuses a database that is not UTF-8, or a PostgreSQL older than [`OLDEST_SERVER`].
async fn assert_usable(connection: &mut PgConnection) -> Result<(), StoreError> {
    let sql =
        "/* assert_usable */ SELECT current_setting('server_version_num')::integer, current_setting('server_version'),
            current_setting('server_encoding'), current_database()::text";
    let (number, name, encoding, database): (i32, String, String, String) =
        sqlx::query_as(sql).fetch_one(connection).await.map_err(store_error)?;
    if encoding != "UTF8" {
        return Err(StoreError::Unusable(format!(
            "the database {database} has encoding {encoding}, but jobledger needs UTF8: create one with CREATE DATABASE {database} \
             ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0"
        )));
    }
    if number < OLDEST_SERVER {
        return Err(StoreError::Unusable(format!("this is PostgreSQL {name}; 14 or later is needed")));
    }
    Ok(())
}

impl PostgresStore {
    /// What the database says of itself, by these connections.
    async fn about_by(&self, connections: &Arc<Connections>) -> Result<LedgerInfo, StoreError> {
        let turn = self.memory.turn();
        let about = read::about(connections).await?;
        self.memory.has_log(turn, about.log_id);
        Ok(about)
    }
}

#[async_trait]
impl Store for PostgresStore {
    fn capacity(&self) -> Capacity {
        Capacity { transactions: self.write_connections, orgs: self.orgs_per_transaction }
    }

    async fn begin(&self, orgs: &[OrgId]) -> Result<Box<dyn Batch>, StoreError> {
        if self.memory.takes_partitions() {
            read::make_partitions(&self.own, MONTHS_AHEAD).await?;
        }
        Ok(Box::new(begin::begin(&self.writers, orgs, Arc::clone(&self.memory)).await?))
    }

    fn begin_cached(&self, needs: &[(OrgId, Needs, usize)]) -> Option<Box<dyn Batch>> {
        Some(Box::new(cached_batch::begin_cached(&self.writers, &self.memory, needs)?))
    }

    fn log_id(&self) -> Option<LogId> {
        self.memory.log_id()
    }

    async fn job(&self, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        read::job(&self.readers, org, id).await
    }

    async fn jobs(&self, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError> {
        read::jobs(&self.readers, names).await
    }

    async fn unchanged(&self, jobs: &[&Job]) -> Result<Vec<bool>, StoreError> {
        read::unchanged(&self.readers, jobs).await
    }

    async fn bulk_operation(&self, org: OrgId, id: Uuid) -> Result<Option<BulkOperation>, StoreError> {
        bulk::one(&self.readers, org, id).await
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
        statistics::statistics(&self.readers, org, query).await
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

    fn announce(&self, reaches: &[(OrgId, Reach)]) {
        self.announcer.announce(reaches);
    }

    fn listen(&self) -> Option<Box<dyn Listener>> {
        Some(Box::new(notify::NotifyListener::new(self.options.clone().application_name("jobledger-listen"))))
    }

    async fn orgs(&self, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, StoreError> {
        read::orgs(&self.own, after, limit).await
    }

    async fn take_due(&self, what: DueWork, limit: usize, hold: Duration) -> Result<Vec<OrgId>, StoreError> {
        let mut due = read::take_due(&self.own, what, limit, hold).await?;
        if what == DueWork::Jobs {
            // The sweep of an org also folds rows.
            let stale = self.memory.stale(limit - due.len());
            due.extend(stale.into_iter().filter(|org| !due.contains(org)).collect::<Vec<_>>());
        }
        Ok(due)
    }

    async fn token(&self, org: Option<OrgId>, digest: Digest) -> Result<Option<ApiToken>, StoreError> {
        tokens::find(&self.own, org, digest).await
    }

    async fn create_token(&self, token: &ApiToken, most: usize) -> Result<Option<ApiToken>, StoreError> {
        tokens::create(&self.writers, token, most).await
    }

    async fn list_tokens(&self, org: OrgId, after: Uuid, limit: usize) -> Result<Vec<ApiToken>, StoreError> {
        tokens::page(&self.readers, org, after, limit).await
    }

    async fn revoke_token(&self, org: OrgId, id: Uuid) -> Result<Option<ApiToken>, StoreError> {
        tokens::revoke_of(&self.writers, org, id).await
    }

    async fn revoked_tokens(&self, since: i64, limit: usize) -> Result<Vec<TokenKey>, StoreError> {
        tokens::revoked(&self.own, since, limit).await
    }

    async fn use_tokens(&self, used: &[TokenKey]) -> Result<(), StoreError> {
        tokens::use_tokens(&self.own, used).await
    }

    async fn note_workers(&self, heard: &[HeardWorker], orgs: &[OrgId], known_for: Duration) -> Result<(), StoreError> {
        workers::note(&self.own, heard, orgs, known_for).await
    }

    async fn workers(
        &self,
        org: OrgId,
        after: &str,
        limit: usize,
        known_for: Duration,
    ) -> Result<WorkerPage, StoreError> {
        workers::page(&self.readers, org, after, limit, known_for).await
    }

    async fn about(&self) -> Result<LedgerInfo, StoreError> {
        self.about_by(&self.own).await
    }

    async fn read_log_id(&self) -> Result<LogId, StoreError> {
        Ok(self.about_by(&self.readers).await?.log_id)
    }

    fn audit(&self) -> &dyn Audit {
        self
    }

    async fn maintain(&self) -> Result<(), StoreError> {
        read::maintain(&self.own, MONTHS_AHEAD).await
    }

    async fn ping(&self) -> Result<Time, StoreError> {
        read::ping(&self.own).await
    }

    async fn newer_migration(&self) -> Result<Option<i64>, StoreError> {
        read::newer_migration(&self.own).await
    }

    async fn note_clock(&self, unseen: TimeDelta, doubt: Duration) -> Result<Option<TimeDelta>, StoreError> {
        read::note_clock(&self.own, unseen, doubt).await
    }

    async fn close(&self) {
        self.announcer.stop().await;
        self.writers.close().await;
        self.readers.close().await;
        self.own.close().await;
    }
}
