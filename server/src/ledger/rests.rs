//! Where one transaction is open at a time, everybody waits for the one that is under way: an org whose turns take long keeps them short, and
//! lets as much time pass after each, for as long as others call, too. Alone it has all the time there is.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::domain::id::OrgId;

/// A turn that takes longer is long: what a commit takes by itself.
const LONG: Duration = Duration::from_millis(5);
/// The longest rest.
const LONGEST: Duration = Duration::from_millis(50);
/// Others call for so long after a turn of theirs.
const CALLED_OF_LATE: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Default)]
pub(super) struct Rests {
    /// The org that had a turn last, and the one that had of the others.
    last: Option<(OrgId, Instant)>,
    other: Option<(OrgId, Instant)>,
    /// Until when orgs rest.
    until: HashMap<OrgId, Instant>,
}

impl Rests {
    /// A turn of some orgs has ended.
    pub(super) fn ended(&mut self, orgs: &[OrgId], took: Duration, now: Instant) {
        for org in orgs {
            if let Some(last) = self.last.filter(|(last, _)| last != org) {
                self.other = Some(last);
            }
            self.last = Some((*org, now));
        }
        if let [org] = orgs
            && took >= LONG
            && self.do_others_call(*org, now)
        {
            self.until.retain(|_, until| *until > now);
            self.until.insert(*org, now + took.min(LONGEST));
        }
    }

    /// True if others than this org have called of late.
    pub(super) fn do_others_call(&self, org: OrgId, now: Instant) -> bool {
        let is_other = |called: &(OrgId, Instant)| called.0 != org && now - called.1 < CALLED_OF_LATE;
        [self.last, self.other].iter().flatten().any(is_other)
    }

    /// Until when an org rests, if it does.
    pub(super) fn until(&self, org: &OrgId, now: Instant) -> Option<Instant> {
        self.until.get(org).copied().filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn who_takes_long_rests_while_others_call() {
        let [busy, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let (mut rests, now) = (Rests::default(), Instant::now());
        let long = Duration::from_millis(20);
        rests.ended(&[busy], long, now);
        rests.ended(&[busy], long, now);
        assert_eq!(rests.until(&busy, now), None, "it is alone");
        rests.ended(&[other], Duration::from_millis(1), now);
        assert!(rests.do_others_call(busy, now) && rests.until(&other, now).is_none());
        rests.ended(&[busy], long, now);
        assert_eq!(rests.until(&busy, now), Some(now + long));
        assert_eq!(rests.until(&busy, now + long), None, "it is over");
        rests.ended(&[busy], Duration::from_secs(3), now);
        assert_eq!(rests.until(&busy, now), Some(now + LONGEST));
        let later = now + CALLED_OF_LATE;
        rests.ended(&[busy], long, later);
        assert_eq!(rests.until(&busy, later), None, "the other has gone");
    }
}
