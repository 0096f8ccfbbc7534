//! The cached states of the orgs to which this server writes, each as of the record that the server's last batch left.
//!
//! A state is only a hint. A batch that uses it checks in the same transaction or statement that the log's last record is still
//! the one that the state was made at, and otherwise catches up from there.

use std::{collections::HashMap, time::Duration};

use chrono::TimeDelta;
use parking_lot::{Mutex, MutexGuard};

use super::{RecordId, state::OrgState};
use crate::domain::{clock::Time, id::OrgId};

const LONGEST_FOLD: TimeDelta = TimeDelta::days(366);
/// Orgs that may have a cached state. One more drops all states.
const MOST_ORGS: usize = 8_192;
/// Memory of all states, about, in bytes. Beyond it, every state drops what rows have as well. Once jobs whose rows are behind
/// take half of it, orgs with at least the average of them fold at once: each batch folds as much as it leaves behind.
pub(super) const BUDGET: usize = 64 << 20;

pub(super) struct States {
    fold_after: TimeDelta,
    all: Mutex<All>,
}

#[derive(Default)]
struct All {
    orgs: HashMap<OrgId, Known>,
    /// Bytes of all states.
    bytes: usize,
    /// Bytes of the jobs whose rows are behind, and the number of orgs that have such jobs.
    behind_bytes: usize,
    behind: usize,
    /// Bytes that were left when the states were last shrunk. They are shrunk again only at twice as many.
    left: usize,
}

/// A state, and the record that it was made at.
type Known = (RecordId, OrgState);

impl States {
    pub(super) fn new(fold_after: Duration) -> Self {
        let fold_after = TimeDelta::from_std(fold_after).unwrap_or(LONGEST_FOLD).min(LONGEST_FOLD);
        Self { fold_after, all: Mutex::default() }
    }

    /// How long rows may be behind in an org whose state was taken out.
    pub(super) fn fold_after(&self, of: &OrgState) -> TimeDelta {
        let all = self.all();
        let own = of.behind_bytes();
        All::fold_after(self.fold_after, own, (all.behind_bytes + own, all.behind + 1))
    }

    /// Takes out the state of an org. Until it is put back, the org has none.
    pub(super) fn take(&self, org: OrgId) -> Option<Known> {
        self.all().take(org)
    }

    /// Caches the state of an org whose log ends with this record.
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

    /// Drops all states.
    pub(super) fn clear(&self) {
        *self.all() = All::default();
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.all().bytes
    }

    /// Orgs with rows that have been behind for long, at most `limit`.
    pub(super) fn stale(&self, now: Time, limit: usize) -> Vec<OrgId> {
        let all = self.all();
        let is_stale = |(_, (_, state)): &(&OrgId, &Known)| {
            let fold_after = All::fold_after(self.fold_after, state.behind_bytes(), (all.behind_bytes, all.behind));
            state.is_stale(now, fold_after)
        };
        all.orgs.iter().filter(is_stale).map(|(org, _)| *org).take(limit).collect()
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock()
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

    /// How long rows may be behind in an org with `own` bytes of such jobs, of `all` bytes in `orgs` orgs.
    fn fold_after(unless_pressed: TimeDelta, own: usize, (all, orgs): (usize, usize)) -> TimeDelta {
        let has_more_than_others = own > 0 && own.saturating_mul(orgs) >= all;
        if all > BUDGET / 2 && has_more_than_others { TimeDelta::zero() } else { unless_pressed }
    }
}

/// The state of an org before and after a batch that is about to be committed.
pub(super) struct Left {
    pub(super) org: OrgId,
    pub(super) before: RecordId,
    pub(super) after: RecordId,
    pub(super) state: OrgState,
}

impl Left {
    /// The batch was committed: caches the state after it.
    pub(super) fn committed(mut self, states: &States) {
        self.state.settle();
        states.put(self.org, self.after, self.state);
    }

    /// The batch was certainly not committed: caches the state before it.
    pub(super) fn reverted(mut self, states: &States) {
        self.state.revert();
        states.put(self.org, self.before, self.state);
    }
}
