//! Moves the lanes: takes a turn's commands, decides them, commits, and answers.
//!
//! While one batch commits, the next gathers in the lanes. A lone command never waits for company.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Limits,
    claim_call::Undelivered,
    claim_waiters::ClaimWaiters,
    clock_watch::{ClockReading, ClockState, ClockWatch, Moment},
    decide::{Chosen, Decision, Inputs, Quotas, choose, needs},
    hub::Hub,
    lane_queues::OUTAGE,
    lanes::Lanes,
    own_commits::OwnCommits,
    pacing::Worked,
    pending::{Begun, OrgBatch, Turn, is_single, parts, refuse},
    submission::Submission,
};
use crate::{
    domain::{id::OrgId, job::Job, lease::LeaseSecret},
    store::{Batch, Needs, Reach, RecordId, Store, StoreError},
};

/// How long loading and writing, or committing, may take before the writer gives up the connection.
const UNIT_OF_WORK: Duration = Duration::from_secs(10);
/// Approximate time to commit 1 MiB of text, including its copy from SQLite's WAL.
const COMMIT_OF_MEBIBYTE: Duration = Duration::from_millis(10);
/// Pause between two attempts to find the outcome of a broken commit.
const RESOLVE_PAUSE: Duration = Duration::from_millis(100);

/// How often a batch is run again after a conflict with another transaction.
const MAX_CONFLICTS: u32 = 3;

/// How far the clock may be behind the log's last event before that is logged, and the pause between two such messages.
const CLOCK_BEHIND: TimeDelta = TimeDelta::seconds(5);
const SAY_BEHIND: Duration = Duration::from_secs(60);

pub(super) struct Writer {
    store: Arc<dyn Store>,
    hub: Arc<Hub>,
    lanes: Arc<Lanes>,
    waiting: Arc<ClaimWaiters>,
    own: Arc<OwnCommits>,
    watch: Arc<ClockWatch>,
    limits: Limits,
    undecided: Mutex<Undecided>,
    /// When the server's log last reported that the clock is behind.
    said_behind: Mutex<Option<std::time::Instant>>,
}

/// How a turn ended.
struct Ended {
    /// The database did not answer.
    is_outage: bool,
    /// Batches of orgs whose heads other servers held.
    left_out: Turn,
}

/// A turn that is ready to commit.
struct Prepared {
    batch: Box<dyn Batch>,
    decisions: Vec<Decision>,
    /// One of the turn's batch records: the database has all of them or none. `None` if the turn leaves none.
    record: Option<(OrgId, RecordId)>,
    /// Time since the heads were won, plus the estimated time to commit the texts.
    worked: Duration,
}

/// Orgs whose last commit has an unknown outcome.
#[derive(Default)]
struct Undecided {
    orgs: HashSet<OrgId>,
    is_watched: bool,
}

impl Writer {
    pub(super) fn new(
        store: Arc<dyn Store>,
        hub: Arc<Hub>,
        lanes: Arc<Lanes>,
        waiting: Arc<ClaimWaiters>,
        own: Arc<OwnCommits>,
        watch: Arc<ClockWatch>,
        limits: Limits,
    ) -> Self {
        Self {
            store,
            hub,
            lanes,
            waiting,
            own,
            watch,
            limits,
            undecided: Mutex::default(),
            said_behind: Mutex::default(),
        }
    }

