//! Fairness where one transaction is open at a time (SQLite), and every org waits for the current one. While other orgs call,
//! an org whose turns take long gets short turns and rests after each. The cost of a command is known only afterwards: an org
//! whose turn took too long changes fewer jobs in the next ones. An org that is alone is not limited.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::callers::Callers;
use crate::domain::id::OrgId;

/// A turn that takes longer is long. About the time of a commit alone.
const LONG: Duration = Duration::from_millis(5);
/// A turn whose work before the commit takes longer is too long. The org's next turns are bounded to take no longer.
const TOO_LONG: Duration = Duration::from_millis(10);
/// The least bound on commands. A quarter of them, which is one, is for commands that are not vital.
const LEAST: usize = 4;
/// Length of a rest, as a multiple of the turn.
const REST: f64 = 1.5;
/// The longest rest.
const LONGEST: Duration = CALLED_OF_LATE;
/// After short turns for this long the bound rises, however little the turns did.
const PROVEN: Duration = Duration::from_secs(1);
/// A bound this high limits nothing, so its entry is dropped.
const MANY: usize = 4_096;
/// Bytes that take about as long to write as a command or event besides its text.
const BYTES_OF_ONE: usize = 4 << 10;
/// Other orgs count as calling for this long after their last turn.
const CALLED_OF_LATE: Duration = Duration::from_millis(200);

/// The orgs that rest, and the bounds on their turns.
#[derive(Default)]
pub(super) struct Pacing {
    /// The orgs that had turns lately.
    callers: Callers,
    /// Until when orgs rest.
    until: HashMap<OrgId, Instant>,
    /// Bounds on the turns of orgs whose turns were too long.
    most: HashMap<OrgId, Most>,
    /// The org that nearly all of the turn under way is for, if its work was recorded once: where it was tried in parts, the time
    /// is nobody's.
    is_for: Option<OrgId>,
    times_worked: u32,
}

/// Bound on an org's commands in a turn, and on the jobs that they change besides those that they name; and when it was set.
struct Most {
    jobs: usize,
    since: Instant,
}

/// One org's part of a turn.
#[derive(Clone, Copy)]
pub(super) struct Worked {
    pub(super) org: OrgId,
    pub(super) commands: usize,
    pub(super) events: usize,
    /// Bytes of its commands.
    pub(super) bytes: usize,
}

impl Worked {
    fn size(&self) -> usize {
        self.events.max(self.commands)
    }

    fn bytes(&self) -> usize {
        self.size() * BYTES_OF_ONE + self.bytes
    }
}

impl Pacing {
    /// Records that a turn of these orgs ended. The one that nearly all of it was for rests.
    pub(super) fn ended(&mut self, orgs: &[OrgId], took: Duration, now: Instant) {
        orgs.iter().for_each(|org| self.callers.called(*org, now));
        let was_for = self.is_for.take().filter(|org| self.times_worked == 1 && orgs.contains(org));
        self.times_worked = 0;
        let was_for = if let [org] = orgs { Some(*org) } else { was_for };
        if let Some(org) = was_for
            && took >= LONG
            && self.do_others_call(org, now)
        {
            self.until.retain(|_, until| *until > now);
            self.until.insert(org, now + took.mul_f64(REST).min(LONGEST));
        }
    }

    /// Records how long the work of a turn took.
    pub(super) fn worked(&mut self, turn: &[Worked], took: Duration, now: Instant) {
        let (size, bytes): (usize, usize) = turn.iter().fold((0, 0), |(a, b), of| (a + of.size(), b + of.bytes()));
        self.times_worked += 1;
        self.is_for = turn.iter().find(|of| of.bytes() > bytes / 8 * 7).map(|of| of.org);
        // The org that most of the work was for.
        let Some(of) = turn.iter().find(|of| 2 * of.size() > size) else { return };
        let org = of.org;
        if took > TOO_LONG && self.do_others_call(org, now) {
            let jobs = ((of.size() as f64 * TOO_LONG.div_duration_f64(took)) as usize).max(LEAST);
            self.most.retain(|_, most| most.jobs < MANY);
            self.most.insert(org, Most { jobs, since: now });
        } else if took < TOO_LONG / 2
            && let Some(most) = self.most.get_mut(&org).filter(|most| of.size() >= most.jobs)
            // Fast claims that find nothing say little about claims that find jobs.
            && (of.events >= most.jobs / 2 || now - most.since >= PROVEN)
        {
            *most = Most { jobs: most.jobs * 2, since: now };
        }
    }

    /// Bound on an org's commands in a turn, and on the other jobs that they may change; `None`: no bound.
    pub(super) fn most(&self, org: OrgId, now: Instant) -> Option<usize> {
        self.most.get(&org).map(|most| most.jobs).filter(|_| self.do_others_call(org, now))
    }

    /// True if other orgs have called lately.
    pub(super) fn do_others_call(&self, org: OrgId, now: Instant) -> bool {
        self.callers.do_others_call(org, CALLED_OF_LATE, now)
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
        let (mut rests, now) = (Pacing::default(), Instant::now());
        let of = |org, commands, events| Worked { org, commands, events, bytes: 0 };
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
        let (mut rests, now) = (Pacing::default(), Instant::now());
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

    #[test]
    fn who_writes_nearly_all_of_a_shared_turn_rests_for_it() {
        let [large, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let (mut rests, now) = (Pacing::default(), Instant::now());
        let long = Duration::from_millis(20);
        let mut turn = [(large, 1, 1 << 20), (other, 9, 900)].map(|(org, commands, bytes)| Worked {
            org,
            commands,
            events: commands,
            bytes,
        });
        rests.worked(&turn, LONG, now);
        rests.ended(&[large, other], long, now);
        assert_eq!((rests.until(&large, now), rests.until(&other, now)), (Some(now + long.mul_f64(REST)), None));
        let now = now + long * 2;
        turn[0].bytes = 100;
        turn[1].commands = 1;
        turn[1].events = 1;
        rests.worked(&turn, LONG, now);
        rests.ended(&[large, other], long, now);
        assert_eq!((rests.until(&large, now), rests.until(&other, now)), (None, None), "whose it is nobody knows");
        rests.worked(&turn[..1], LONG, now);
        rests.worked(&turn[1..], LONG, now);
        rests.ended(&[large, other], long, now);
        assert_eq!((rests.until(&large, now), rests.until(&other, now)), (None, None), "it was tried in parts");
    }
}
