//! Jobs that are due, and jobs that the clock postponed while it was ahead.

use std::time::Duration;

use super::{super::command::Swept, Log};
use crate::{
    domain::{
        clock::Time,
        transition::{self, Sweep},
    },
    store::NextDue,
};

/// Most due jobs that one batch handles.
const JOBS: usize = 1_000;

/// The same for a batch that may change only `most` jobs.
pub(super) fn most(most: Option<usize>) -> usize {
    most.map_or(JOBS, |most| most.clamp(1, JOBS))
}

impl Log {
    pub(super) fn sweep(&mut self, sweep: Sweep) -> Swept {
        let due = std::mem::take(&mut self.due);
        let has_more = due.len() >= most(self.most);
        // Jobs are in the order of their due times, so the remaining ones are due no earlier.
        let last = due.last().and_then(|id| self.jobs.get(id)?.due_at);
        for id in due {
            // A job that this batch changed is judged as it is now. One that was removed or is no longer due is skipped.
            let _ = self.apply(id, &transition::Command::Sweep(sweep));
        }
        self.end_pauses();
        // What an erasure has left goes first: the operation that it may be part of is not over before.
        let has_bulk = self.blank_next() || self.step_bulk();
        let next = if has_more { last } else { self.next_due };
        let next = if has_bulk { Some(self.now) } else { self.or_end_of_pause(next) };
        self.changes.next_due = Some(NextDue::At(next));
        Swept { has_more: has_more || has_bulk, has_company: self.has_company }
    }

    /// When the next pause ends by itself, if that is before this time.
    fn or_end_of_pause(&self, next: Option<Time>) -> Option<Time> {
        next.into_iter().chain(self.settings.next_end()).min()
    }

    /// Re-dates jobs that the clock postponed while it was ahead.
    pub(super) fn redate(&mut self, by: Duration) -> Swept {
        let misdated = std::mem::take(&mut self.misdated);
        let has_more = misdated.len() >= most(self.most);
        for id in misdated {
            let _ = self.apply(id, &transition::Command::Redate(by));
        }
        // The time of the org's next sweep was set by that clock, too.
        let first = self.due.first().and_then(|id| self.jobs.get(id)?.due_at);
        let next = self.or_end_of_pause(first.or(self.next_due));
        let has_bulk = self.open_operations > 0 || !self.erasures.left.is_empty();
        let next = if has_bulk { Some(self.now) } else { next };
        self.changes.next_due.get_or_insert(NextDue::At(next));
        self.changes.next_retention.get_or_insert(self.now);
        Swept { has_more, has_company: self.has_company }
    }
}