    /// Moves the lanes until they are closed and empty.
    pub(super) async fn run(self: Arc<Self>) {
        let mut writers = JoinSet::new();
        for _ in 0..self.store.capacity().transactions {
            writers.spawn(Arc::clone(&self).write());
        }
        while let Some(ended) = writers.join_next().await {
            if let Err(error) = ended {
                // A panic of a writer is a defect. Ending the server is better than a server that hangs.
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }

    async fn write(self: Arc<Self>) {
        while let Some(Begun { turn, shared }) = self.lanes.next_turn(self.store.capacity()).await {
            let mut orgs: Vec<_> = turn.iter().map(|batch| batch.org).collect();
            let began = Instant::now();
            let Ended { is_outage, left_out } = self.commit(turn, true).await;
            let is_slow = is_outage || began.elapsed() >= OUTAGE;
            orgs.retain(|org| left_out.iter().all(|batch| batch.org != *org));
            self.lanes.put_back(left_out);
            self.lanes.finish_turn(&orgs, (began, shared), is_slow);
        }
    }

    /// Commits a turn and answers its callers, except those of orgs whose heads other servers hold.
    async fn commit(self: &Arc<Self>, mut turn: Turn, may_grow: bool) -> Ended {
        let mut left_out = Turn::new();
        let is_outage = match self.attempt(&mut turn, &mut left_out, may_grow).await {
            Ok(decisions) => {
                self.finish(turn, &decisions);
                false
            }
            // The database refused data that validation accepted. Running the parts one by one fails only the culprit.
            Err(StoreError::Refused(reason)) if !is_single(&turn) => {
                tracing::warn!(reason, "the database refused a batch; retrying its orgs or commands one by one");
                let mut is_outage = false;
                for part in parts(turn) {
                    let ended = Box::pin(self.commit(part, false)).await;
                    is_outage |= ended.is_outage;
                    left_out.extend(ended.left_out);
                }
                is_outage
            }
            Err(error) => refuse(turn, error),
        };
        Ended { is_outage, left_out }
    }

    /// Runs a turn as one transaction. On success its events are durable and in the hub. Orgs whose heads other servers hold
    /// are moved from the turn to `left_out`.
    async fn attempt(
        self: &Arc<Self>,
        turn: &mut Turn,
        left_out: &mut Turn,
        mut may_grow: bool,
    ) -> Result<Vec<Decision>, StoreError> {
        // A broken commit that did not happen is run again once, a conflict up to [`MAX_CONFLICTS`] times.
        let mut may_run_again = true;
        let mut conflicts = 0;
        loop {
            // Only the first attempt begins from memory.
            let prepared = bounded(self.prepare(turn, left_out, conflicts == 0 && may_run_again, may_grow)).await;
            may_grow = false;
            let Prepared { batch, decisions, record, worked } = match prepared {
                Err(StoreError::Conflict(reason)) if conflicts < MAX_CONFLICTS => {
                    tracing::debug!(reason, "a batch got in the way of another transaction; running it again");
                    conflicts += 1;
                    continue;
                }
                prepared => prepared?,
            };
            self.lanes.worked(&works(turn, &decisions), worked);
            let under_way = self.own.begin(reaches(turn, &decisions));
            let reason = match timeout(UNIT_OF_WORK, batch.commit()).await {
                Ok(Ok(())) => {
                    self.publish(turn, &decisions);
                    self.wake(turn, &decisions);
                    return Ok(decisions);
                }
                Ok(Err(StoreError::OutcomeUnknown(reason))) => reason,
                Ok(Err(StoreError::Conflict(_))) if conflicts < MAX_CONFLICTS => {
                    conflicts += 1;
                    continue;
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => "the commit took too long".to_owned(),
            };
            drop(under_way);
            tracing::warn!(reason, "a commit's outcome is unknown; checking the log for its record");
            match self.resolve(record).await {
                Ok(was_committed) => {
                    // The hub's tails may lack these events.
                    self.send_to_database(turn);
                    if was_committed {
                        self.wake(turn, &decisions);
                        return Ok(decisions);
                    }
                    if !may_run_again {
                        return Err(StoreError::Unavailable(reason));
                    }
                    may_run_again = false;
                }
                Err(error) => {
                    self.send_to_database(turn);
                    self.await_outcome(turn);
                    return Err(error);
                }
            }
        }
    }

    /// Sends the subscribers of a turn's orgs to the database.
    fn send_to_database(&self, turn: &[OrgBatch]) {
        for batch in turn {
            self.hub.restart(batch.org);
        }
    }

    /// Watches orgs whose last commit has an unknown outcome. Once an org's head is won, the outcome is decided. If the commit
    /// happened, only this announces it to the org's subscribers.
    fn await_outcome(self: &Arc<Self>, turn: &[OrgBatch]) {
        let mut undecided = self.undecided();
        undecided.orgs.extend(turn.iter().map(|batch| batch.org));
        if !std::mem::replace(&mut undecided.is_watched, true) {
            tokio::spawn(Arc::clone(self).watch_undecided());
        }
    }

    async fn watch_undecided(self: Arc<Self>) {
        loop {
            sleep(RESOLVE_PAUSE).await;
            let orgs: Vec<_> = self.undecided().orgs.iter().copied().collect();
            for org in orgs {
                if bounded(self.store.begin(&[org])).await.is_ok() {
                    self.undecided().orgs.remove(&org);
                    self.hub.restart(org);
                }
            }
            let mut undecided = self.undecided();
            if undecided.orgs.is_empty() || self.lanes.is_closed() {
                undecided.is_watched = false;
                return;
            }
        }
    }

    fn undecided(&self) -> MutexGuard<'_, Undecided> {
        self.undecided.lock()
    }

    /// Begins a turn's transaction, from memory or by locking the heads, and determines what the turn needs.
    async fn begin(
        &self,
        turn: &mut Turn,
        left_out: &mut Turn,
        may_recall: bool,
        may_grow: bool,
    ) -> Result<(Box<dyn Batch>, ClockState, Vec<(OrgId, Needs)>), StoreError> {
        let needs_of = |batch: &OrgBatch| needs(batch.commands.iter().map(|pending| &pending.command), batch.most);
        if may_recall {
            let needs: Vec<_> = turn.iter().map(|batch| (batch.org, needs_of(batch), batch.commands.len())).collect();
            if let Some(batch) = self.store.begin_cached(&needs) {
                let needs = needs.into_iter().map(|(org, needs, _)| (org, needs)).collect();
                // Its time is carried on from an earlier reading, so there is no new reading to observe.
                return Ok((batch, ClockState::default(), needs));
            }
        }
        let asked = Moment::now();
        let log_id = self.store.log_id();
        let begun = self.store.begin(&turn.iter().map(|batch| batch.org).collect::<Vec<_>>()).await;
        // Ends subscriptions of the old log before any event of the new one is published.
        if let Some(now) = self.store.log_id().filter(|now| Some(*now) != log_id) {
            self.hub.is_of_log(self.hub.turn(), now);
        }
        let batch = begun?;
        if batch.orgs().len() < turn.len() {
            let held: HashSet<_> = batch.orgs().iter().copied().collect();
            left_out.extend(turn.extract_if(.., |batch| !held.contains(&batch.org)));
        }
        // Locking the head may have taken long, and more commands may wait.
        if let [of_org] = &mut turn[..]
            && may_grow
        {
            self.lanes.top_up(of_org, self.store.capacity());
        }
        let reading = ClockReading { asked, clock: batch.now(), heard: Moment::now() };
        let needs = turn.iter().map(|batch| (batch.org, needs_of(batch))).collect();
        Ok((batch, self.watch.observe(reading), needs))
    }

    /// Everything up to the commit: lock, load, decide, write.
    async fn prepare(
        &self,
        turn: &mut Turn,
        left_out: &mut Turn,
        may_recall: bool,
        may_grow: bool,
    ) -> Result<Prepared, StoreError> {
        let (mut batch, trust, needs) = self.begin(turn, left_out, may_recall, may_grow).await?;
        let began = std::time::Instant::now();
        let secret = LeaseSecret::random().map_err(|error| StoreError::Unavailable(error.to_string()))?;
        let loaded = batch.load(&needs).await?;
        let mut chosen = Vec::with_capacity(turn.len());
        for (OrgBatch { org, commands, most }, loaded) in turn.iter_mut().zip(loaded) {
            let inputs = Inputs { clock: batch.now(), began, trust, secret, most: *most };
            if let Some(last) = loaded.head.recorded_at {
                self.compare_clocks(last - inputs.clock);
            }
            refuse_ahead(&loaded.jobs, loaded.head.seq)?;
            // A panic in a decision fails only its command: the commands of the turn are then run one by one.
            let space = self.lanes.space();
            let quotas = Quotas::of(&self.limits, space.most_of(*org, loaded.head.stock.bytes.max(0).unsigned_abs()));
            chosen.push(defended(|| choose(*org, commands, loaded, inputs, quotas))?);
        }
        // Reads only the rows of the jobs that claims get.
        let wanted: Vec<_> = chosen.iter().flat_map(Chosen::wanted).collect();
        let mut rows: HashMap<OrgId, Vec<Job>> = HashMap::new();
        if !wanted.is_empty() {
            for job in batch.ready_jobs(&wanted).await? {
                rows.entry(job.org_id).or_default().push(job);
            }
        }
        let mut decisions = Vec::with_capacity(chosen.len());
        for chosen in chosen {
            let rows = rows.remove(&chosen.org()).unwrap_or_default();
            refuse_ahead(&rows, chosen.loaded_seq())?;
            decisions.push(defended(|| chosen.decide(rows))?);
        }
        let doubts = turn.iter().zip(&decisions).filter(|(_, decision)| decision.doubts_keys);
        let doubts: Vec<_> = doubts.map(|(batch, _)| batch.org).collect();
        if !doubts.is_empty() {
            batch.doubt_keys(&doubts);
            return Err(StoreError::Conflict("keys are to be looked up".to_owned()));
        }
        let changes: Vec<_> =
            turn.iter().zip(&decisions).map(|(batch, decision)| (batch.org, &decision.changes)).collect();
        let records = batch.write(&changes).await?;
        let record = turn.iter().zip(records).find_map(|(batch, record)| Some((batch.org, record?)));
        let bytes: usize = decisions.iter().map(|decision| decision.changes.text_bytes()).sum();
        let worked = began.elapsed() + COMMIT_OF_MEBIBYTE.mul_f64(bytes as f64 / f64::from(1 << 20));
        Ok(Prepared { batch, decisions, record, worked })
    }

    /// Reports a clock that was set back: `recorded_at` stands still until the clock has caught up with the log.
    fn compare_clocks(&self, behind: TimeDelta) {
        if behind < CLOCK_BEHIND {
            return;
        }
        let mut said = self.said_behind.lock();
        if said.is_none_or(|said| said.elapsed() >= SAY_BEHIND) {
            *said = Some(std::time::Instant::now());
            let seconds = behind.num_seconds();
            tracing::error!(
                seconds,
                "the database's clock is behind the log: recorded_at stands still until it has caught up"
            );
        }
    }

    /// Whether a turn whose commit broke was committed, which its record in the log proves.
    async fn resolve(&self, record: Option<(OrgId, RecordId)>) -> Result<bool, StoreError> {
        // Without a record the turn is run again. Cached states that its answers rest on are confirmed only by a commit.
        let Some((org, record)) = record else { return Ok(false) };
        let until = Instant::now() + self.limits.resolve_within;
        loop {
            let look = async {
                // Once the head is won, the transaction in question is over, one way or the other.
                let mut held = self.store.begin(&[org]).await?;
                let is_there = held.has(org, record).await?;
                if is_there {
                    // The record may be visible and still be lost: if a restart of the database, for instance, cut the wait for
                    // a synchronous standby short, the standby may lack it. A confirmed later commit confirms this one too.
                    held.commit().await?;
                }
                Ok(is_there)
            };
            let looked = timeout_at(until, look).await;
            match looked.unwrap_or_else(|_| Err(StoreError::Unavailable("no answer in time".to_owned()))) {
                Err(error) if Instant::now() + RESOLVE_PAUSE < until => {
                    tracing::debug!(%error, "the outcome can't be read yet");
                    sleep(RESOLVE_PAUSE).await;
                }
                Err(error) => return Err(StoreError::OutcomeUnknown(error.to_string())),
                Ok(found) => return Ok(found),
            }
        }
    }

    fn publish(&self, turn: &[OrgBatch], decisions: &[Decision]) {
        for (batch, decision) in turn.iter().zip(decisions) {
            if self.hub.is_followed(batch.org) {
                self.hub.publish(batch.org, &decision.changes.log());
            }
        }
    }

    /// Wakes claims that wait for jobs that became ready.
    fn wake(&self, turn: &[OrgBatch], decisions: &[Decision]) {
        for (batch, decision) in turn.iter().zip(decisions) {
            if let Some(head) = decision.changes.head
                && !decision.ready.is_empty()
            {
                self.waiting.became_ready(batch.org, head.ready_gen, &decision.ready);
            }
        }
    }

    /// Answers the callers, then announces to other servers how far the logs reach.
    fn finish(&self, turn: Turn, decisions: &[Decision]) {
        let reaches: Vec<_> = reaches(&turn, decisions).collect();
        self.answer(turn);
        if !reaches.is_empty() {
            self.store.announce(&reaches);
        }
    }

    fn answer(&self, turn: Turn) {
        for OrgBatch { org, commands, .. } in turn {
            for mut pending in commands {
                if let Submission::Claim(_, reply) = &mut pending.command
                    && let Some(claimed) = reply.decided_mut()
                {
                    claimed.undelivered = Undelivered::of(&self.lanes, org, &claimed.jobs);
                }
                pending.command.send();
            }
        }
    }
}

/// Runs a decision and turns a panic into an error.
fn defended<T>(decide: impl FnOnce() -> T) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(decide)).map_err(|_| StoreError::Refused("a decision panicked".to_owned()))
}

