//! Where one transaction is open at a time, everybody waits for the one that is under way: an org whose turns take long keeps them short, and
//! lets more time pass after each, for as long as others call, too. What a command takes is seen only when it is done: of an org whose
//! turn was too long the next changes fewer jobs. Alone it has all the time there is.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::domain::id::OrgId;

/// A turn that takes longer is long: what a commit takes by itself.
const LONG: Duration = Duration::from_millis(5);
/// One in which the work before its commit takes longer is too long: the next shall take no longer.
const TOO_LONG: Duration = Duration::from_millis(10);
/// It may have so many commands in any case: of four one is for what is not urgent.
const LEAST: usize = 4;
/// A rest is so many times as long as the turn.
const REST: f64 = 1.5;
/// The longest rest.
const LONGEST: Duration = CALLED_OF_LATE;
/// Turns that were short for so long may change more, however little they did.
const PROVEN: Duration = Duration::from_secs(1);
/// Of an org whose turns may change so many jobs nothing need be known.
const MANY: usize = 4_096;
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
    /// What a turn may change, of orgs whose turns were too long.
    most: HashMap<OrgId, Most>,
}

/// How many commands a turn of an org may have, and how many jobs they may change beside those that they name, since when.
struct Most {
    jobs: usize,
    since: Instant,
}

/// What a turn was for one org.
#[derive(Clone, Copy)]
pub(super) struct Worked {
    pub(super) org: OrgId,
    pub(super) commands: usize,
    pub(super) events: usize,
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
            self.until.insert(*org, now + took.mul_f64(REST).min(LONGEST));
        }
    }

    /// The work of a turn took so long.
    pub(super) fn worked(&mut self, turn: &[Worked], took: Duration, now: Instant) {
        let size = |of: &Worked| of.events.max(of.commands);
        let all: usize = turn.iter().map(size).sum();
        // Whose most of it is.
        let Some(of) = turn.iter().find(|of| 2 * size(of) > all) else { return };
        let org = of.org;
        if took > TOO_LONG && self.do_others_call(org, now) {
            let jobs = ((size(of) as f64 * TOO_LONG.div_duration_f64(took)) as usize).max(LEAST);
            self.most.retain(|_, most| most.jobs < MANY);
            self.most.insert(org, Most { jobs, since: now });
        } else if took < TOO_LONG / 2
            && let Some(most) = self.most.get_mut(&org).filter(|most| size(of) >= most.jobs)
            // That claims which find nothing take no time says little of those that do.
            && (of.events >= most.jobs / 2 || now - most.since >= PROVEN)
        {
            *most = Most { jobs: most.jobs * 2, since: now };
        }
    }

    /// How many commands a turn of an org may have, and how many other jobs they may change, if there is a bound.
    pub(super) fn most(&self, org: OrgId, now: Instant) -> Option<usize> {
        self.most.get(&org).map(|most| most.jobs).filter(|_| self.do_others_call(org, now))
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
    fn turns_of_an_org_that_take_too_long_change_fewer_jobs_while_others_call() {
        let [busy, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let (mut rests, now) = (Rests::default(), Instant::now());
        let of = |org, commands, events| Worked { org, commands, events };
        rests.worked(&[of(busy, 512, 512)], 32 * TOO_LONG, now);
        assert_eq!(rests.most(busy, now), None, "it is alone");
        rests.ended(&[other], Duration::from_millis(1), now);
        rests.worked(&[of(busy, 512, 512)], 32 * TOO_LONG, now);
        assert_eq!((rests.most(busy, now), rests.most(other, now)), (Some(16), None));
        rests.worked(&[of(other, 3, 3), of(busy, 3, 3)], 32 * TOO_LONG, now);
        assert_eq!((rests.most(busy, now), rests.most(other, now)), (Some(16), None), "whose it is nobody knows");
        rests.worked(&[of(other, 1, 1), of(busy, 16, 16)], TOO_LONG / 4, now);
        assert_eq!(rests.most(busy, now), Some(32));
        rests.worked(&[of(busy, 7, 7)], TOO_LONG / 4, now);
        assert_eq!(rests.most(busy, now), Some(32), "there were no more");
        rests.worked(&[of(busy, 100, 0)], TOO_LONG / 4, now);
        assert_eq!(rests.most(busy, now), Some(32), "a claim found nothing");
        let later = now + PROVEN;
        rests.ended(&[other], Duration::from_millis(1), later);
        rests.worked(&[of(busy, 100, 0)], TOO_LONG / 4, later);
        assert_eq!(rests.most(busy, later), Some(64), "claims find nothing for long");
        let now = later;
        assert_eq!(rests.most(busy, now + CALLED_OF_LATE), None, "the other has gone");
    }

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
        assert_eq!(rests.until(&busy, now), Some(now + long.mul_f64(REST)));
        assert_eq!(rests.until(&busy, now + long.mul_f64(REST)), None, "it is over");
        rests.ended(&[busy], Duration::from_secs(3), now);
        assert_eq!(rests.until(&busy, now), Some(now + LONGEST));
        let later = now + CALLED_OF_LATE;
        rests.ended(&[busy], long, later);
        assert_eq!(rests.until(&busy, later), None, "the other has gone");
    }
}
