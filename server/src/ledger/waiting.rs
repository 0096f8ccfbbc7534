//! Claims that wait for work, without asking the database for it.
//!
//! The log's head counts the batches that made a job ready: `ready_gen`. A claim that found nothing knows the count up to
//! which it did, and waits until a higher one is heard of: from this server's own commits, which tell the types too, or from
//! another's. Claims for the same types stand in one queue, and of a queue no more are woken than there is news for: as many
//! as jobs became ready here; one when all that is known is that something did somewhere else, and two more by each that
//! found work and left some. The call that came last is woken first. Whoever is woken and goes away without having looked hands the news on.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::oneshot;

use super::LedgerError;
use crate::domain::id::OrgId;

/// The types that a claim wants; empty: all.
pub(super) type Types = Arc<[Arc<str>]>;

/// How many are woken by one that found work and left some.
const WOKEN_BY_ONE: usize = 2;

/// All claims that wait, or may have to.
pub(super) struct Waiting {
    orgs: Mutex<HashMap<OrgId, Weak<Org>>>,
    state: Mutex<State>,
    limit: usize,
    per_org: usize,
}

#[derive(Default)]
struct State {
    /// Claims that are here, and how many there were ever.
    claims: usize,
    entered: u64,
    is_closed: bool,
}

/// The claims on one org.
struct Org {
    id: OrgId,
    room: Weak<Waiting>,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Queues {
    /// The highest generation heard of.
    heard: i64,
    queues: HashMap<Types, Queue>,
    /// The numbers of those that name types, by type: of thousands that may name a hundred each, few want what became ready.
    by_type: BTreeSet<(Arc<str>, u64)>,
    /// How many there were ever.
    opened: u64,
}

/// Claims for the same types.
#[derive(Default)]
struct Queue {
    /// In the order in which they were opened.
    number: u64,
    /// Up to this generation it is known that nothing is left for these types.
    exhausted: i64,
    /// Claims that were woken and have not come back yet.
    woken: usize,
    /// In the order in which their calls came.
    sleeping: BTreeMap<u64, oneshot::Sender<()>>,
}

impl Queue {
    /// Wakes up to so many, those first whose calls came last: of a worker that stands still, or is gone without a word, the call is old.
    fn wake(&mut self, n: usize) {
        for _ in 0..n {
            let Some((_, wake)) = self.sleeping.pop_last() else { return };
            // One that leaves takes itself out of the queue, under the same lock: it is there to be woken.
            self.woken += usize::from(wake.send(()).is_ok());
        }
    }

    /// Has one look if there is news that nobody has looked into.
    fn look_into(&mut self, heard: i64) {
        if heard > self.exhausted && self.woken == 0 {
            self.wake(1);
        }
    }
}

impl Waiting {
    /// With room for so many claims, and for so many of one org.
    pub(super) fn new(limit: usize, per_org: usize) -> Arc<Self> {
        Arc::new(Self { orgs: Mutex::default(), state: Mutex::default(), limit, per_org })
    }

    /// Enters with a claim, before it looks for the first time: from here on what becomes ready is heard of.
    pub(super) fn enter(self: &Arc<Self>, org: OrgId, types: Types) -> Result<Visit, LedgerError> {
        let mut state = lock(&self.state);
        if state.is_closed {
            return Err(LedgerError::Draining);
        }
        if state.claims >= self.limit {
            return Err(LedgerError::Overloaded);
        }
        state.claims += 1;
        state.entered += 1;
        let order = state.entered;
        drop(state);
        let mut orgs = lock(&self.orgs);
        let slot = orgs.entry(org).or_default();
        let org = slot.upgrade().unwrap_or_else(|| {
            let org = Arc::new(Org { id: org, room: Arc::downgrade(self), queues: Mutex::default() });
            *slot = Arc::downgrade(&org);
            org
        });
        drop(orgs);
        // Each claim holds it, and nothing else for long.
        if Arc::strong_count(&org) > self.per_org {
            lock(&self.state).claims -= 1;
            return Err(LedgerError::Overloaded);
        }
        let heard_before = lock(&org.queues).heard;
        Ok(Visit { room: Arc::clone(self), org, types, order, is_woken: false, heard_before })
    }

