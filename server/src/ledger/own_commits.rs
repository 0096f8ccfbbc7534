//! Commits of this server that are under way, and what is heard of their orgs meanwhile.
//!
//! The [follower](super::follower) may find a commit in the database before the [writer](super::writer) has handed on what it
//! holds of it in memory. Taken for another server's, it would be read from the database for nothing. So what is heard and has
//! such a commit in it waits until the writer has handed it on, or has given it up.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{hub::Hub, waiting::Waiting};
use crate::{domain::id::OrgId, store::Reach};

/// See the module.
pub(super) struct OwnCommits {
    hub: Arc<Hub>,
    waiting: Arc<Waiting>,
    under_way: Mutex<HashMap<OrgId, Commit>>,
}

/// An org's share of a commit. An org is in one at a time.
struct Commit {
    /// How far the log reaches with it.
    reach: Reach,
    /// The farthest that was heard of meanwhile and has it in it.
    heard: Option<Reach>,
}

impl OwnCommits {
    pub(super) fn new(hub: Arc<Hub>, waiting: Arc<Waiting>) -> Self {
        Self { hub, waiting, under_way: Mutex::default() }
    }

    /// Takes note of a commit that begins, with how far it takes each org's log, until the answer is dropped: after its events
    /// were handed on, or it turned out otherwise.
    pub(super) fn begin(&self, reaches: impl IntoIterator<Item = (OrgId, Reach)>) -> UnderWay<'_> {
        let mut under_way = self.under_way();
        let begin = |(org, reach)| {
            under_way.insert(org, Commit { reach, heard: None });
            org
        };
        UnderWay { own: self, orgs: reaches.into_iter().map(begin).collect() }
    }

    /// Hands on how far logs were found to reach.
    pub(super) fn heard(&self, reaches: Vec<(OrgId, Reach)>) {
        for (org, reach) in reaches {
            if !self.is_kept(org, reach) {
                self.hand_on(org, reach);
            }
        }
    }

    /// Keeps what is heard if a commit under way is in it.
    fn is_kept(&self, org: OrgId, found: Reach) -> bool {
        let mut under_way = self.under_way();
        let Some(Commit { reach, heard }) = under_way.get_mut(&org) else { return false };
        let is_in_it = found.seq >= reach.seq && found.ready_gen >= reach.ready_gen;
        if is_in_it {
            *heard = Some(heard.map_or(found, |before| before.max(found)));
        }
        is_in_it
    }

    fn hand_on(&self, org: OrgId, Reach { seq, ready_gen }: Reach) {
        self.hub.heard(org, seq);
        self.waiting.heard(org, ready_gen);
    }

    /// The map stays whole whatever panics beside it.
    fn under_way(&self) -> MutexGuard<'_, HashMap<OrgId, Commit>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A commit under way; see [`OwnCommits::begin`].
pub(super) struct UnderWay<'a> {
    own: &'a OwnCommits,
    orgs: Vec<OrgId>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        for org in self.orgs.drain(..) {
            let ended = self.own.under_way().remove(&org);
            if let Some(heard) = ended.and_then(|commit| commit.heard) {
                self.own.hand_on(org, heard);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Waker},
    };

    use super::*;
    use crate::ledger::hub::{Gap, tests::events};

    const ORG: OrgId = OrgId::DEFAULT;

    fn reach(seq: i64, ready_gen: i64) -> Reach {
        Reach { seq, ready_gen }
    }

    #[test]
    fn what_is_heard_of_a_commit_under_way_is_no_news_once_it_is_handed_on() {
        let hub = Arc::new(Hub::new(usize::MAX));
        let own = OwnCommits::new(Arc::clone(&hub), Waiting::new(1, 1));
        let listener = hub.listen(ORG);
        listener.reached(4);
        let under_way = own.begin([(ORG, reach(6, 2))]);
        own.heard(vec![(ORG, reach(6, 2))]);
        assert_eq!(hub.gap(ORG), None, "it comes from memory");
        hub.publish(ORG, &events(5..=6));
        drop(under_way);
        assert_eq!(hub.gap(ORG), None, "and has come");

        // Another server's, which was committed before it, waits for nothing.
        let under_way = own.begin([(ORG, reach(9, 3))]);
        own.heard(vec![(ORG, reach(8, 2))]);
        assert_eq!(hub.gap(ORG), Some(Gap { end: 6, known: 8 }));
        hub.publish(ORG, &events([9]));
        hub.publish(ORG, &events(7..=9));
        drop(under_way);

        // One that turns out not to have happened: what was heard was another's.
        let under_way = own.begin([(ORG, reach(10, 3))]);
        own.heard(vec![(ORG, reach(11, 3))]);
        own.heard(vec![(ORG, reach(10, 4))]);
        assert_eq!(hub.gap(ORG), None);
        drop(under_way);
        assert_eq!(hub.gap(ORG), Some(Gap { end: 9, known: 11 }));
    }

    #[test]
    fn no_claim_looks_for_what_a_commit_under_way_made_ready_of_other_types() {
        let waiting = Waiting::new(1, 1);
        let own = OwnCommits::new(Arc::new(Hub::new(0)), Arc::clone(&waiting));
        let mut claim = waiting.enter(ORG, ["a".into()].into()).unwrap();
        let mut news = pin!(claim.news(0));
        let mut is_awake = || news.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
        assert!(!is_awake());
        let under_way = own.begin([(ORG, reach(1, 1))]);
        own.heard(vec![(ORG, reach(1, 1))]);
        waiting.became_ready(ORG, 1, &[("b".into(), 1)].into());
        drop(under_way);
        assert!(!is_awake());
        own.heard(vec![(ORG, reach(2, 2))]);
        assert!(is_awake());
    }
}
