//! The lanes: one queue of commands for each org, decided and committed in batches.
//!
//! Whoever commits takes the orgs that have work in turn. While one batch commits, the next gathers; a lone command never
//! waits for company. At most one batch of an org is under way at a time, so an org's log is serial.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    LedgerError, Limits,
    command::{Command, Reply},
    decide::{Decision, decide, needs},
    hub::Hub,
};
use crate::{
    domain::id::OrgId,
    store::{Batch, EventFilter, EventQuery, Store, StoreError},
};

/// How long loading and writing, or committing, may take before the connection is given up.
const UNIT_OF_WORK: Duration = Duration::from_secs(10);
/// The wait between two looks for the outcome of a broken commit.
const RESOLVE_PAUSE: Duration = Duration::from_millis(100);

type Answer = Result<Reply, LedgerError>;

/// All lanes, and what moves them.
pub(super) struct Lanes {
    store: Arc<dyn Store>,
    hub: Arc<Hub>,
    limits: Limits,
    state: Mutex<State>,
    work: Notify,
}

#[derive(Default)]
struct State {
    /// Only orgs that have commands waiting or a batch under way.
    lanes: HashMap<OrgId, Lane>,
    /// Orgs with commands waiting and no batch under way, in the order of their turn.
    ready: VecDeque<OrgId>,
    commands: usize,
    bytes: usize,
    is_closed: bool,
    /// Orgs whose last commit may or may not have happened.
    undecided: HashSet<OrgId>,
    is_watching: bool,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Pending>,
    is_busy: bool,
}

/// A command and who waits for its answer.
struct Pending {
    command: Command,
    weight: usize,
    answer: oneshot::Sender<Answer>,
}

/// One org's share of a transaction.
struct OrgBatch {
    org: OrgId,
    commands: Vec<Pending>,
}

/// A transaction's worth of work.
type Turn = Vec<OrgBatch>;

impl Lanes {
    pub(super) fn new(store: Arc<dyn Store>, hub: Arc<Hub>, limits: Limits) -> Self {
        Self { store, hub, limits, state: Mutex::default(), work: Notify::new() }
    }