    /// Takes note that a batch of this server made so many jobs of these types ready.
    pub(super) fn became_ready(&self, org: OrgId, generation: i64, ready: &BTreeMap<Arc<str>, usize>) {
        let Some(org) = self.org(org) else { return };
        let mut queues = lock(&org.queues);
        queues.heard = queues.heard.max(generation);
        let wanted = queues.wanted(ready);
        for (types, queue) in &mut queues.queues {
            let jobs =
                if types.is_empty() { ready.values().sum() } else { wanted.get(&queue.number).copied().unwrap_or(0) };
            if jobs > 0 {
                queue.wake(jobs);
            } else if queue.exhausted == generation - 1 {
                queue.exhausted = generation;
            } else {
                // What the generations in between made ready, nobody here has heard yet.
                queue.look_into(generation);
            }
        }
    }

    /// Takes note of what another server did, or was found in the database.
    pub(super) fn heard(&self, org: OrgId, generation: i64) {
        let Some(org) = self.org(org) else { return };
        let mut queues = lock(&org.queues);
        if generation <= queues.heard {
            return;
        }
        queues.heard = generation;
        for queue in queues.queues.values_mut() {
            queue.look_into(generation);
        }
    }

    /// How many claims wait.
    pub(super) fn sleeping(&self) -> usize {
        let orgs: Vec<_> = lock(&self.orgs).values().filter_map(Weak::upgrade).collect();
        let of_org =
            |org: &Arc<Org>| lock(&org.queues).queues.values().map(|queue| queue.sleeping.len()).sum::<usize>();
        orgs.iter().map(of_org).sum()
    }

    /// The orgs that claims are on.
    pub(super) fn orgs(&self) -> Vec<OrgId> {
        lock(&self.orgs).keys().copied().collect()
    }

    /// Sends everyone away, and lets nobody in.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        let orgs: Vec<_> = lock(&self.orgs).values().filter_map(Weak::upgrade).collect();
        for org in orgs {
            for queue in lock(&org.queues).queues.values_mut() {
                // Who finds its waker gone knows why.
                queue.sleeping.clear();
            }
        }
    }

    fn is_closed(&self) -> bool {
        lock(&self.state).is_closed
    }

    fn org(&self, org: OrgId) -> Option<Arc<Org>> {
        lock(&self.orgs).get(&org).and_then(Weak::upgrade)
    }
}

impl Drop for Org {
    /// The last claim has left. A new one may have opened another room meanwhile: that one stays.
    fn drop(&mut self) {
        let Some(room) = self.room.upgrade() else { return };
        let mut orgs = lock(&room.orgs);
        if orgs.get(&self.id).is_some_and(|slot| slot.strong_count() == 0) {
            orgs.remove(&self.id);
        }
    }
}

/// One claim, while it looks and waits by turns.
pub(super) struct Visit {
    room: Arc<Waiting>,
    org: Arc<Org>,
    types: Types,
    /// When its call came, among all others.
    order: u64,
    /// Whether it was woken, and has not said yet what it found.
    is_woken: bool,
    /// What had been heard when it began to look.
    heard_before: i64,
}

impl Visit {
    /// Says what a look found: as of which generation, and whether it left something.
    pub(super) fn found(&mut self, generation: i64, has_more: bool) {
        let mut queues = lock(&self.org.queues);
        // A look that began after something was heard, and finds that the log has not come so far: it wasn't true. (What the
        // look itself tells of the log's end is for its own queue alone: the others have not looked.)
        if generation < self.heard_before && queues.heard == self.heard_before {
            queues.heard = generation;
        }
        let heard = queues.heard;
        let Some(queue) = queues.queues.get_mut(&self.types) else {
            // Nobody else waits for these types.
            return;
        };
        queue.woken -= usize::from(std::mem::take(&mut self.is_woken));
        if has_more {
            queue.wake(WOKEN_BY_ONE);
        } else {
            queue.exhausted = queue.exhausted.max(generation);
            queue.look_into(heard);
        }
        queues.forget_if_empty(&self.types);
    }

