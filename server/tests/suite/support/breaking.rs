//! A real store whose commits break on demand, with a signal for each transaction.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use chrono::TimeDelta;
use jobledger_server::{
    domain::{
        access::ApiToken,
        bulk::BulkOperation,
        clock::Time,
        id::{Digest, JobId, LogId, OrgId},
        job::{Job, JobContents, JobRecord},
    },
    store::{
        Audit, Batch, BulkPage, Capacity, Changes, DueWork, EventPage, EventQuery, FoundJob, HeardWorker, JobPage,
        LedgerInfo, ListQuery, Listener, Loaded, Needs, Reach, RecordId, Statistics, StatisticsQuery, Store,
        StoreError, TokenKey, WorkerPage,
    },
};
use tokio::{sync::watch, time::timeout};
use uuid::Uuid;

use crate::support::harness::PATIENCE;

/// How a commit breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Break {
    /// The commit happens, but its answer is lost.
    After,
    /// The connection is lost before the commit arrives.
    Before,
    /// As `Before`, and the database stays unreachable.
    Away,
    /// The database becomes unreachable during the commit. The commit happens when the database comes back.
    Late,
    /// The disk is full.
    Full,
    /// The transaction conflicted with another one and was rolled back.
    Conflict,
}

/// A real store whose commits break on demand. It counts what the ledger asks for.
pub(crate) struct Breaking {
    /// The real store. Tests lock heads with it, so that the ledger's batches wait.
    pub(crate) inner: Arc<dyn Store>,
    next: Arc<Mutex<Vec<Break>>>,
    is_away: Arc<Mutex<bool>>,
    late: Arc<Mutex<Option<Box<dyn Batch>>>>,
    /// How often a transaction was asked for: the signal that the writer took a batch.
    begun: watch::Sender<usize>,
    looks_for_work: Arc<AtomicUsize>,
    reads_of_logs: AtomicUsize,
    panics: AtomicBool,
    failing_tokens: AtomicUsize,
}

/// Creating a job of this type panics in the decision: its batch loads a head with the highest possible `seq`.
pub(crate) const IMPOSSIBLE: &str = "impossible";

impl Breaking {
    pub(crate) fn new(inner: Arc<dyn Store>, breaks: &[Break]) -> Arc<Self> {
        let next = Arc::new(Mutex::new(breaks.iter().rev().copied().collect()));
        let (is_away, late, looks_for_work) = (Arc::default(), Arc::default(), Arc::default());
        let (begun, reads_of_logs) = (watch::Sender::new(0), AtomicUsize::new(0));
        let (panics, failing_tokens) = (AtomicBool::new(false), AtomicUsize::new(0));
        Arc::new(Self { inner, next, is_away, late, begun, looks_for_work, reads_of_logs, panics, failing_tokens })
    }

    /// How often a batch queried the ready jobs of an org.
    pub(crate) fn looks_for_work(&self) -> usize {
        self.looks_for_work.load(Ordering::SeqCst)
    }

    /// Makes the next read of statistics panic.
    pub(crate) fn panic_in_statistics(&self) {
        self.panics.store(true, Ordering::SeqCst);
    }

    /// Makes the next `times` look-ups of tokens fail.
    pub(crate) fn fail_tokens(&self, times: usize) {
        self.failing_tokens.store(times, Ordering::SeqCst);
    }

    /// How often a page of a log was read.
    pub(crate) fn reads_of_logs(&self) -> usize {
        self.reads_of_logs.load(Ordering::SeqCst)
    }

    /// How often a transaction was asked for.
    pub(crate) fn begun(&self) -> usize {
        *self.begun.borrow()
    }

    /// Makes the database unreachable.
    pub(crate) fn go_away(&self) {
        *self.is_away.lock().unwrap() = true;
    }

    /// Makes the database reachable again. A commit that broke as `Late` happens first.
    pub(crate) async fn come_back(&self) {
        let late = self.late.lock().unwrap().take();
        if let Some(batch) = late {
            batch.commit().await.expect("the real commit happens");
        }
        *self.is_away.lock().unwrap() = false;
    }

