//! An org's serial log: commands go through lanes in batches, readers follow the hub, both over one store.

mod claim;
mod claims;
mod clock_watch;
pub mod command;
mod decide;
mod disk_space;
mod error;
mod follower;
mod hub;
mod label_marks;
mod lane;
mod lanes;
mod log_identity;
mod own_commits;
mod page_memory;
mod pending;
mod places;
mod reader;
mod reads;
mod repeats;
mod rests;
mod shared;
mod subscription;
mod waiting;
mod wishes;
mod writer;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

pub use self::{
    claim::{LeaseDelivery, Leases},
    clock_watch::{ClockStep, Moment, Reading},
    command::{Asked, By, Claim, Command, Create, Import, Imported, JobReply, Looked, Removed},
    disk_space::DiskSpace,
    error::{LedgerError, Quantity},
    page_memory::{PageShare, StreamPages},
    places::{StreamLimits, StreamPlace},
    reader::ReadTurn,
    shared::SharedEvent,
    subscription::{Delivery, SubscribeRequest, Subscription},
};
use self::{
    clock_watch::ClockWatch, command::Reply, follower::Follower, hub::Hub, lanes::Lanes, log_identity::LogIdentity,
    own_commits::OwnCommits, page_memory::PageMemory, pending::Answered, places::Places, reader::Reader, reads::Reads,
    repeats::Repeats, subscription::Source, waiting::Waiting, wishes::Wishes, writer::Writer,
};
pub use crate::store::{
    EventFilter, JobFilter, JobPage, ListQuery, Retention, SeriesKind, SeriesPoint, Statistics, StatisticsQuery,
    StatusCounts, TypeStatistics,
};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::JobRecord,
    },
    store::Store,
};

/// Bounds of the ledger, each a promise about memory or time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Commands in one batch; at least 1.
    pub batch_commands: usize,
    /// Bytes of commands in one batch, unless a single one is larger.
    pub batch_bytes: usize,
    /// The same of a batch that several orgs share: with so many no other org joins it.
    pub shared_bytes: usize,
    /// Commands waiting in all lanes together; here and below, a quarter more of what keeps running jobs alive or ends them.
    pub queued_commands: usize,
    /// Commands waiting in one lane.
    pub queued_commands_per_org: usize,
    /// Bytes of commands waiting in all lanes together; of one lane, a quarter of it.
    pub queued_bytes: usize,
    /// How long a command may wait to be decided; those of the ledger itself wait as long as it takes.
    pub queued_within: Duration,
    /// Distinct types of jobs in one org.
    pub types_per_org: usize,
    /// Jobs that one org may have, those that have ended among them; `None`: as many as there is room for.
    pub jobs_per_org: Option<u64>,
    /// What one org's jobs and their events may take, about, in bytes ([`Stock`](crate::store::Stock)); `None`: as much as there is room for.
    pub bytes_per_org: Option<u64>,
    /// Bytes of recent events kept for live subscribers, shared by the orgs that have any; each gets at least 16 KiB.
    pub tail_bytes: usize,
    /// Event streams that may be open.
    pub streams: StreamLimits,
    /// Bytes of the past that were read for streams and not taken yet.
    pub stream_bytes: usize,
    /// The same of one org.
    pub stream_bytes_per_org: usize,
    /// Bytes of what claims that wait and event streams name: types, labels, workers.
    pub named_bytes: usize,
    /// The same of one org.
    pub named_bytes_per_org: usize,
    /// Claims that may be under way, most of them waiting for work.
    pub claims: usize,
    /// The same of one org.
    pub claims_per_org: usize,
    /// Reads of lists and of large jobs that may be under way at the same time, 2 to 6: of one org all but one.
    pub reads: usize,
    /// Reads of past events of one org that may be under way at the same time, 1 or 2, and as many of statistics; of all orgs one more.
    pub catch_up_reads: usize,
    /// A subscriber gets a bookmark at least this often.
    pub bookmark_interval: Duration,
    /// How long the outcome of a broken commit is looked for.
    pub resolve_within: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            batch_commands: 512,
            batch_bytes: 4 << 20,
            shared_bytes: 1 << 20,
            queued_commands: 65_536,
            queued_commands_per_org: 16_384,
            queued_bytes: 64 << 20,
            queued_within: Duration::from_secs(10),
            types_per_org: 10_000,
            jobs_per_org: None,
            bytes_per_org: None,
            tail_bytes: 64 << 20,
            streams: StreamLimits { in_all: 16_384, per_org: 16_384 / 3, per_connection: 1_000 },
            stream_bytes: 128 << 20,
            stream_bytes_per_org: (128 << 20) / 3,
            named_bytes: 32 << 20,
            named_bytes_per_org: (32 << 20) / 3,
            claims: 16_384,
            claims_per_org: 16_384 / 3,
            reads: processors.clamp(1, 5) + 1,
            // Half the machine at most is for the past.
            catch_up_reads: (processors / 2).clamp(1, 2),
            bookmark_interval: Duration::from_secs(15),
            resolve_within: Duration::from_secs(10),
        }
    }
}

