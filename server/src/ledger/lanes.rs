//! The lanes: one queue of commands for each org, taken in turn.
//!
//! An org with waiting commands is ready. An org whose batch is under way is busy, and never ready at the same time: this makes
//! its log serial. Queues are bounded in commands and in bytes, over all lanes together. Vital commands, which keep running
//! jobs alive or end them, have a quarter more room and are taken first.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::{
    LedgerError, Limits,
    command::Author,
    disk_space::Space,
    lane::{Kept, Lane, MANY, PASSED_OVER, Room},
    pacing::{Pacing, Worked},
    pending::{Begun, Load, OrgBatch, Pending, Turn},
    submission::{Receiver, ReplyTo, Submission},
};
use crate::{
    domain::{id::OrgId, transition::GiveBack},
    shares::with_reserve,
    store::Capacity,
};

/// One lane may have one part in this many of the bytes of all lanes.
const ORG_SHARE: usize = 4;
/// A turn takes milliseconds. One that takes longer than this, or that the database does not answer, indicates an outage.
pub(super) const OUTAGE: Duration = Duration::from_secs(3);
/// An outage lasts at least this long after such a turn, even if turns of other orgs end well.
const OUTAGE_LASTS: Duration = Duration::from_secs(1);
/// An outage lasts at most this long after such a turn, and ends earlier once another turn ends well.
const OUTAGE_IS_REMEMBERED: Duration = Duration::from_secs(60);

pub(super) struct Lanes {
    limits: Limits,
    state: Mutex<LaneQueues>,
    work: Notify,
    /// Free space of the database's disk.
    space: Space,
}

#[derive(Default)]
struct LaneQueues {
    /// Only orgs that have waiting commands or a batch under way.
    lanes: HashMap<OrgId, Lane>,
    /// Orgs with waiting commands and no batch under way, in the order of their turns.
    ready: VecDeque<OrgId>,
    /// All waiting commands.
    load: Load,
    is_closed: bool,
    /// When a turn last ended, or when commands began to wait after none had.
    moved_at: Option<Instant>,
    /// When a turn last ended without an answer of the database, or later than [`OUTAGE`].
    outage_at: Option<Instant>,
    /// When a turn last ended with an answer of the database, whichever it was.
    answered_at: Option<Instant>,
    /// When the shared turns under way began.
    shared: Vec<Instant>,
    /// Orgs that rest so that others get turns.
    rests: Pacing,
}

/// Shared transactions under way at a time, unless they are full. If each org with a command began its own at once, few would
/// share one.
const SHARED_AT_ONCE: usize = 2;
/// A shared transaction that takes longer does not count: a wait for a head or for a standby must not stop others.
const SHARED_FOR: Duration = Duration::from_millis(20);
/// Orgs that are ready, and of which no turn could be taken, are tried again within this time.
const TRIED_WITHIN: Duration = Duration::from_millis(100);