    /// Waits until this many transactions were asked for: by then the writer took a batch, which waits for its head.
    pub(crate) async fn has_begun(&self, times: usize) {
        let mut begun = self.begun.subscribe();
        timeout(PATIENCE, begun.wait_for(|begun| *begun >= times)).await.expect("a batch is taken").unwrap();
    }
}

struct BreakingBatch {
    batch: Box<dyn Batch>,
    next: Arc<Mutex<Vec<Break>>>,
    is_away: Arc<Mutex<bool>>,
    late: Arc<Mutex<Option<Box<dyn Batch>>>>,
    looks_for_work: Arc<AtomicUsize>,
}

#[async_trait]
impl Store for Breaking {
    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }

    async fn begin(&self, orgs: &[OrgId]) -> Result<Box<dyn Batch>, StoreError> {
        self.begun.send_modify(|begun| *begun += 1);
        if *self.is_away.lock().unwrap() {
            return Err(StoreError::Unavailable("away".to_owned()));
        }
        let batch = self.inner.begin(orgs).await?;
        Ok(Box::new(BreakingBatch {
            batch,
            next: Arc::clone(&self.next),
            is_away: Arc::clone(&self.is_away),
            late: Arc::clone(&self.late),
            looks_for_work: Arc::clone(&self.looks_for_work),
        }))
    }

    async fn job(&self, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        self.inner.job(org, id).await
    }

    async fn jobs(&self, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError> {
        self.inner.jobs(names).await
    }

    async fn unchanged(&self, jobs: &[&Job]) -> Result<Vec<bool>, StoreError> {
        self.inner.unchanged(jobs).await
    }

    async fn events(&self, org: OrgId, query: &EventQuery) -> Result<EventPage, StoreError> {
        self.reads_of_logs.fetch_add(1, Ordering::SeqCst);
        self.inner.events(org, query).await
    }

    async fn statistics(&self, org: OrgId, query: &StatisticsQuery) -> Result<Statistics, StoreError> {
        assert!(!self.panics.swap(false, Ordering::SeqCst), "a deliberate panic");
        self.inner.statistics(org, query).await
    }

    async fn contents(&self, org: OrgId, ids: &[JobId]) -> Result<Vec<(JobId, JobContents)>, StoreError> {
        self.inner.contents(org, ids).await
    }

    async fn list(&self, org: OrgId, query: &ListQuery) -> Result<JobPage, StoreError> {
        self.inner.list(org, query).await
    }

    async fn bulk_operation(&self, org: OrgId, id: Uuid) -> Result<Option<BulkOperation>, StoreError> {
        self.inner.bulk_operation(org, id).await
    }

    async fn note_workers(&self, heard: &[HeardWorker], orgs: &[OrgId], known_for: Duration) -> Result<(), StoreError> {
        self.inner.note_workers(heard, orgs, known_for).await
    }

    async fn workers(
        &self,
        org: OrgId,
        after: &str,
        limit: usize,
        known_for: Duration,
    ) -> Result<WorkerPage, StoreError> {
        self.inner.workers(org, after, limit, known_for).await
    }

    async fn bulk_operations(
        &self,
        org: OrgId,
        before: Option<(Time, Uuid)>,
        limit: usize,
    ) -> Result<BulkPage, StoreError> {
        self.inner.bulk_operations(org, before, limit).await
    }

    async fn reaches(&self, orgs: &[OrgId]) -> Result<Vec<(OrgId, Reach)>, StoreError> {
        self.inner.reaches(orgs).await
    }

    fn announce(&self, reaches: &[(OrgId, Reach)]) {
        self.inner.announce(reaches);
    }

    fn listen(&self) -> Option<Box<dyn Listener>> {
        self.inner.listen()
    }

    async fn orgs(&self, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, StoreError> {
        self.inner.orgs(after, limit).await
    }

    async fn take_due(&self, what: DueWork, limit: usize, hold: Duration) -> Result<Vec<OrgId>, StoreError> {
        self.inner.take_due(what, limit, hold).await
    }

    async fn token(&self, org: Option<OrgId>, digest: Digest) -> Result<Option<ApiToken>, StoreError> {
        let less = |left: usize| left.checked_sub(1);
        if self.failing_tokens.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            return Err(StoreError::Unavailable("look-ups fail for now".to_owned()));
        }
        self.inner.token(org, digest).await
    }

    async fn create_token(&self, token: &ApiToken, most: usize) -> Result<Option<ApiToken>, StoreError> {
        self.inner.create_token(token, most).await
    }

    async fn list_tokens(&self, org: OrgId, after: Uuid, limit: usize) -> Result<Vec<ApiToken>, StoreError> {
        self.inner.list_tokens(org, after, limit).await
    }

    async fn revoke_token(&self, org: OrgId, id: Uuid) -> Result<Option<ApiToken>, StoreError> {
        self.inner.revoke_token(org, id).await
    }

    async fn revoked_tokens(&self, since: i64, limit: usize) -> Result<Vec<TokenKey>, StoreError> {
        self.inner.revoked_tokens(since, limit).await
    }

    async fn use_tokens(&self, used: &[TokenKey]) -> Result<(), StoreError> {
        self.inner.use_tokens(used).await
    }

    async fn about(&self) -> Result<LedgerInfo, StoreError> {
        self.inner.about().await
    }

    async fn read_log_id(&self) -> Result<LogId, StoreError> {
        self.inner.read_log_id().await
    }

    fn audit(&self) -> &dyn Audit {
        self.inner.audit()
    }

    async fn maintain(&self) -> Result<(), StoreError> {
        self.inner.maintain().await
    }

    async fn newer_migration(&self) -> Result<Option<i64>, StoreError> {
        self.inner.newer_migration().await
    }

    async fn note_clock(&self, unseen: TimeDelta, doubt: Duration) -> Result<Option<TimeDelta>, StoreError> {
        self.inner.note_clock(unseen, doubt).await
    }

    async fn ping(&self) -> Result<Time, StoreError> {
        if *self.is_away.lock().unwrap() {
            return Err(StoreError::Unavailable("away".to_owned()));
        }
        self.inner.ping().await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

#[async_trait]
impl Batch for BreakingBatch {
    fn now(&self) -> Time {
        self.batch.now()
    }

    fn orgs(&self) -> &[OrgId] {
        self.batch.orgs()
    }

    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError> {
        let looks = needs.iter().filter(|(_, needs)| !needs.ready.is_empty()).count();
        self.looks_for_work.fetch_add(looks, Ordering::SeqCst);
        let mut loaded = self.batch.load(needs).await?;
        for ((_, needs), loaded) in needs.iter().zip(&mut loaded) {
            if needs.types.iter().any(|name| &**name == IMPOSSIBLE) {
                loaded.head.seq = i64::MAX;
            }
        }
        Ok(loaded)
    }

    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError> {
        self.batch.ready_jobs(ids).await
    }

    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError> {
        self.batch.write(changes).await
    }

    fn doubt_keys(&mut self, orgs: &[OrgId]) {
        self.batch.doubt_keys(orgs);
    }

    async fn has(&mut self, org: OrgId, record: RecordId) -> Result<bool, StoreError> {
        self.batch.has(org, record).await
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let how = self.next.lock().unwrap().pop();
        match how {
            None => return self.batch.commit().await,
            Some(Break::After) => self.batch.commit().await?,
            Some(Break::Before) => drop(self.batch),
            Some(Break::Away) => *self.is_away.lock().unwrap() = true,
            Some(Break::Late) => {
                *self.late.lock().unwrap() = Some(self.batch);
                *self.is_away.lock().unwrap() = true;
            }
            Some(Break::Conflict) => return Err(StoreError::Conflict("in the way".to_owned())),
            Some(Break::Full) => return Err(StoreError::Full("no room".to_owned())),
        }
        Err(StoreError::OutcomeUnknown("the connection broke".to_owned()))
    }
}
