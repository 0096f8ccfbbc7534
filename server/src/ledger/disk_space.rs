//! What creates may take of a nearly full disk: each org a share of the space above the reserve, and nothing of the reserve.

use std::collections::HashMap;

use super::{LedgerError, submission::Submission};
use crate::domain::id::OrgId;
use parking_lot::{Mutex, MutexGuard};

/// Orgs whose shares are counted. Orgs beyond this number are not bounded.
const MOST_ORGS: usize = 100_000;

/// How much of the database's disk is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskSpace {
    /// Enough, or unknown.
    Enough,
    /// Little more than the reserve. Each org's jobs and events may grow by `each` bytes.
    Scarce {
        /// The share of one org, in bytes as its quota counts them.
        each: u64,
    },
    /// Only the reserve, or less. Commands that add or revive a job are refused.
    Reserved,
}

/// The state of the disk, and each org's share of it.
pub(super) struct Space(Mutex<SpaceState>);

struct SpaceState {
    space: DiskSpace,
    /// What each org had when it was first seen since space became scarce.
    had: HashMap<OrgId, u64>,
}

impl Default for Space {
    fn default() -> Self {
        Self(Mutex::new(SpaceState { space: DiskSpace::Enough, had: HashMap::new() }))
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

    /// Refuses commands that grow the database while only the reserve is left.
    pub(super) fn refuse(&self, command: &Submission) -> Result<(), LedgerError> {
        let is_refused = command.grows() && self.state().space == DiskSpace::Reserved;
        if is_refused { Err(LedgerError::StorageFull) } else { Ok(()) }
    }

    /// How many bytes an org may have in all, given what it has now.
    pub(super) fn most_of(&self, org: OrgId, has: u64) -> u64 {
        let mut state = self.state();
        let each = match state.space {
            DiskSpace::Enough => return u64::MAX,
            DiskSpace::Scarce { each } => each,
            // Refuses commands that were queued before, and others that bring a job back.
            DiskSpace::Reserved => return 0,
        };
        let is_counted = state.had.len() < MOST_ORGS || state.had.contains_key(&org);
        if !is_counted {
            return u64::MAX;
        }
        state.had.entry(org).or_insert(has).saturating_add(each)
    }

    fn state(&self) -> MutexGuard<'_, SpaceState> {
        self.0.lock()
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
