//! Bounds the reads of one org over all kinds of reads. Within the bound, the kinds take turns by the time they use. While
//! other orgs call, the org has one read less, and only one if its calls keep the processors from others: a database on the same
//! machine has as many processes at work as there are reads.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::callers::Callers;
use crate::{
    domain::id::OrgId,
    turns::{Turn, Turns},
};

/// With this many orgs, those that read nothing are removed for the first time.
const REMEMBERED: usize = 1_024;

/// Other orgs count as calling for this long after their last call.
const CALLED_OF_LATE: Duration = Duration::from_secs(1);

/// The kinds of reads. Each also has turns of its own, over all orgs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum ReadKind {
    /// Lists, and large jobs.
    Lists,
    /// Payloads of claimed jobs.
    Deliveries,
    /// Past events and snapshots.
    CatchUp,
    /// Statistics.
    Statistics,
    /// API tokens: an admin must be able to revoke one that is used to take all other turns.
    Tokens,
}

/// The turns of each org that reads.
pub(super) struct OrgReads {
    /// How many reads one org may have at the same time. One kind may have all but one.
    each: usize,
    state: Mutex<ReadingOrgs>,
}

#[derive(Default)]
struct ReadingOrgs {
    turns: HashMap<OrgId, Weak<Turns<ReadKind>>>,
    /// With this many orgs, and at least [`REMEMBERED`], those that read nothing are removed.
    most: usize,
    callers: Callers,
    slowed: Vec<OrgId>,
}

impl OrgReads {
    pub(super) fn new(each: usize) -> Arc<Self> {
        Arc::new(Self { each, state: Mutex::default() })
    }

    /// Sets which orgs have one read while others call.
    pub(super) fn slow(&self, orgs: Vec<OrgId>) {
        self.state.lock().slowed = orgs;
    }

    /// Records a call of an org that needs no turn.
    pub(super) fn called(&self, org: OrgId) {
        self.state.lock().callers.called(org, Instant::now());
    }

    /// Waits until the org may have another read of this kind.
    pub(super) async fn take(&self, org: OrgId, kind: ReadKind) -> Turn<ReadKind> {
        self.of(org).take(kind).await
    }

    /// The turns of an org that calls now.
    fn of(&self, org: OrgId) -> Arc<Turns<ReadKind>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let now = Instant::now();
        state.callers.called(org, now);
        let withheld = match state.callers.do_others_call(org, CALLED_OF_LATE, now) {
            true if state.slowed.contains(&org) => self.each.saturating_sub(1),
            do_others_call => usize::from(do_others_call),
        };
        let known = state.turns.get(&org).and_then(Weak::upgrade);
        let turns = known.unwrap_or_else(|| {
            if state.turns.len() >= state.most.max(REMEMBERED) {
                state.turns.retain(|_, turns| turns.strong_count() > 0);
                state.most = 2 * state.turns.len();
            }
            let turns = Turns::new(self.each);
            state.turns.insert(org, Arc::downgrade(&turns));
            turns
        });
        turns.withhold(withheld);
        turns
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn an_org_may_have_so_many_reads_of_all_kinds_and_one_less_while_others_call() {
        let [org, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let reads = OrgReads::new(3);
        let list = reads.take(org, ReadKind::Lists).await;
        let second = reads.take(org, ReadKind::Lists).await;
        let mut third = Box::pin(reads.take(org, ReadKind::Lists));
        assert!(at_once(&mut third).await.is_none(), "one is kept for the other kinds");
        let statistics = reads.take(org, ReadKind::Statistics).await;
        drop(third);
        reads.called(other);
        drop(second);
        let mut third = Box::pin(reads.take(org, ReadKind::CatchUp));
        assert!(at_once(&mut third).await.is_none(), "two are under way while another org calls");
        drop(reads.take(other, ReadKind::CatchUp).await);
        drop(statistics);
        assert!(at_once(&mut third).await.is_some());
        drop(list);
    }

    #[tokio::test]
    async fn a_slowed_org_has_one_read_while_others_call() {
        let [org, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let reads = OrgReads::new(3);
        reads.slow(vec![org]);
        let alone = [reads.take(org, ReadKind::Lists).await, reads.take(org, ReadKind::Lists).await];
        reads.called(other);
        let mut next = Box::pin(reads.take(org, ReadKind::CatchUp));
        assert!(at_once(&mut next).await.is_none());
        let [first, second] = alone;
        drop(first);
        assert!(at_once(&mut next).await.is_none(), "one is under way");
        drop(second);
        let first = at_once(&mut next).await;
        assert!(first.is_some());
        reads.slow(Vec::new());
        assert!(at_once(&mut Box::pin(reads.take(org, ReadKind::Lists))).await.is_some(), "it is slowed no more");
    }

    #[tokio::test]
    async fn orgs_that_read_nothing_are_forgotten() {
        let reads = OrgReads::new(3);
        for n in 0..10 * REMEMBERED as u128 {
            drop(reads.take(OrgId(Uuid::from_u128(n)), ReadKind::Lists).await);
        }
        assert!(reads.state.lock().turns.len() <= 2 * REMEMBERED);
    }

    async fn at_once<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
