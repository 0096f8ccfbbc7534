//! What falls due, and what a clock that was ahead has put off.

use std::time::Duration;

use super::{super::command::Looked, Log};
use crate::{
    domain::transition::{self, Look},
    store::NextDue,
};

/// Jobs that one batch looks at because they are due, at most.
const JOBS: usize = 1_000;

/// The same of a batch that may change so many.
pub(super) fn most(most: Option<usize>) -> usize {
    most.map_or(JOBS, |most| most.clamp(1, JOBS))
}

impl Log {
    /// Does what is due.
    pub(super) fn look(&mut self, look: Look) -> Looked {
        let due = std::mem::take(&mut self.due);
        let has_more = due.len() >= most(self.most);
        // The others fell due no sooner.
        let last = due.last().and_then(|id| self.jobs.get(id)?.due_at);
        for id in due {
            // A job that this batch has changed is judged as it is now; one that is not due any more, or has gone, stays so.
            let _ = self.apply(id, &transition::Command::Look(look));
        }
        self.changes.next_due = Some(NextDue::At(if has_more { last } else { self.next_due }));
        Looked { has_more }
    }

    /// Dates anew what a clock that was ahead has put off.
    pub(super) fn redate(&mut self, by: Duration) -> Looked {
        let misdated = std::mem::take(&mut self.misdated);
        let has_more = misdated.len() >= most(self.most);
        for id in misdated {
            let _ = self.apply(id, &transition::Command::Redate(by));
        }
        // When the org is looked at next was dated by that clock, too.
        let first = self.due.first().and_then(|id| self.jobs.get(id)?.due_at);
        self.changes.next_due.get_or_insert(NextDue::At(first.or(self.next_due)));
        self.changes.next_retention.get_or_insert(self.now);
        Looked { has_more }
    }
}
