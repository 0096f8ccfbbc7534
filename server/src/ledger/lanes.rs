//! The lanes: one queue of commands for each org, taken in turn.
//!
//! An org with commands waiting is ready; one whose batch is under way is busy, and never ready at the same time: that
//! makes its log serial. Queues are bounded in commands and in bytes, over all lanes together.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    LedgerError, Limits,
    command::{Command, Reply},
};
use crate::domain::id::OrgId;

/// What the caller of a command is told.
pub(super) type Answer = Result<Reply, LedgerError>;

/// All lanes.
pub(super) struct Lanes {
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
    /// When a turn last ended, or commands began to wait after none had.
    moved_at: Option<Instant>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Pending>,
    is_busy: bool,
}

/// A command and who waits for its answer.
pub(super) struct Pending {
    pub(super) command: Command,
    weight: usize,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// One org's share of a transaction.
pub(super) struct OrgBatch {
    pub(super) org: OrgId,
    pub(super) commands: Vec<Pending>,
}

/// A transaction's worth of work.
pub(super) type Turn = Vec<OrgBatch>;

impl Lanes {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), work: Notify::new() }
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
        if state.commands == 0 {
            state.moved_at = Some(Instant::now());
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

    /// How long commands have been waiting while no turn ended; zero if none waits.
    pub(super) fn stalled_for(&self) -> Duration {
        let state = self.state();
        let moved_at = state.moved_at.filter(|_| state.commands > 0);
        moved_at.map_or(Duration::ZERO, |moved_at| moved_at.elapsed())
    }

    /// Refuses new commands; those that wait are still taken.
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.work.notify_waiters();
        self.work.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Waits for orgs that have commands and takes their batches; `None` once closed and empty.
    pub(super) async fn next_turn(&self, max_orgs: usize) -> Option<Turn> {
        loop {
            {
                let mut state = self.state();
                let turn = state.take_turn(max_orgs, &self.limits);
                if !turn.is_empty() {
                    let has_more = !state.ready.is_empty();
                    drop(state);
                    if has_more {
                        self.work.notify_one();
                    }
                    return Some(turn);
                }
                if state.is_closed && state.lanes.is_empty() {
                    drop(state);
                    // Other writers may be waiting for work that will not come.
                    self.work.notify_one();
                    return None;
                }
            }
            self.work.notified().await;
        }
    }

    /// Ends the turn of these orgs: those with more commands queue up again.
    pub(super) fn finish_turn(&self, orgs: &[OrgId]) {
        let mut state = self.state();
        state.moved_at = Some(Instant::now());
        for org in orgs {
            state.release(*org);
        }
        let wake = !state.ready.is_empty() || state.is_closed;
        drop(state);
        if wake {
            self.work.notify_one();
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