/// The work of a turn for each org.
fn works(turn: &[OrgBatch], decisions: &[Decision]) -> Vec<Worked> {
    let worked = |(batch, decision): (&OrgBatch, &Decision)| Worked {
        org: batch.org,
        commands: batch.commands.len(),
        events: decision.changes.events.len(),
        bytes: batch.commands.iter().map(|pending| pending.weight).sum(),
    };
    turn.iter().zip(decisions).map(worked).collect()
}

/// How far the logs reach that a turn changes.
fn reaches(turn: &[OrgBatch], decisions: &[Decision]) -> impl Iterator<Item = (OrgId, Reach)> {
    turn.iter().zip(decisions).filter_map(|(batch, decision)| Some((batch.org, decision.changes.head?.reach())))
}

/// Bounds the work before a commit. If it times out, nothing has happened.
async fn bounded<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(UNIT_OF_WORK, work)
        .await
        .unwrap_or_else(|_| Err(StoreError::Unavailable(format!("no answer within {UNIT_OF_WORK:?}"))))
}

/// Refuses jobs whose rows are ahead of the log's head: the end of the log was lost.
fn refuse_ahead(jobs: &[Job], head: i64) -> Result<(), StoreError> {
    match jobs.iter().find(|job| job.last_seq > head) {
        Some(job) => Err(StoreError::Refused(format!(
            "job {} has event {}, but its log ends at {head}: the end of the log was lost",
            job.id, job.last_seq
        ))),
        None => Ok(()),
    }
}