impl Lanes {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), work: Notify::new(), space: Space::default() }
    }

    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// Appends a command to its org's lane. `of` says which kind it is: a variant of [`Submission`].
    pub(super) fn enqueue_one<C, R>(
        &self,
        by: Author,
        of: impl FnOnce(C, ReplyTo<R>) -> Submission,
        command: C,
    ) -> Result<Receiver<R>, LedgerError> {
        let (reply, receiver) = ReplyTo::channel();
        let pending = Pending::new(of(command, reply), by.actor);
        self.space.refuse(&pending.command)?;
        let state = self.admit(by.org, 1, pending.weight, pending.command.is_vital())?;
        self.push(state, by.org, [pending]);
        Ok(receiver)
    }

    /// Appends commands of one kind to their org's lane: all of them, or none.
    pub(super) fn enqueue<C, R>(
        &self,
        by: &Author,
        of: impl Fn(C, ReplyTo<R>) -> Submission,
        commands: Vec<C>,
    ) -> Result<Vec<Receiver<R>>, LedgerError> {
        let (mut pending, mut receivers) = (Vec::with_capacity(commands.len()), Vec::with_capacity(commands.len()));
        for command in commands {
            let (reply, receiver) = ReplyTo::channel();
            let command = of(command, reply);
            self.space.refuse(&command)?;
            pending.push(Pending::new(command, by.actor.clone()));
            receivers.push(receiver);
        }
        let weight: usize = pending.iter().map(|pending| pending.weight).sum();
        let is_vital = pending.iter().all(|pending| pending.command.is_vital());
        let state = self.admit(by.org, pending.len(), weight, is_vital)?;
        self.push(state, by.org, pending);
        Ok(receivers)
    }

    /// Locks the state if it has room for this many commands of this many bytes.
    fn admit(
        &self,
        org: OrgId,
        commands: usize,
        weight: usize,
        is_vital: bool,
    ) -> Result<MutexGuard<'_, LaneQueues>, LedgerError> {
        let most = |limit| if is_vital { with_reserve(limit) } else { limit };
        let state = self.state();
        if state.is_closed {
            return Err(LedgerError::Draining);
        }
        let (waiting, bytes) = state.load.asked();
        let is_full = waiting + commands > most(self.limits.queued_commands);
        if is_full || bytes + weight > most(self.limits.queued_bytes) {
            return Err(state.refusal(Instant::now()));
        }
        if let Some(lane) = state.lanes.get(&org) {
            let is_full = lane.waiting() + commands > most(self.limits.queued_commands_per_org);
            // An empty lane accepts a command that exceeds the bound by itself.
            if is_full || lane.bytes > 0 && lane.bytes + weight > most(self.limits.queued_bytes / ORG_SHARE) {
                return Err(state.refusal(Instant::now()));
            }
        }
        Ok(state)
    }

    /// Gives jobs back that were claimed and not delivered. This follows from accepted commands, so bounds do not apply, and it
    /// is accepted while the lanes drain.
    pub(super) fn give_back(&self, org: OrgId, jobs: impl IntoIterator<Item = GiveBack>) {
        let pending = |job| Pending::new(Submission::GiveBack(job), None);
        self.push(self.state(), org, jobs.into_iter().map(pending));
    }

    fn push(&self, mut guard: MutexGuard<'_, LaneQueues>, org: OrgId, pending: impl IntoIterator<Item = Pending>) {
        let state = &mut *guard;
        if state.load.commands == 0 {
            state.moved_at = Some(Instant::now());
        }
        let mut pending = pending.into_iter().peekable();
        if pending.peek().is_none() {
            return;
        }
        let lane = state.lanes.entry(org).or_default();
        let before = lane.waiting();
        let is_first = before == 0 && !lane.is_busy;
        for pending in pending {
            state.load.add(&pending);
            lane.bytes += pending.weight;
            lane.loners += usize::from(pending.command.goes_alone());
            lane.queue(pending.command.is_vital()).push_back(pending);
        }
        let becomes_alone = !lane.is_busy && before < MANY && lane.waiting() >= MANY;
        if is_first {
            state.ready.push_back(org);
        }
        drop(guard);
        if is_first || becomes_alone {
            self.work.notify_one();
        }
    }

    /// How long commands have been waiting while no turn ended; zero if none waits.
    pub(super) fn stalled_for(&self) -> Duration {
        let state = self.state();
        let moved_at = state.moved_at.filter(|_| state.load.commands > 0);
        moved_at.map_or(Duration::ZERO, |moved_at| moved_at.elapsed())
    }

    /// True while the database does not answer: a lack of room is then not the callers' fault.
    pub(super) fn is_stalled(&self) -> bool {
        self.state().is_out(Instant::now())
    }

    /// Refuses new commands. Waiting commands are still taken.
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.work.notify_waiters();
        self.work.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Waits for orgs with commands and takes their batches; `None` once closed and empty.
    pub(super) async fn next_turn(&self, capacity: Capacity) -> Option<Begun> {
        loop {
            let patience;
            {
                let mut state = self.state();
                let begun = state.take_turn(capacity, &self.limits);
                if !begun.turn.is_empty() {
                    let has_more = !state.ready.is_empty();
                    drop(state);
                    if has_more {
                        self.work.notify_one();
                    }
                    return Some(begun);
                }
                patience = state.patience(Instant::now());
                if state.is_closed && state.lanes.is_empty() {
                    drop(state);
                    // Wakes the other writers, which may be waiting for work that will not come.
                    self.work.notify_one();
                    return None;
                }
            }
            match patience {
                Some(until) => _ = timeout_at(until, self.work.notified()).await,
                None => self.work.notified().await,
            }
        }
    }

    /// Adds commands that arrived since an org's batch was taken, as far as the batch has room.
    pub(super) fn top_up(&self, batch: &mut OrgBatch, capacity: Capacity) {
        let mut state = self.state();
        let mut room = state.room(Some(batch.org), capacity, &self.limits, Instant::now());
        batch.commands.iter().for_each(|taken| room.take(batch.org, taken));
        let most = batch.most.map(|most| most.saturating_sub(batch.commands.len()));
        state.take(batch.org, most, &mut room, &mut batch.commands, &self.limits);
    }

    /// Puts back the commands of orgs that a turn left out, in their old order. These orgs go alone, before all others.
    pub(super) fn put_back(&self, left_out: Turn) {
        if left_out.is_empty() {
            return;
        }
        let mut state = self.state();
        let state = &mut *state;
        for OrgBatch { org, commands, .. } in left_out {
            let lane = state.lanes.entry(org).or_default();
            (lane.is_busy, lane.goes_alone) = (false, true);
            for pending in commands.into_iter().rev() {
                state.load.add(&pending);
                lane.bytes += pending.weight;
                lane.loners += usize::from(pending.command.goes_alone());
                lane.queue(pending.command.is_vital()).push_front(pending);
            }
            state.ready.push_front(org);
        }
        self.work.notify_one();
    }

    /// Records how much work a turn was before its commit.
    pub(super) fn worked(&self, turn: &[Worked], took: Duration) {
        self.state().rests.worked(turn, took, Instant::now());
    }

    /// Ends a turn of these orgs. Orgs with more commands queue up again. `is_outage`: the database did not answer, or took
    /// longer than [`OUTAGE`].
    pub(super) fn finish_turn(&self, orgs: &[OrgId], (began, shared): (Instant, Option<Instant>), is_outage: bool) {
        let mut state = self.state();
        if let Some(n) = state.shared.iter().position(|began| Some(*began) == shared) {
            state.shared.swap_remove(n);
        }
        let now = Instant::now();
        state.moved_at = Some(now);
        *if is_outage { &mut state.outage_at } else { &mut state.answered_at } = Some(now);
        state.rests.ended(orgs, now - began, now);
        for org in orgs {
            state.release(*org);
        }
        let wake = !state.ready.is_empty() || state.is_closed;
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, LaneQueues> {
        self.state.lock()
    }
}

