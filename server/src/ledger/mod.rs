//! The ledger: an org's serial log. Commands go through lanes in batches, readers follow the hub, and both use one store.

mod callers;
mod claim_call;
mod claim_repeats;
mod claim_selection;
mod claim_waiters;
mod clock_watch;
pub mod command;
mod decide;
mod disk_space;
mod edit;
mod encoded_event;
mod erase;
mod error;
mod explain;
mod follower;
mod hub;
mod label_bloom;
mod lane;
mod lane_queues;
mod lanes;
mod limits;
mod log_identity;
mod name_budget;
mod org_reads;
mod own_commits;
mod pacing;
mod pending;
mod read_budget;
mod read_coalescer;
mod reader;
mod stream_slots;
mod submission;
mod subscription;
mod tokens;
mod worker_list;
mod workers;
mod writer;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

pub use self::{
    claim_call::{LeaseDelivery, Leases},
    clock_watch::{ClockReading, ClockStep, Moment},
    command::{
        Author, BulkCommand, Claim, Command, Create, Explain, Explanation, Import, Imported, JobReply, Removed,
        SweepRequest, Swept, TypeReply,
    },
    disk_space::DiskSpace,
    encoded_event::EncodedEvent,
    error::{LedgerError, Quantity},
    explain::Explained,
    limits::Limits,
    read_budget::{PageShare, StreamPages},
    reader::ReadTurn,
    stream_slots::{StreamLimits, StreamSlot},
    subscription::{Delivery, SubscribeRequest, Subscription},
    tokens::MOST_TOKENS,
    worker_list::{Holding, ListedWorkers},
    workers::HeardClaim,
};
use uuid::Uuid;

use self::{
    claim_repeats::Repeats,
    claim_waiters::ClaimWaiters,
    clock_watch::ClockWatch,
    follower::Follower,
    hub::Hub,
    lanes::Lanes,
    log_identity::LogIdentity,
    name_budget::NameBudget,
    org_reads::{OrgReads, ReadKind},
    own_commits::OwnCommits,
    read_budget::ReadBudget,
    read_coalescer::ReadCoalescer,
    reader::Reader,
    stream_slots::StreamSlots,
    submission::{Receiver, ReplyTo, Submission},
    subscription::Source,
    workers::Workers,
    writer::Writer,
};
pub use crate::store::{
    BulkPage, EventFilter, JobPage, ListOrder, ListQuery, Retention, SeriesKind, SeriesPoint, Statistics,
    StatisticsQuery, StatusCounts, TypeStatistics,
};
use crate::{
    domain::{
        access::NO_ORG,
        bulk::BulkOperation,
        clock::Time,
        id::{JobId, LogId, OrgId},
        job::JobRecord,
        job_filter::JobFilter,
        job_type::TypeCommand,
    },
    store::Store,
};

/// What an org has.
pub struct Usage {
    /// Its jobs by type, as of one `seq` of its log.
    pub statistics: Statistics,
    /// About how many bytes its jobs and events are, read a little later.
    pub bytes: i64,
}

/// The ledger of all orgs of one database. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    reads: Arc<ReadCoalescer>,
    lanes: Arc<Lanes>,
    waiting: Arc<ClaimWaiters>,
    workers: Arc<Workers>,
    wishes: NameBudget,
    repeats: Arc<Repeats>,
    hub: Arc<Hub>,
    log_identity: Arc<LogIdentity>,
    watch: Arc<ClockWatch>,
    /// Turns at the database's readers, for lists and large jobs, for payloads of claimed jobs, for past events, for
    /// statistics, and for calls about tokens. The kinds compete with each other only within an org.
    org_reads: Arc<OrgReads>,
    lists: Arc<Reader>,
    deliveries: Arc<Reader>,
    catch_up: Arc<Reader>,
    summaries: Arc<Reader>,
    token_calls: Arc<Reader>,
    places: StreamSlots,
    page_memory: Arc<ReadBudget>,
    bookmark_interval: Duration,
}