    /// Waits until there may be something that a look as of this generation, which found nothing and left nothing, did not
    /// see. May be dropped while it waits.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Draining`] when the server is going away.
    pub(super) async fn news(&mut self, generation: i64) -> Result<(), LedgerError> {
        let (id, woken) = {
            let mut queues = lock(&self.org.queues);
            if self.room.is_closed() {
                return Err(LedgerError::Draining);
            }
            let heard = queues.heard;
            let queue = queues.open(&self.types);
            queue.exhausted = queue.exhausted.max(generation);
            if heard > queue.exhausted && queue.woken == 0 {
                queue.woken += 1;
                self.is_woken = true;
                self.heard_before = heard;
                return Ok(());
            }
            let (wake, woken) = oneshot::channel();
            queue.sleeping.insert(self.order, wake);
            (self.order, woken)
        };
        let mut sleep = Sleep { visit: self, id, woken: Some(woken) };
        let woken = sleep.woken.as_mut().expect("it is taken below only");
        let news = woken.await;
        sleep.woken = None;
        let visit = &mut *sleep.visit;
        match news {
            Ok(()) => {
                visit.is_woken = true;
                visit.heard_before = lock(&visit.org.queues).heard;
                Ok(())
            }
            Err(_) => Err(LedgerError::Draining),
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        lock(&self.room.state).claims -= 1;
        if !self.is_woken {
            return;
        }
        // It was woken and has not looked: somebody else shall.
        let mut queues = lock(&self.org.queues);
        let heard = queues.heard;
        if let Some(queue) = queues.queues.get_mut(&self.types) {
            queue.woken -= 1;
            queue.look_into(heard);
        }
        queues.forget_if_empty(&self.types);
    }
}

/// A claim that sleeps. Given up, it leaves the queue, and if it was being woken the visit hands the news on.
struct Sleep<'a> {
    visit: &'a mut Visit,
    id: u64,
    woken: Option<oneshot::Receiver<()>>,
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        let Some(mut woken) = self.woken.take() else { return };
        let mut queues = lock(&self.visit.org.queues);
        if let Some(queue) = queues.queues.get_mut(&self.visit.types) {
            queue.sleeping.remove(&self.id);
        }
        queues.forget_if_empty(&self.visit.types);
        drop(queues);
        self.visit.is_woken = woken.try_recv().is_ok();
    }
}

impl Queues {
    /// How many of these jobs claims want that name types, by their queues' numbers.
    fn wanted(&self, ready: &BTreeMap<Arc<str>, usize>) -> HashMap<u64, usize> {
        let mut wanted = HashMap::new();
        for (name, jobs) in ready {
            let of_type = (Arc::clone(name), u64::MIN)..=(Arc::clone(name), u64::MAX);
            for (_, number) in self.by_type.range(of_type) {
                *wanted.entry(*number).or_default() += jobs;
            }
        }
        wanted
    }

    /// The queue of claims for these types.
    fn open(&mut self, types: &Types) -> &mut Queue {
        self.queues.entry(Arc::clone(types)).or_insert_with(|| {
            self.opened += 1;
            self.by_type.extend(types.iter().map(|name| (Arc::clone(name), self.opened)));
            Queue { number: self.opened, ..Queue::default() }
        })
    }

    fn forget_if_empty(&mut self, types: &Types) {
        if self.queues.get(types).is_some_and(|queue| queue.sleeping.is_empty() && queue.woken == 0)
            && let Some(queue) = self.queues.remove(types)
        {
            for name in types.iter() {
                self.by_type.remove(&(Arc::clone(name), queue.number));
            }
        }
    }
}

/// What is behind these locks stays whole whatever panics beside them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