impl LaneQueues {
    /// Why a command is refused that waited since `since`, or that finds no room: an outage, or an overload.
    fn refusal(&self, since: Instant) -> LedgerError {
        let was_out = self.outage_at.is_some_and(|at| at >= since);
        if was_out || self.is_out(Instant::now()) { LedgerError::Unavailable } else { LedgerError::Overloaded }
    }

    /// True while commands wait and no turn ends, and for a while after a turn that the database did not answer.
    fn is_out(&self, now: Instant) -> bool {
        let is_stuck = self.load.commands > 0 && self.moved_at.is_some_and(|moved_at| now - moved_at >= OUTAGE);
        let is_recent = |at| {
            let lasts = if self.answered_at < Some(at) { OUTAGE_IS_REMEMBERED } else { OUTAGE_LASTS };
            now - at < lasts
        };
        is_stuck || self.outage_at.is_some_and(is_recent)
    }

    /// Takes batches from the orgs whose turn it is. Commands whose callers have gone are dropped here, undecided.
    fn take_turn(&mut self, capacity: Capacity, limits: &Limits) -> Begun {
        let now = Instant::now();
        if !self.may_share(capacity, limits, now) {
            let is_alone = |org: &OrgId| self.lanes.get(org).is_none_or(|lane| lane.is_alone(capacity));
            let Some(alone) = self.ready.iter().position(is_alone).and_then(|n| self.ready.remove(n)) else {
                return Begun { turn: Turn::new(), shared: None };
            };
            self.ready.push_front(alone);
        }
        let resting = if capacity.transactions == 1 { self.take_resting(now) } else { Vec::new() };
        let mut shared = None;
        let first = self.ready.front().copied();
        let mut room = self.room(first, capacity, limits, now);
        let room_at_first = room.bytes;
        let mut turn = Turn::new();
        while turn.len() < capacity.orgs
            && room.commands > 0
            && let Some(org) = self.ready.pop_front()
        {
            let is_alone = self.lanes.get(&org).is_some_and(|lane| lane.is_alone(capacity));
            let is_large = room_at_first.saturating_sub(room.bytes) >= limits.shared_bytes;
            if !turn.is_empty() && (is_alone || is_large) {
                // The org comes first in the next turn.
                self.ready.push_front(org);
                break;
            }
            let mut commands = Vec::new();
            let most = self.most(org, capacity, now);
            self.take(org, most, &mut room, &mut commands, limits);
            let Some(lane) = self.lanes.get_mut(&org) else { continue };
            if commands.is_empty() {
                if lane.waiting() == 0 {
                    // All its commands were abandoned.
                    self.lanes.remove(&org);
                    continue;
                }
                // The transaction is full. The org comes first in the next one.
                self.ready.push_front(org);
                break;
            }
            (lane.is_busy, lane.goes_alone) = (true, false);
            turn.push(OrgBatch { org, commands, most });
            if is_alone {
                break;
            }
            shared = Some(now);
        }
        resting.into_iter().rev().for_each(|org| self.ready.push_front(org));
        self.shared.extend(shared);
        Begun { turn, shared }
    }