impl Ledger {
    /// Creates the ledger of a store, and the future that moves its lanes. The future ends after [`Ledger::close`], once every
    /// accepted command is answered.
    pub fn new(store: Arc<dyn Store>, limits: Limits) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let hub = Arc::new(Hub::new(limits.tail_bytes));
        let lanes = Arc::new(Lanes::new(limits));
        let org_reads = OrgReads::new(limits.reads_per_org);
        let reader = |kind, at_a_time| {
            Reader::new(Arc::clone(&store), kind, at_a_time, Arc::clone(&org_reads), limits.queued_within)
        };
        let lists = reader(ReadKind::Lists, limits.reads);
        let deliveries = reader(ReadKind::Deliveries, limits.deliveries);
        // One turn more than one org may have, so that other orgs always find one.
        let catch_up = reader(ReadKind::CatchUp, limits.catch_up_reads + 1);
        let summaries = reader(ReadKind::Statistics, limits.catch_up_reads + 1);
        let tokens = reader(ReadKind::Tokens, limits.catch_up_reads + 1);
        let waiting = ClaimWaiters::new(limits.claims, limits.claims_per_org);
        let own = Arc::new(OwnCommits::new(Arc::clone(&hub), Arc::clone(&waiting)));
        let follower = Follower::new(Arc::clone(&store), Arc::clone(&hub), Arc::clone(&waiting), Arc::clone(&own));
        let watch = Arc::<ClockWatch>::default();
        let writer = Writer::new(
            Arc::clone(&store),
            Arc::clone(&hub),
            Arc::clone(&lanes),
            Arc::clone(&waiting),
            own,
            Arc::clone(&watch),
            limits,
        );
        let reads = ReadCoalescer::new(Arc::clone(&store), Arc::clone(&lists), Arc::clone(&org_reads));
        let log_identity = LogIdentity::new(Arc::clone(&store), Arc::clone(&hub));
        let places = StreamSlots::new(limits.streams);
        let page_memory = ReadBudget::new(limits.stream_bytes, limits.stream_bytes_per_org);
        let work = async move {
            tokio::select! {
                () = Arc::new(writer).run() => {}
                () = follower.run() => {}
            }
        };
        (
            Self {
                reads,
                lanes,
                waiting,
                workers: Workers::new(limits.worker_bytes, limits.workers_known_for),
                wishes: NameBudget::new(limits.named_bytes, limits.named_bytes_per_org),
                repeats: Arc::default(),
                hub,
                log_identity,
                watch,
                org_reads,
                lists,
                deliveries,
                catch_up,
                summaries,
                token_calls: tokens,
                places,
                page_memory,
                bookmark_interval: limits.bookmark_interval,
            },
            work,
        )
    }

    /// From now on these orgs, and no others, read one thing at a time while others call: they keep processors from them.
    pub fn read_less_for(&self, orgs: Vec<OrgId>) {
        self.org_reads.slow(orgs);
    }

    /// Decides and commits one command on a job.
    ///
    /// Once a batch has taken the command, it is decided even if this future is dropped. If the future is dropped before that,
    /// the command has no effect.
    ///
    /// # Errors
    ///
    /// The command's own error, after its batch committed; or an error of the database or of an overload.
    pub async fn submit(&self, by: impl Into<Author>, command: Command) -> Result<JobReply, LedgerError> {
        self.ask(by.into(), Submission::Job, command).await
    }

    /// Submits many commands on one org. Returns an answer for each, in order. Several batches may decide them.
    ///
    /// # Errors
    ///
    /// If not a single command was accepted.
    pub async fn submit_all(
        &self,
        by: impl Into<Author>,
        commands: Vec<Command>,
    ) -> Result<Vec<Result<JobReply, LedgerError>>, LedgerError> {
        let by = by.into();
        self.org_reads.called(by.org);
        let mut replies = Vec::with_capacity(commands.len());
        for reply in self.lanes.enqueue(&by, Submission::Job, commands)? {
            replies.push(received(reply).await);
        }
        Ok(replies)
    }

    /// Imports jobs of another system. Queues the commands at once; the future yields an answer for each, in order.
    ///
    /// # Errors
    ///
    /// If not a single command was accepted.
    pub fn import_all(
        &self,
        org: OrgId,
        jobs: Vec<Import>,
    ) -> Result<impl Future<Output = Vec<Result<Imported, LedgerError>>> + Send + use<>, LedgerError> {
        let jobs = jobs.into_iter().map(Box::new).collect();
        let waiting = self.lanes.enqueue(&org.into(), Submission::Import, jobs)?;
        Ok(async move {
            let mut replies = Vec::with_capacity(waiting.len());
            for reply in waiting {
                replies.push(received(reply).await);
            }
            replies
        })
    }

    /// Sweeps one org: handles jobs that are due, as many as one batch may.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`].
    pub async fn sweep(&self, org: OrgId, asked: SweepRequest) -> Result<Swept, LedgerError> {
        self.ask(org.into(), Submission::Sweep, asked).await
    }

    /// Re-dates leases and waits of one org that the clock dated while it was ahead, by `by` at most. One batch handles a
    /// bounded number of jobs. The org's next sweep and next retention are re-dated too.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`].
    pub async fn redate(&self, org: OrgId, by: Duration) -> Result<Swept, LedgerError> {
        self.ask(org.into(), Submission::Redate, by).await
    }

    /// Removes finished jobs of one org whose retention is over, with their events: as many as one batch may.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`].
    pub async fn retain(&self, org: OrgId, retention: Retention) -> Result<Removed, LedgerError> {
        self.ask(org.into(), Submission::Retain, retention).await
    }

    /// Records a reading of the database's clock. Batches record theirs themselves.
    pub fn observe_clock(&self, reading: ClockReading) {
        self.watch.observe(reading);
    }

    /// Waits until the database's clock is set. Each step is delivered to one caller.
    pub async fn clock_step(&self) -> ClockStep {
        self.watch.step().await
    }

    /// Reports that retention is paused since the clock's last jump. Until this is called, batches remove nothing.
    pub fn retention_waits(&self) {
        self.watch.retention_waits();
    }

    /// Submits one command and waits for its reply. `of` says which kind it is: a variant of [`Submission`].
    async fn ask<C, R>(
        &self,
        by: Author,
        of: impl FnOnce(C, ReplyTo<R>) -> Submission,
        command: C,
    ) -> Result<R, LedgerError> {
        self.org_reads.called(by.org);
        received(self.lanes.enqueue_one(by, of, command)?).await
    }

    /// Reads one job. A large job comes with the read turn it took; the caller keeps the turn until its answer is made.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`], or an error of the database.
    pub async fn job(&self, org: OrgId, id: JobId) -> Result<(Arc<JobRecord>, Option<ReadTurn>), LedgerError> {
        self.reads.job(org, id).await
    }

    /// Reads the job with this idempotency key, with payload and result.
    ///
    /// # Errors
    ///
    /// [`LedgerError::KeyNotFound`], or an error of the database.
    pub async fn job_with_key(
        &self,
        org: OrgId,
        key: String,
    ) -> Result<(Arc<JobRecord>, Option<ReadTurn>), LedgerError> {
        let filter = JobFilter { idempotency_key: Some(key.clone()), ..JobFilter::default() };
        let page = self.read_turn(org).await?.list(org, &ListQuery::first(filter, ListOrder::NewestFirst, 1)).await?;
        let job = page.jobs.first().ok_or_else(|| LedgerError::KeyNotFound { key: key.clone() })?.id;
        match self.job(org, job).await {
            // It was removed in between.
            Err(LedgerError::JobNotFound { .. }) => Err(LedgerError::KeyNotFound { key }),
            found => found,
        }
    }

    /// Changes the settings of a type. Once this returns, no server grants claims by the settings before.
    ///
    /// # Errors
    ///
    /// [`LedgerError::TypeNotFound`], [`LedgerError::TypeChanged`], [`LedgerError::UntilPast`], [`LedgerError::TooManyTypes`],
    /// [`LedgerError::QuotaExceeded`]; else as for [`Ledger::submit`].
    pub async fn set_type(&self, by: impl Into<Author>, command: TypeCommand) -> Result<TypeReply, LedgerError> {
        self.ask(by.into(), Submission::Type, command).await
    }

    /// Starts or stops a bulk operation, and returns it. It goes on by itself, on any server.
    ///
    /// # Errors
    ///
    /// [`LedgerError::BulkOperationExists`], [`LedgerError::BulkOperationNotFound`], [`LedgerError::QuotaExceeded`]; else as for
    /// [`Ledger::submit`].
    pub async fn bulk(&self, by: impl Into<Author>, command: BulkCommand) -> Result<BulkOperation, LedgerError> {
        self.ask(by.into(), Submission::Bulk, command).await
    }

    /// Reads a bulk operation.
    ///
    /// # Errors
    ///
    /// [`LedgerError::BulkOperationNotFound`], or an error of the database.
    pub async fn bulk_operation(&self, org: OrgId, id: Uuid) -> Result<BulkOperation, LedgerError> {
        let read = move |store: Arc<dyn Store>| async move { store.bulk_operation(org, id).await };
        self.lists.read(org, read).await?.ok_or(LedgerError::BulkOperationNotFound { id })
    }

    /// Reads a page of bulk operations, the newest first.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn bulk_operations(
        &self,
        org: OrgId,
        before: Option<(Time, Uuid)>,
        limit: usize,
    ) -> Result<BulkPage, LedgerError> {
        let read = move |store: Arc<dyn Store>| async move { store.bulk_operations(org, before, limit).await };
        self.lists.read(org, read).await
    }

    /// Takes a turn to read pages of jobs with their contents. The caller keeps it until its answer is made.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Overloaded`] if it does not come in time, or [`LedgerError::Unavailable`] if meanwhile no org's turn
    /// ended.
    pub async fn read_turn(&self, org: OrgId) -> Result<ReadTurn, LedgerError> {
        self.lists.begin(org).await
    }

    /// Reads the statistics of an org.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn statistics(&self, org: OrgId, query: &StatisticsQuery) -> Result<Statistics, LedgerError> {
        let query = query.clone();
        self.summaries.read(org, move |store| async move { store.statistics(org, &query).await }).await
    }

    /// Reads what an org has, in a read turn of `whose`: of the same org, or of none ([`NO_ORG`]) for who reads of many.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn usage(&self, whose: OrgId, org: OrgId) -> Result<Usage, LedgerError> {
        let read = move |store: Arc<dyn Store>| async move {
            let statistics = store.statistics(org, &StatisticsQuery::of(&[])).await?;
            let stock = store.audit().stock(org).await?;
            Ok(Usage { statistics, bytes: stock.map_or(0, |(_, stock)| stock.bytes) })
        };
        self.summaries.read(whose, read).await
    }

    /// Reads the ids of at most `limit` orgs that have a log: those after `after`, in ascending order.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn orgs(&self, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, LedgerError> {
        let read = move |store: Arc<dyn Store>| async move { store.orgs(after, limit).await };
        self.summaries.read(OrgId(NO_ORG), read).await
    }

    /// Reads the id of the database's log.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn log_id(&self) -> Result<LogId, LedgerError> {
        self.log_identity.read().await
    }

    /// Follows an org's log. `peer` is the address of the subscriber's connection.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`], [`LedgerError::CursorAhead`], [`LedgerError::CursorExpired`],
    /// [`LedgerError::EpochChanged`], [`LedgerError::TooManyStreams`], [`LedgerError::TooManyNames`], or one of the database.
    pub async fn subscribe(
        &self,
        org: OrgId,
        peer: Option<SocketAddr>,
        request: SubscribeRequest,
    ) -> Result<Subscription, LedgerError> {
        let place = self.places.take(org, peer, self.wishes.of_stream(org, &request)?)?;
        let log_id = self.log_identity.read().await?;
        // Joins the hub before reading the head, so that the subscription hears of every commit after the head.
        let source = Source {
            catch_up: Arc::clone(&self.catch_up),
            pages: self.page_memory.stream(org),
            listener: self.hub.listen(org),
            org,
            log_id,
        };
        Subscription::open(source, self.bookmark_interval, place, request).await
    }

    /// How many claims wait on this server because no job is ready for them.
    pub fn waiting_claims(&self) -> usize {
        self.waiting.sleeping()
    }

    /// How long commands have been waiting while no turn ended; zero if none waits.
    pub fn stalled_for(&self) -> Duration {
        self.lanes.stalled_for()
    }

    /// True while the database does not answer. Calls without room are then refused as unavailable, not as overloaded.
    pub fn is_stalled(&self) -> bool {
        self.lanes.is_stalled()
    }

    /// Sets the free space of the database's disk. Low space bounds creates, imports and retries, or refuses them.
    pub fn has_disk_space(&self, space: DiskSpace) {
        self.lanes.space().set(space);
    }

    /// Refuses new commands and ends waiting claims. Accepted commands are still decided.
    pub fn close(&self) {
        self.lanes.close();
        self.waiting.close();
    }
}

/// Lanes answer every command that they accepted, unless the server is stopped in the middle of a turn.
async fn received<R>(reply: Receiver<R>) -> Result<R, LedgerError> {
    reply.await.unwrap_or(Err(LedgerError::OutcomeUnknown))
}
