//! One org's queue of commands, and what a transaction takes of it.

use std::collections::VecDeque;

use super::pending::Pending;
use crate::store::Capacity;

/// Commands of an org with which its batch shares no transaction, where several may be open.
pub(super) const MANY: usize = 16;
#[derive(Default)]
pub(super) struct Lane {
    /// Commands on running jobs, claims and sweeps: see [`Command::is_vital`].
    pub(super) vital: VecDeque<Pending>,
    /// All others.
    pub(super) rest: VecDeque<Pending>,
    /// The first of the rest was passed over for its size: it is next, before anything else.
    pub(super) is_rest_due: bool,
    /// What those take that wait.
    pub(super) bytes: usize,
    pub(super) is_busy: bool,
    /// Another held its head when it was to share a transaction: it goes alone the next time, and waits for it.
    pub(super) goes_alone: bool,
    /// Commands that wait and share no transaction with other orgs: see [`Command::goes_alone`].
    pub(super) loners: usize,
}

impl Lane {
    pub(super) fn waiting(&self) -> usize {
        self.vital.len() + self.rest.len()
    }

    /// True if its next batch has a transaction to itself: many commands are one's worth, and others would wait for them where they
    /// could go at the same time.
    pub(super) fn is_alone(&self, capacity: Capacity) -> bool {
        self.goes_alone || self.loners > 0 || capacity.transactions > 1 && self.waiting() >= MANY
    }

    pub(super) fn queue(&mut self, is_vital: bool) -> &mut VecDeque<Pending> {
        if is_vital { &mut self.vital } else { &mut self.rest }
    }
}

/// What a transaction can still take.
pub(super) struct Room {
    pub(super) commands: usize,
    pub(super) bytes: usize,
    /// It has nothing yet: a command that is larger than all of it is taken alone.
    pub(super) is_empty: bool,
}

/// Room that is left for others.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) commands: usize,
    pub(super) bytes: usize,
}

impl Kept {
    pub(super) const NOTHING: Self = Self { commands: 0, bytes: 0 };
}