    /// Puts a command at the end of its org's lane.
    pub(super) fn enqueue(&self, org: OrgId, command: Command) -> Result<oneshot::Receiver<Answer>, LedgerError> {
        let weight = command.weight();
        let (answer, receiver) = oneshot::channel();
        let mut state = self.state();
        if state.is_closed {
            return Err(LedgerError::Draining);
        }
        if state.commands >= self.limits.queued_commands || state.bytes + weight > self.limits.queued_bytes {
            return Err(LedgerError::Overloaded);
        }
        state.commands += 1;
        state.bytes += weight;
        let lane = state.lanes.entry(org).or_default();
        lane.waiting.push_back(Pending { command, weight, answer });
        if lane.waiting.len() == 1 && !lane.is_busy {
            state.ready.push_back(org);
            drop(state);
            self.work.notify_one();
        }
        Ok(receiver)
    }

    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.work.notify_waiters();
        self.work.notify_one();
    }

    /// Moves the lanes until they are closed and empty.
    pub(super) async fn run(self: Arc<Self>) {
        let mut writers = JoinSet::new();
        for _ in 0..self.store.capacity().transactions {
            writers.spawn(Arc::clone(&self).write());
        }
        while let Some(ended) = writers.join_next().await {
            if let Err(error) = ended {
                // A panic here is a defect that must not turn into a server that hangs.
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }

    async fn write(self: Arc<Self>) {
        while let Some(turn) = self.next_turn().await {
            let orgs: Vec<_> = turn.iter().map(|batch| batch.org).collect();
            self.commit(turn).await;
            self.finish_turn(&orgs);
        }
        // The others may be waiting for work that will not come.
        self.work.notify_one();
    }

    /// Waits for orgs that have commands and takes their batches; `None` once closed and empty.
    async fn next_turn(&self) -> Option<Turn> {
        loop {
            {
                let mut state = self.state();
                let turn = state.take_turn(self.store.capacity().orgs, &self.limits);
                if !turn.is_empty() {
                    let has_more = !state.ready.is_empty();
                    drop(state);
                    if has_more {
                        self.work.notify_one();
                    }
                    return Some(turn);
                }
                if state.is_closed && state.lanes.is_empty() {
                    return None;
                }
            }
            self.work.notified().await;
        }
    }

    fn finish_turn(&self, orgs: &[OrgId]) {
        let mut state = self.state();
        for org in orgs {
            state.release(*org);
        }
        let wake = !state.ready.is_empty() || state.is_closed;
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Commits a turn and answers everyone in it.
    async fn commit(self: &Arc<Self>, turn: Turn) {
        match self.attempt(&turn).await {
            Ok(decisions) => answer(turn, decisions),
            // The database refused data that validation let through: only the culprit shall hear of it.
            Err(StoreError::Refused(reason)) if turn.iter().map(|batch| batch.commands.len()).sum::<usize>() > 1 => {
                tracing::warn!(reason, "the database refused a batch; its commands are run one by one");
                for OrgBatch { org, commands } in turn {
                    for pending in commands {
                        let alone = vec![OrgBatch { org, commands: vec![pending] }];
                        match self.attempt(&alone).await {
                            Ok(decisions) => answer(alone, decisions),
                            Err(error) => refuse(alone, error),
                        }
                    }
                }
            }
            Err(error) => refuse(turn, error),
        }
    }

    /// Runs a turn as one transaction. On success everything is durable and the subscribers have it.
    async fn attempt(self: &Arc<Self>, turn: &[OrgBatch]) -> Result<Vec<Decision>, StoreError> {
        // A broken commit that never happened is run again, once.
        let mut may_run_again = true;
        loop {
            let (batch, decisions) = bounded(self.prepare(turn)).await?;
            let reason = match timeout(UNIT_OF_WORK, batch.commit()).await {
                Ok(Ok(())) => {
                    self.publish(turn, &decisions);
                    return Ok(decisions);
                }
                Ok(Err(StoreError::OutcomeUnknown(reason))) => reason,
                Ok(Err(error)) => return Err(error),
                Err(_) => "the commit took too long".to_owned(),
            };
            tracing::warn!(reason, "a commit broke; looking for its outcome");
            match self.resolve(turn, &decisions).await {
                Ok(was_committed) => {
                    // Memory does not have these events.
                    self.send_to_database(turn);
                    if was_committed {
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

    /// Has the subscribers of a turn's orgs read on from the database.
    fn send_to_database(&self, turn: &[OrgBatch]) {
        for batch in turn {
            self.hub.restart(batch.org);
        }
    }

    /// Looks after orgs whose last commit is undecided: once their heads can be won it is decided, and if it happened
    /// nobody else will tell their subscribers.
    fn await_outcome(self: &Arc<Self>, turn: &[OrgBatch]) {
        let is_watched = {
            let mut state = self.state();
            state.undecided.extend(turn.iter().map(|batch| batch.org));
            std::mem::replace(&mut state.is_watching, true)
        };
        if !is_watched {
            tokio::spawn(Arc::clone(self).watch_undecided());
        }
    }

    async fn watch_undecided(self: Arc<Self>) {
        loop {
            sleep(RESOLVE_PAUSE).await;
            let orgs: Vec<_> = self.state().undecided.iter().copied().collect();
            for org in orgs {
                if bounded(self.store.begin(&[org])).await.is_ok() {
                    self.state().undecided.remove(&org);
                    self.hub.restart(org);
                }
            }
            let mut state = self.state();
            if state.undecided.is_empty() || state.is_closed {
                state.is_watching = false;
                return;
            }
        }
    }

    /// Everything up to the commit: lock, load, decide, write.
    async fn prepare(&self, turn: &[OrgBatch]) -> Result<(Box<dyn Batch>, Vec<Decision>), StoreError> {
        let orgs: Vec<_> = turn.iter().map(|batch| batch.org).collect();
        let mut batch = self.store.begin(&orgs).await?;
        let mut decisions = Vec::with_capacity(turn.len());
        for OrgBatch { org, commands } in turn {
            let commands = || commands.iter().map(|pending| &pending.command);
            let loaded = batch.load(*org, &needs(commands())).await?;
            let decision = decide(*org, commands(), loaded, batch.now(), self.limits.types_per_org);
            batch.write(*org, &decision.changes).await?;
            decisions.push(decision);
        }
        Ok((batch, decisions))
    }

    /// Whether a turn whose commit broke was committed: its first event is in the log, or it isn't.
    async fn resolve(&self, turn: &[OrgBatch], decisions: &[Decision]) -> Result<bool, StoreError> {
        let mine = turn
            .iter()
            .zip(decisions)
            .find_map(|(batch, decision)| Some((batch.org, decision.changes.events.first()?)));
        let Some((org, mine)) = mine else {
            // Nothing was to be written: the answers hold either way.
            return Ok(true);
        };
        let until = Instant::now() + self.limits.resolve_within;
        loop {
            let look = async {
                // Winning the head means that the transaction in question is over, one way or the other.
                let _held = self.store.begin(&[org]).await?;
                let filter = EventFilter::default();
                let query = EventQuery { filter, after: mine.seq - 1, max_events: 1, max_bytes: 0 };
                let page = self.store.events(org, &query).await?;
                Ok(page.events.first().is_some_and(|found| {
                    (found.seq, found.job_id, found.job_seq, found.kind, found.recorded_at)
                        == (mine.seq, mine.job_id, mine.job_seq, mine.kind, mine.recorded_at)
                }))
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
            self.hub.publish(batch.org, &decision.changes.events);
        }
    }

    /// The state stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes batches from the orgs whose turn it is. Commands whose callers are gone are dropped here, undecided.
    fn take_turn(&mut self, max_orgs: usize, limits: &Limits) -> Turn {
        let (mut commands_left, mut bytes_left) = (limits.batch_commands, limits.batch_bytes);
        let mut turn = Turn::new();
        while turn.len() < max_orgs
            && commands_left > 0
            && let Some(org) = self.ready.pop_front()
        {
            let Some(lane) = self.lanes.get_mut(&org) else { continue };
            let mut commands = Vec::with_capacity(lane.waiting.len().min(commands_left));
            while commands_left > 0
                && let Some(next) = lane.waiting.pop_front_if(|next| {
                    next.answer.is_closed() || next.weight <= bytes_left || bytes_left == limits.batch_bytes
                })
            {
                self.commands -= 1;
                self.bytes -= next.weight;
                if next.answer.is_closed() {
                    continue;
                }
                commands_left -= 1;
                bytes_left = bytes_left.saturating_sub(next.weight);
                commands.push(next);
            }
            if commands.is_empty() {
                if lane.waiting.is_empty() {
                    // No caller is left.
                    self.lanes.remove(&org);
                    continue;
                }
                // The transaction is full: this org comes first in the next one.
                self.ready.push_front(org);
                break;
            }
            lane.is_busy = true;
            turn.push(OrgBatch { org, commands });
        }
        turn
    }

    /// Ends an org's turn: it queues up again if more commands are waiting.
    fn release(&mut self, org: OrgId) {
        let Some(lane) = self.lanes.get_mut(&org) else { return };
        lane.is_busy = false;
        if lane.waiting.is_empty() {
            self.lanes.remove(&org);
        } else {
            self.ready.push_back(org);
        }
    }
}

/// Bounds a unit of work before its commit. Given up, it never happened.
async fn bounded<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(UNIT_OF_WORK, work)
        .await
        .unwrap_or_else(|_| Err(StoreError::Unavailable(format!("no answer within {UNIT_OF_WORK:?}"))))
}

fn answer(turn: Turn, decisions: Vec<Decision>) {
    for (batch, decision) in turn.into_iter().zip(decisions) {
        for (pending, reply) in batch.commands.into_iter().zip(decision.replies) {
            // A caller that has gone since has had its command decided all the same.
            let _ = pending.answer.send(reply);
        }
    }
}

fn refuse(turn: Turn, error: StoreError) {
    for batch in &turn {
        tracing::warn!(org_id = %batch.org, commands = batch.commands.len(), %error, "a batch failed");
    }
    let error = LedgerError::from(error);
    for pending in turn.into_iter().flat_map(|batch| batch.commands) {
        let _ = pending.answer.send(Err(error.clone()));
    }
}
