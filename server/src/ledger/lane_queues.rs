//! The queues behind the lanes' lock: which orgs are ready or busy, and what the next turn takes.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    LedgerError, Limits,
    lane::{Kept, Lane, PASSED_OVER, Room},
    pacing::Pacing,
    pending::{Begun, Load, OrgBatch, Pending, Turn},
};
use crate::{domain::id::OrgId, store::Capacity};

/// A turn takes milliseconds. One that takes longer than this, or that the database does not answer, indicates an outage.
pub(super) const OUTAGE: Duration = Duration::from_secs(3);
/// An outage lasts at least this long after such a turn, even if turns of other orgs end well.
const OUTAGE_LASTS: Duration = Duration::from_secs(1);
/// An outage lasts at most this long after such a turn, and ends earlier once another turn ends well.
const OUTAGE_IS_REMEMBERED: Duration = Duration::from_secs(60);
/// Shared transactions under way at a time, unless they are full. If each org with a command began its own at once, few would
/// share one.
const SHARED_AT_ONCE: usize = 2;
/// A shared transaction that takes longer does not count: a wait for a head or for a standby must not stop others.
const SHARED_FOR: Duration = Duration::from_millis(20);

/// The lanes and their order.
#[derive(Default)]
pub(super) struct LaneQueues {
    /// Only orgs that have waiting commands or a batch under way.
    pub(super) lanes: HashMap<OrgId, Lane>,
    /// Orgs with waiting commands and no batch under way, in the order of their turns.
    pub(super) ready: VecDeque<OrgId>,
    /// All waiting commands.
    pub(super) load: Load,
    pub(super) is_closed: bool,
    /// When a turn last ended, or when commands began to wait after none had.
    pub(super) moved_at: Option<Instant>,
    /// When a turn last ended without an answer of the database, or later than [`OUTAGE`].
    pub(super) outage_at: Option<Instant>,
    /// When a turn last ended with an answer of the database, whichever it was.
    pub(super) answered_at: Option<Instant>,
    /// When the shared turns under way began.
    pub(super) shared: Vec<Instant>,
    /// Orgs that rest so that others get turns.
    pub(super) rests: Pacing,
}

impl LaneQueues {
    /// Why a command is refused that waited since `since`, or that finds no room: an outage, or an overload.
    pub(super) fn refusal(&self, since: Instant) -> LedgerError {
        let was_out = self.outage_at.is_some_and(|at| at >= since);
        if was_out || self.is_out(Instant::now()) { LedgerError::Unavailable } else { LedgerError::Overloaded }
    }

    /// True while commands wait and no turn ends, and for a while after a turn that the database did not answer.
    pub(super) fn is_out(&self, now: Instant) -> bool {
        let is_stuck = self.load.commands > 0 && self.moved_at.is_some_and(|moved_at| now - moved_at >= OUTAGE);
        let is_recent = |at| {
            let lasts = if self.answered_at < Some(at) { OUTAGE_IS_REMEMBERED } else { OUTAGE_LASTS };
            now - at < lasts
        };
        is_stuck || self.outage_at.is_some_and(is_recent)
    }

    /// Takes batches from the orgs whose turn it is. Commands whose callers have gone are dropped here, undecided.
    pub(super) fn take_turn(&mut self, capacity: Capacity, limits: &Limits, now: Instant) -> Begun {
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
    pub(super) fn room(&self, first: Option<OrgId>, capacity: Capacity, limits: &Limits, now: Instant) -> Room {
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

    /// When ready orgs of which no turn could be taken at `now` are tried again: a shared turn stops counting, or an org's rest
    /// ends. `None`: no org is ready.
    pub(super) fn patience(&self, now: Instant) -> Option<Instant> {
        let rests = self.ready.iter().filter_map(|org| self.rests.until(org, now)).min();
        self.counting(now).min().filter(|_| !self.ready.is_empty()).into_iter().chain(rests).min()
    }

    /// Takes up to `most` commands of an org, as far as there is room. Abandoned commands do not count.
    pub(super) fn take(
        &mut self,
        org: OrgId,
        most: Option<usize>,
        room: &mut Room,
        commands: &mut Vec<Pending>,
        limits: &Limits,
    ) {
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
    pub(super) fn release(&mut self, org: OrgId) {
        let Some(lane) = self.lanes.get_mut(&org) else { return };
        lane.is_busy = false;
        if lane.waiting() == 0 {
            self.lanes.remove(&org);
        } else {
            self.ready.push_back(org);
        }
    }
}
