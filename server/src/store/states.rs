//! What this server knows of the logs that it writes, each as of the record that its last batch left there.
//!
//! Nothing rests on it: whoever decides by it makes sure, within the same transaction or statement, that the log's last record is still that
//! one, or catches up from it.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::TimeDelta;

use super::{RecordId, state::OrgState};
use crate::domain::{clock::Time, id::OrgId};

const LONGEST_FOLD: TimeDelta = TimeDelta::days(366);
/// Orgs of which anything is known, at most.
const MOST_ORGS: usize = 8_192;
/// What all of them take, about, in bytes. Beyond that all forget what the database has as well; and once the jobs whose rows are behind
/// take half of it, the orgs that have more of them than others write rows at once, with a batch as many as it leaves behind itself.
pub(super) const BUDGET: usize = 64 << 20;

/// See the module.
pub(super) struct States {
    fold_after: TimeDelta,
    all: Mutex<All>,
}

#[derive(Default)]
struct All {
    orgs: HashMap<OrgId, Known>,
    /// What they take.
    bytes: usize,
    /// And those of their jobs whose rows are behind; and how many orgs have any.
    behind_bytes: usize,
    behind: usize,
    /// After all have forgotten what they could, as much must have come together again before they do so anew.
    left: usize,
}

/// What is known of an org as of a record.
type Known = (RecordId, OrgState);

impl States {
    pub(super) fn new(fold_after: Duration) -> Self {
        let fold_after = TimeDelta::from_std(fold_after).unwrap_or(LONGEST_FOLD).min(LONGEST_FOLD);
        Self { fold_after, all: Mutex::default() }
    }

    /// How long rows of running jobs may be behind, of an org that was taken.
    pub(super) fn fold_after(&self, of: &OrgState) -> TimeDelta {
        let all = self.all();
        let own = of.behind_bytes();
        All::fold_after(self.fold_after, own, (all.behind_bytes + own, all.behind + 1))
    }

    /// Takes what is known of an org, and the record as of which it is. Until it is put back, nothing is known.
    pub(super) fn take(&self, org: OrgId) -> Option<Known> {
        self.all().take(org)
    }

    /// This is how an org is in a log whose last record this is.
    pub(super) fn put(&self, org: OrgId, last: RecordId, state: OrgState) {
        let all = &mut *self.all();
        all.take(org);
        if all.orgs.len() >= MOST_ORGS {
            *all = All::default();
        }
        all.bytes += state.bytes();
        all.behind_bytes += state.behind_bytes();
        all.behind += usize::from(state.behind_bytes() > 0);
        all.orgs.insert(org, (last, state));
        if all.bytes > BUDGET.max(2 * all.left) {
            all.orgs.values_mut().for_each(|(_, state)| state.shrink());
            all.bytes = all.orgs.values().map(|(_, state)| state.bytes()).sum();
            all.left = all.bytes;
        }
    }

    /// Nothing is known any more.
    pub(super) fn clear(&self) {
        *self.all() = All::default();
    }

    /// What all of them take.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.all().bytes
    }

    /// Orgs that have jobs whose rows have been behind for long.
    pub(super) fn stale(&self, now: Time, limit: usize) -> Vec<OrgId> {
        let all = self.all();
        let is_stale = |(_, (_, state)): &(&OrgId, &Known)| {
            let fold_after = All::fold_after(self.fold_after, state.behind_bytes(), (all.behind_bytes, all.behind));
            state.is_stale(now, fold_after)
        };
        all.orgs.iter().filter(is_stale).map(|(org, _)| *org).take(limit).collect()
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    fn take(&mut self, org: OrgId) -> Option<Known> {
        let known = self.orgs.remove(&org)?;
        self.bytes = self.bytes.saturating_sub(known.1.bytes());
        let behind = known.1.behind_bytes();
        self.behind_bytes = self.behind_bytes.saturating_sub(behind);
        self.behind = self.behind.saturating_sub(usize::from(behind > 0));
        Some(known)
    }

    /// That of an org whose jobs take so much, of what all take and how many orgs that is.
    fn fold_after(unless_pressed: TimeDelta, own: usize, (all, orgs): (usize, usize)) -> TimeDelta {
        let has_more_than_others = own > 0 && own.saturating_mul(orgs) >= all;
        if all > BUDGET / 2 && has_more_than_others { TimeDelta::zero() } else { unless_pressed }
    }
}

/// What a batch leaves of an org once it is committed.
pub(super) struct Left {
    pub(super) org: OrgId,
    pub(super) before: RecordId,
    pub(super) after: RecordId,
    pub(super) state: OrgState,
}

impl Left {
    /// It was committed.
    pub(super) fn committed(mut self, states: &States) {
        self.state.settle();
        states.put(self.org, self.after, self.state);
    }

    /// It is known that it was not: all is as it was before.
    pub(super) fn reverted(mut self, states: &States) {
        self.state.revert();
        states.put(self.org, self.before, self.state);
    }
}