/// Reads of the payloads of claimed jobs that may be under way at the same time: of one org all but one.
const DELIVERIES: usize = 4;

/// The ledger of all orgs of one database. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    reads: Arc<Reads>,
    lanes: Arc<Lanes>,
    waiting: Arc<Waiting>,
    wishes: Wishes,
    repeats: Arc<Repeats>,
    hub: Arc<Hub>,
    log_identity: Arc<LogIdentity>,
    watch: Arc<ClockWatch>,
    /// Turns at the database's readers: of lists and large jobs, of what claimed jobs carry, of the past, of statistics. None of them takes
    /// another's.
    lists: Arc<Reader>,
    deliveries: Arc<Reader>,
    catch_up: Arc<Reader>,
    summaries: Arc<Reader>,
    places: Places,
    page_memory: Arc<PageMemory>,
    bookmark_interval: Duration,
}

impl Ledger {
    /// A ledger over a store, and the work that moves its lanes: it ends after [`Ledger::close`], once every accepted
    /// command is answered.
    pub fn new(store: Arc<dyn Store>, limits: Limits) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let hub = Arc::new(Hub::new(limits.tail_bytes));
        let lanes = Arc::new(Lanes::new(limits));
        let reader = |at_a_time| Reader::new(Arc::clone(&store), at_a_time, limits.queued_within);
        let (lists, deliveries) = (reader(limits.reads), reader(DELIVERIES));
        // One is kept for orgs that have none.
        let (catch_up, summaries) = (reader(limits.catch_up_reads + 1), reader(limits.catch_up_reads + 1));
        let waiting = Waiting::new(limits.claims, limits.claims_per_org);
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
        let reads = Reads::new(Arc::clone(&store), Arc::clone(&lists));
        let log_identity = LogIdentity::new(Arc::clone(&store), Arc::clone(&hub));
        let places = Places::new(limits.streams);
        let page_memory = PageMemory::new(limits.stream_bytes, limits.stream_bytes_per_org);
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
                wishes: Wishes::new(limits.named_bytes, limits.named_bytes_per_org),
                repeats: Arc::default(),
                hub,
                log_identity,
                watch,
                lists,
                deliveries,
                catch_up,
                summaries,
                places,
                page_memory,
                bookmark_interval: limits.bookmark_interval,
            },
            work,
        )
    }

    /// Has one command on a job decided and committed.
    ///
    /// Once it is taken into a batch it is decided, whether or not this future is still there; dropped before that, it
    /// never happens.
    ///
    /// # Errors
    ///
    /// The command's own, after the commit of its batch; or that of the database or of an overload.
    pub async fn submit(&self, by: impl Into<By>, command: Command) -> Result<JobReply, LedgerError> {
        of_job(self.ask(by.into(), command).await)
    }

    /// The same with many commands on one org at once: an answer for each, in order. They may be decided in several batches.
    ///
    /// # Errors
    ///
    /// If not even one of them was accepted.
    pub async fn submit_all(
        &self,
        by: impl Into<By>,
        commands: Vec<Command>,
    ) -> Result<Vec<Result<JobReply, LedgerError>>, LedgerError> {
        let mut replies = Vec::with_capacity(commands.len());
        for answer in self.lanes.enqueue(&by.into(), commands)? {
            replies.push(of_job(answer.await.unwrap_or(Err(LedgerError::OutcomeUnknown))));
        }
        Ok(replies)
    }

    /// Brings in jobs of another system. They are in the lane at once; the future has an answer for each, in order.
    ///
    /// # Errors
    ///
    /// If not even one of them was accepted.
    pub fn import_all(
        &self,
        org: OrgId,
        jobs: Vec<Import>,
    ) -> Result<impl Future<Output = Vec<Result<Imported, LedgerError>>> + Send + use<>, LedgerError> {
        let commands = jobs.into_iter().map(|import| Command::Import(Box::new(import))).collect();
        let answers = self.lanes.enqueue(&org.into(), commands)?;
        Ok(async move {
            let mut replies = Vec::with_capacity(answers.len());
            for answer in answers {
                let answered = answer.await.unwrap_or(Err(LedgerError::OutcomeUnknown));
                replies.push(answered.and_then(|answered| match answered.reply {
                    Reply::Imported(imported) => Ok(*imported),
                    _ => Err(LedgerError::Refused),
                }));
            }
            replies
        })
    }

    /// Does what is due in one org: to as many jobs as one batch may.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`].
    pub async fn look(&self, org: OrgId, asked: Asked) -> Result<Looked, LedgerError> {
        match self.ask(org.into(), Command::Look(asked)).await?.reply {
            Reply::Looked(looked) => Ok(looked),
            _ => Err(LedgerError::Refused),
        }
    }

    /// Dates anew, in one org, leases and waits that a clock that was ahead, by so much at most, has put off: of as many jobs as one batch
    /// may. Whoever looks for what is due does so by today's clock from then on.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`].
    pub async fn redate(&self, org: OrgId, by: Duration) -> Result<Looked, LedgerError> {
        match self.ask(org.into(), Command::Redate(by)).await?.reply {
            Reply::Looked(looked) => Ok(looked),
            _ => Err(LedgerError::Refused),
        }
    }

    /// Removes finished jobs of one org that are kept no longer, with their events: as many as one batch may.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`].
    pub async fn retain(&self, org: OrgId, retention: Retention) -> Result<Removed, LedgerError> {
        match self.ask(org.into(), Command::Retain(retention)).await?.reply {
            Reply::Removed(removed) => Ok(removed),
            _ => Err(LedgerError::Refused),
        }
    }

    /// Takes note of what the database's clock said. Batches do so by themselves.
    pub fn observe_clock(&self, reading: Reading) {
        self.watch.observe(reading);
    }

    /// Waits until somebody sets the database's clock. One caller at a time is told.
    pub async fn clock_step(&self) -> ClockStep {
        self.watch.step().await
    }

    /// Says that retention is known to wait since the last jump of the clock: until then batches remove nothing.
    pub fn retention_waits(&self) {
        self.watch.retention_waits();
    }

    async fn ask(&self, by: By, command: Command) -> Result<Answered, LedgerError> {
        let answer = self.lanes.enqueue_one(by, command)?;
        // Lanes answer everything they took, unless a stop cuts them off in the middle of it.
        answer.await.unwrap_or(Err(LedgerError::OutcomeUnknown))
    }

    /// Reads one job. A large one comes with the turn that reading it took, to be kept until the answer is made.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`], or that of the database.
    pub async fn job(&self, org: OrgId, id: JobId) -> Result<(Arc<JobRecord>, Option<ReadTurn>), LedgerError> {
        self.reads.job(org, id).await
    }

    /// A turn to read pages of jobs and what they hold, to be kept until the answer is made.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Overloaded`] if it does not come in time, or [`LedgerError::Unavailable`] if nobody's does.
    pub async fn read_turn(&self, org: OrgId) -> Result<ReadTurn, LedgerError> {
        self.lists.begin(org).await
    }

    /// Reads the statistics of an org.
    ///
    /// # Errors
    ///
    /// That of the database.
    pub async fn statistics(&self, org: OrgId, query: &StatisticsQuery) -> Result<Statistics, LedgerError> {
        let query = query.clone();
        self.summaries.read(org, move |store| async move { store.statistics(org, &query).await }).await
    }

    /// Follows an org's log, for the peer at this address.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`], [`LedgerError::CursorAhead`], [`LedgerError::CursorExpired`],
    /// [`LedgerError::EpochChanged`], [`LedgerError::TooManyStreams`], [`LedgerError::TooManyNames`], or that of the database.
    pub async fn subscribe(
        &self,
        org: OrgId,
        peer: Option<SocketAddr>,
        request: SubscribeRequest,
    ) -> Result<Subscription, LedgerError> {
        let place = self.places.take(org, peer, self.wishes.of_stream(org, &request)?)?;
        let log_id = self.log_identity.read().await?;
        // First the hub, then the database: what is committed in between is heard of.
        let source = Source {
            catch_up: Arc::clone(&self.catch_up),
            pages: self.page_memory.stream(org),
            listener: self.hub.listen(org),
            org,
            log_id,
        };
        Subscription::open(source, self.bookmark_interval, place, request).await
    }

    /// How many claims wait here because there is nothing for them.
    pub fn waiting_claims(&self) -> usize {
        self.waiting.sleeping()
    }

    /// How long commands have been waiting while none was decided; zero if none waits.
    pub fn stalled_for(&self) -> Duration {
        self.lanes.stalled_for()
    }

    /// True while the database does not answer commands: what finds no room then is told so, not that it is too much.
    pub fn is_stalled(&self) -> bool {
        self.lanes.is_stalled()
    }

    /// What was found of the database's disk: where there is little, creates and redrives are bounded, or refused.
    pub fn has_disk_space(&self, space: DiskSpace) {
        self.lanes.space().set(space);
    }

    /// Refuses new commands, and sends claims that wait away; what was accepted is still decided.
    pub fn close(&self) {
        self.lanes.close();
        self.waiting.close();
    }
}

fn of_job(answer: Result<Answered, LedgerError>) -> Result<JobReply, LedgerError> {
    match answer?.reply {
        Reply::Job(reply) => Ok(*reply),
        _ => Err(LedgerError::Refused),
    }
}
