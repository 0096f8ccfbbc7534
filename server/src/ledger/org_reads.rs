//! Bounds the reads of one org over all kinds of reads. Within the bound, the kinds take turns by the time they use. While
//! several orgs call, the one whose reads took most time lately has one read less, and only one if its calls keep the processors
//! from others: a database on the same machine has as many processes at work as there are reads.

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

/// The time of reads is forgotten at this pace: after this long, about a third of it counts.
const LATELY: Duration = Duration::from_secs(1);
/// Time of reads that is as good as none, in seconds.
const NEGLIGIBLE: f64 = 1e-3;

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
    orgs: HashMap<OrgId, ReadingOrg>,
    /// With this many orgs, and at least [`REMEMBERED`], those that read nothing are removed.
    most: usize,
    callers: Callers,
    slowed: Vec<OrgId>,
    /// The org whose reads took most time lately.
    heaviest: Option<OrgId>,
}

/// One org's turns, and the time that its reads took.
struct ReadingOrg {
    turns: Weak<Turns<ReadKind>>,
    under_way: u32,
    /// The time that its reads took lately, in seconds, as of `as_of`.
    took: f64,
    as_of: Instant,
}

impl ReadingOrg {
    fn new(turns: &Arc<Turns<ReadKind>>, now: Instant) -> Self {
        Self { turns: Arc::downgrade(turns), under_way: 0, took: 0.0, as_of: now }
    }

    /// The time that its reads took lately, those under way included.
    fn took(&self, now: Instant) -> f64 {
        let passed = now - self.as_of;
        self.took * (-passed.div_duration_f64(LATELY)).exp() + f64::from(self.under_way) * passed.as_secs_f64()
    }

    /// Begins or ends reads.
    fn change(&mut self, reads: i32, now: Instant) {
        (self.took, self.as_of) = (self.took(now), now);
        self.under_way = self.under_way.saturating_add_signed(reads);
    }

    fn is_idle(&self, now: Instant) -> bool {
        self.turns.strong_count() == 0 && self.took(now) < NEGLIGIBLE
    }
}

/// One read of an org. Dropping it ends the read.
pub(super) struct OrgRead {
    reads: Arc<OrgReads>,
    org: OrgId,
    is_under_way: bool,
    _turn: Turn<ReadKind>,
}

impl OrgRead {
    /// Counts the time of the read from now on.
    pub(super) fn begin(&mut self) {
        self.is_under_way = true;
        self.reads.state.lock().change(self.org, 1, Instant::now());
    }
}

impl Drop for OrgRead {
    fn drop(&mut self) {
        if self.is_under_way {
            self.reads.state.lock().change(self.org, -1, Instant::now());
        }
    }
}

impl ReadingOrgs {
    /// Begins or ends reads of an org.
    fn change(&mut self, org: OrgId, reads: i32, now: Instant) {
        if let Some(reading) = self.orgs.get_mut(&org) {
            reading.change(reads, now);
            self.is_heaviest(org, now);
        }
    }

    /// True if no other org's reads are known to have taken more time lately.
    fn is_heaviest(&mut self, org: OrgId, now: Instant) -> bool {
        let took = |org: &OrgId| self.orgs.get(org).map_or(0.0, |reading| reading.took(now));
        let is_heaviest = self.heaviest.is_none_or(|heaviest| heaviest == org || took(&org) >= took(&heaviest));
        if is_heaviest {
            self.heaviest = Some(org);
        }
        is_heaviest
    }
}

impl OrgReads {
    pub(super) fn new(each: usize) -> Arc<Self> {
        Arc::new(Self { each, state: Mutex::default() })
    }

    /// Sets which orgs are slowed. One of them that is also the org whose reads took most time has one read while others call.
    pub(super) fn slow(&self, orgs: Vec<OrgId>) {
        self.state.lock().slowed = orgs;
    }

    /// Records a call of an org that needs no turn.
    pub(super) fn called(&self, org: OrgId) {
        self.state.lock().callers.called(org, Instant::now());
    }

    /// Waits until the org may have another read of this kind.
    pub(super) async fn take(self: &Arc<Self>, org: OrgId, kind: ReadKind) -> OrgRead {
        let turn = self.of(org).take(kind).await;
        OrgRead { reads: Arc::clone(self), org, is_under_way: false, _turn: turn }
    }

    /// The turns of an org that calls now.
    fn of(&self, org: OrgId) -> Arc<Turns<ReadKind>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let now = Instant::now();
        state.callers.called(org, now);
        let withheld = match state.is_heaviest(org, now) && state.callers.do_others_call(org, CALLED_OF_LATE, now) {
            true if state.slowed.contains(&org) => self.each.saturating_sub(1),
            has_less => usize::from(has_less),
        };
        let known = state.orgs.get(&org).and_then(|reading| reading.turns.upgrade());
        let turns = known.unwrap_or_else(|| {
            if state.orgs.len() >= state.most.max(REMEMBERED) {
                state.orgs.retain(|_, reading| !reading.is_idle(now));
                state.most = 2 * state.orgs.len();
            }
            let turns = Turns::new(self.each);
            let reading = state.orgs.entry(org).or_insert_with(|| ReadingOrg::new(&turns, now));
            reading.turns = Arc::downgrade(&turns);
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
    async fn only_the_org_whose_reads_took_most_time_lately_has_one_less() {
        let [org, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let reads = OrgReads::new(3);
        let read = async |org, kind| at_once(&mut Box::pin(reads.take(org, kind))).await;
        let both = (read(org, ReadKind::Lists).await, read(other, ReadKind::Lists).await);
        let began = Instant::now();
        let change =
            |org, reads_under_way, at| reads.state.lock().change(org, reads_under_way, began - 30 * LATELY + at);
        // One long read, beside many short ones that took less time.
        change(org, 1, Duration::ZERO);
        for n in 0..100 {
            change(other, 1, n * LATELY / 100);
            change(other, -1, n * LATELY / 100 + LATELY / 300);
        }
        let second = (read(org, ReadKind::Statistics).await, read(other, ReadKind::Statistics).await);
        assert!(read(org, ReadKind::CatchUp).await.is_none(), "one is withheld");
        assert!(read(other, ReadKind::CatchUp).await.is_some(), "it has as many as if it were alone");
        // What was long ago does not count.
        change(org, -1, LATELY);
        change(other, 1, 20 * LATELY);
        change(other, -1, 20 * LATELY + LATELY / 100);
        change(org, 1, 20 * LATELY + LATELY / 100);
        change(org, -1, 20 * LATELY + LATELY / 100);
        assert!(read(org, ReadKind::CatchUp).await.is_some());
        assert!(read(other, ReadKind::CatchUp).await.is_none());
        drop((both, second));
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
        assert!(reads.state.lock().orgs.len() <= 2 * REMEMBERED);
    }

    async fn at_once<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
