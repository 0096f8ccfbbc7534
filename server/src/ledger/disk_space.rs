//! What creates may take of a disk that is nearly full: each org a part of what is left above the reserve, and nobody any of that.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{LedgerError, command::Command};
use crate::domain::id::OrgId;

/// Orgs whose parts are counted; what others take is not bounded.
const MOST_ORGS: usize = 100_000;

/// How much of the database's disk is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskSpace {
    /// Enough, or it is not known.
    Enough,
    /// Little more than the reserve: of it each org's jobs and events may take so many bytes.
    Scarce {
        /// The part of one org, in bytes as they are counted for its quota.
        each: u64,
    },
    /// Only the reserve, or less: nothing is taken that makes a job, or brings one back.
    Reserved,
}

/// See the module.
pub(super) struct Space(Mutex<State>);

struct State {
    space: DiskSpace,
    /// What each org had when it was first asked for since space is scarce.
    had: HashMap<OrgId, u64>,
}

impl Default for Space {
    fn default() -> Self {
        Self(Mutex::new(State { space: DiskSpace::Enough, had: HashMap::new() }))
    }
}

impl Space {
    pub(super) fn set(&self, space: DiskSpace) {
        let mut state = self.state();
        state.space = space;
        if space == DiskSpace::Enough {
            state.had = HashMap::new();
        }
    }

    /// Refuses a command that grows where only the reserve is left.
    pub(super) fn refuse(&self, command: &Command) -> Result<(), LedgerError> {
        let is_refused = command.grows() && self.state().space == DiskSpace::Reserved;
        if is_refused { Err(LedgerError::StorageFull) } else { Ok(()) }
    }

    /// Up to how many bytes an org may have that has so many now.
    pub(super) fn most_of(&self, org: OrgId, has: u64) -> u64 {
        let mut state = self.state();
        let each = match state.space {
            DiskSpace::Enough => return u64::MAX,
            DiskSpace::Scarce { each } => each,
            // What was taken before, or leads there in other ways than by a command that grows.
            DiskSpace::Reserved => return 0,
        };
        let is_counted = state.had.len() < MOST_ORGS || state.had.contains_key(&org);
        if !is_counted {
            return u64::MAX;
        }
        state.had.entry(org).or_insert(has).saturating_add(each)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_org_has_a_part_of_what_is_left() {
        let (space, org) = (Space::default(), OrgId(uuid::Uuid::nil()));
        assert_eq!(space.most_of(org, 5_000), u64::MAX);
        space.set(DiskSpace::Scarce { each: 100 });
        assert_eq!(space.most_of(org, 5_000), 5_100);
        assert_eq!(space.most_of(org, 5_090), 5_100, "counted from when it was first seen");
        space.set(DiskSpace::Reserved);
        assert_eq!(space.most_of(org, 5_090), 0);
        space.set(DiskSpace::Scarce { each: 100 });
        assert_eq!(space.most_of(org, 5_090), 5_100, "and not anew after the reserve was reached");
        space.set(DiskSpace::Enough);
        space.set(DiskSpace::Scarce { each: 100 });
        assert_eq!(space.most_of(org, 5_090), 5_190);
    }
}