    /// The room of a transaction that begins with commands of the org `first`.
    fn room(&self, first: Option<OrgId>, capacity: Capacity, limits: &Limits, now: Instant) -> Room {
        let do_others_call = first.is_some_and(|org| self.rests.do_others_call(org, now));
        if capacity.transactions == 1 && do_others_call {
            return Room::new(limits.batch_commands, limits.shared_bytes).with_few_labels();
        }
        Room::new(limits.batch_commands, limits.batch_bytes)
    }

    /// Bound on an org's commands in a turn, and on the jobs that they change besides those that they name; `None`: unbounded.
    fn most(&self, org: OrgId, capacity: Capacity, now: Instant) -> Option<usize> {
        self.rests.most(org, now).filter(|_| capacity.transactions == 1)
    }

    /// Removes resting orgs from the queue of ready orgs.
    fn take_resting(&mut self, now: Instant) -> Vec<OrgId> {
        let (rests, mut resting) = (&self.rests, Vec::new());
        if !self.is_closed {
            self.ready.retain(|org| {
                let is_resting = rests.until(org, now).is_some();
                resting.extend(is_resting.then_some(*org));
                !is_resting
            });
        }
        resting
    }

    /// True if orgs with few commands may begin another transaction.
    fn may_share(&self, capacity: Capacity, limits: &Limits, now: Instant) -> bool {
        let is_full = self.ready.len() >= capacity.orgs || self.load.commands >= limits.batch_commands;
        is_full || self.counting(now).count() < SHARED_AT_ONCE
    }

    /// The shared turns that count against [`SHARED_AT_ONCE`], each as the time at which it stops counting.
    fn counting(&self, now: Instant) -> impl Iterator<Item = Instant> {
        self.shared.iter().map(|began| *began + SHARED_FOR).filter(move |until| *until > now)
    }

