//! This server's commits under way, and what the follower hears of their orgs meanwhile.
//!
//! The [follower](super::follower) may find a commit in the database before the [writer](super::writer) has published its
//! events from memory. The follower would take it for another server's commit and read its events needlessly. So news that
//! includes a commit under way is held back until the writer has published that commit or given it up.

use std::{collections::HashMap, sync::Arc};

use super::{claim_waiters::ClaimWaiters, hub::Hub};
use crate::{domain::id::OrgId, store::Reach};
use parking_lot::{Mutex, MutexGuard};

/// Commits under way, by org.
pub(super) struct OwnCommits {
    hub: Arc<Hub>,
    waiting: Arc<ClaimWaiters>,
    under_way: Mutex<HashMap<OrgId, Commit>>,
}

/// An org's part of a commit. An org has one commit under way at a time.
struct Commit {
    /// How far the log reaches with the commit.
    reach: Reach,
    /// The farthest reach heard meanwhile that includes the commit.
    heard: Option<Reach>,
}

impl OwnCommits {
    pub(super) fn new(hub: Arc<Hub>, waiting: Arc<ClaimWaiters>) -> Self {
        Self { hub, waiting, under_way: Mutex::default() }
    }

    /// Registers a commit that begins, with how far it takes each log. The caller drops the guard once it has published the
    /// events, or once the commit has failed.
    pub(super) fn begin(&self, reaches: impl IntoIterator<Item = (OrgId, Reach)>) -> UnderWay<'_> {
        let mut under_way = self.under_way();
        let begin = |(org, reach)| {
            under_way.insert(org, Commit { reach, heard: None });
            org
        };
        UnderWay { own: self, orgs: reaches.into_iter().map(begin).collect() }
    }

    /// Passes on how far logs reach, as announced or found.
    pub(super) fn heard(&self, reaches: Vec<(OrgId, Reach)>) {
        for (org, reach) in reaches {
            if !self.is_kept(org, reach) {
                self.hand_on(org, reach);
            }
        }
    }

    /// Holds news back if it includes a commit under way.
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

    fn under_way(&self) -> MutexGuard<'_, HashMap<OrgId, Commit>> {
        self.under_way.lock()
    }
}

/// Guard of a commit under way; see [`OwnCommits::begin`].
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
        let own = OwnCommits::new(Arc::clone(&hub), ClaimWaiters::new(1, 1));
        let listener = hub.listen(ORG);
        listener.reached(4);
        let under_way = own.begin([(ORG, reach(6, 2))]);
        own.heard(vec![(ORG, reach(6, 2))]);
        assert_eq!(hub.gap(ORG), None, "it comes from memory");
        hub.publish(ORG, &events(5..=6));
        drop(under_way);
        assert_eq!(hub.gap(ORG), None, "and has come");

        // Another server's commit from before ours is passed on at once.
        let under_way = own.begin([(ORG, reach(9, 3))]);
        own.heard(vec![(ORG, reach(8, 2))]);
        assert_eq!(hub.gap(ORG), Some(Gap { end: 6, known: 8 }));
        hub.publish(ORG, &events([9]));
        hub.publish(ORG, &events(7..=9));
        drop(under_way);

        // Our commit did not happen: the reach was another server's.
        let under_way = own.begin([(ORG, reach(10, 3))]);
        own.heard(vec![(ORG, reach(11, 3))]);
        own.heard(vec![(ORG, reach(10, 4))]);
        assert_eq!(hub.gap(ORG), None);
        drop(under_way);
        assert_eq!(hub.gap(ORG), Some(Gap { end: 9, known: 11 }));
    }

    #[test]
    fn no_claim_looks_for_what_a_commit_under_way_made_ready_of_other_types() {
        let waiting = ClaimWaiters::new(1, 1);
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