    /// When ready orgs are tried again: a shared turn stops counting, an org's rest ends, or [`TRIED_WITHIN`] is over, so that no
    /// org waits for a call of another. `None`: no org is ready.
    fn patience(&self, now: Instant) -> Option<Instant> {
        let rests = self.ready.iter().filter_map(|org| self.rests.until(org, now)).min();
        let latest = (!self.ready.is_empty()).then(|| now + TRIED_WITHIN)?;
        self.counting(now).chain(rests).min().map(|soonest| soonest.min(latest)).or(Some(latest))
    }

    /// Takes up to `most` commands of an org, as far as there is room. Abandoned commands do not count.
    fn take(&mut self, org: OrgId, most: Option<usize>, room: &mut Room, commands: &mut Vec<Pending>, limits: &Limits) {
        let kept = most.map_or(0, |most| room.commands.saturating_sub(most));
        room.commands -= kept;
        self.take_in_turn(org, room, commands, limits);
        room.commands += kept;
    }

    fn take_in_turn(&mut self, org: OrgId, room: &mut Room, commands: &mut Vec<Pending>, limits: &Limits) {
        let Some(lane) = self.lanes.get(&org).filter(|_| room.commands > 0) else { return };
        commands.reserve(lane.waiting().min(room.commands));
        if lane.is_rest_due
            && !self.take_of(org, false, Kept { commands: room.commands - 1, bytes: 0 }, room, commands, limits)
        {
            // Other orgs have taken some of the room, and the rest is too small.
            return;
        }
        // The `rest` queue has a quarter of each batch, however many vital commands wait.
        let Some(lane) = self.lanes.get(&org) else { return };
        let kept = match lane.rest.len() {
            0 => Kept::NOTHING,
            waiting => Kept { commands: waiting.min(room.commands / 4), bytes: room.bytes / 4 },
        };
        self.take_of(org, true, kept, room, commands, limits);
        let is_all = self.take_of(org, false, Kept::NOTHING, room, commands, limits);
        if let Some(lane) = self.lanes.get_mut(&org) {
            lane.is_rest_due = !is_all;
        }
        self.take_of(org, true, Kept::NOTHING, room, commands, limits);
    }

    /// Takes commands from one of an org's queues and leaves `kept` room. False if a command was left because it did not fit.
    fn take_of(
        &mut self,
        org: OrgId,
        is_vital: bool,
        kept: Kept,
        room: &mut Room,
        commands: &mut Vec<Pending>,
        limits: &Limits,
    ) -> bool {
        // Claims for which there is no room stay in the queue, and the commands behind them pass.
        let mut passed_over = 0;
        while room.commands > kept.commands {
            let Some(lane) = self.lanes.get_mut(&org) else { return true };
            let queue = lane.queue(is_vital);
            let next = queue.get(passed_over);
            let is_over = |next: &Pending| next.command.is_abandoned() || next.is_late(limits);
            if next.is_some_and(|next| !is_over(next) && room.passes_over(org, next)) && passed_over < PASSED_OVER {
                passed_over += 1;
                continue;
            }
            let fits = |next: &&Pending| is_over(next) || room.fits(next, kept) && !room.passes_over(org, next);
            let next = next.filter(fits).is_some().then(|| queue.remove(passed_over)).flatten();
            let Some(next) = next else { return queue.is_empty() };
            lane.bytes -= next.weight;
            lane.loners -= usize::from(next.command.goes_alone());
            self.load.remove(&next);
            if next.command.is_abandoned() {
                continue;
            }
            if next.is_late(limits) {
                let refusal = self.refusal(next.since);
                next.command.refuse(refusal);
                continue;
            }
            room.take(org, &next);
            commands.push(next);
        }
        true
    }

    /// Ends an org's turn. The org queues up again if more commands are waiting.
    fn release(&mut self, org: OrgId) {
        let Some(lane) = self.lanes.get_mut(&org) else { return };
        lane.is_busy = false;
        if lane.waiting() == 0 {
            self.lanes.remove(&org);
        } else {
            self.ready.push_back(org);
        }
    }
}
