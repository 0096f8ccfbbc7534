//! Claims that wait for work without querying the database.
//!
//! The log's head counts the batches that made a job ready: `ready_gen`, the generation. A claim that found nothing waits until
//! it hears of a generation above the one that it saw: from this server's commits, which also say which types became ready, or
//! from another server's.
//!
//! Claims for the same types wait in one queue, and a queue wakes only as many claims as there is news for: as many as jobs
//! became ready here; one if all that is known is that another server made some job ready; and two for each claim that found
//! work and left some. The latest call is woken first. A woken claim that leaves without checking passes the news on.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::LedgerError;
use crate::domain::{id::OrgId, job_type::ALL_TYPES};

/// The types of a claim's jobs; empty: all types.
pub(super) type Types = Arc<[Arc<str>]>;

/// How many claims are woken by one that found work and left some.
pub(super) const WOKEN_BY_ONE: usize = 2;

/// All claims that wait, or may have to.
pub(super) struct ClaimWaiters {
    orgs: Mutex<HashMap<OrgId, Weak<Org>>>,
    state: Mutex<WaiterLists>,
    limit: usize,
    per_org: usize,
}

#[derive(Default)]
struct WaiterLists {
    /// Claims under way, and how many have entered in all.
    claims: usize,
    entered: u64,
    is_closed: bool,
}

/// The claims on one org.
struct Org {
    id: OrgId,
    room: Weak<ClaimWaiters>,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Queues {
    /// The highest generation heard of.
    heard: i64,
    queues: HashMap<Types, Queue>,
    /// Queue numbers by type. Of thousands of queues that may name a hundred types each, few want what became ready.
    by_type: BTreeSet<(Arc<str>, u64)>,
    /// How many queues have been opened in all.
    opened: u64,
}

/// The claims for one set of types.
#[derive(Default)]
struct Queue {
    /// Numbers queues in the order in which they were opened.
    number: u64,
    /// Nothing is left for these types up to this generation.
    exhausted: i64,
    /// Woken claims that have not reported yet.
    woken: usize,
    /// Sleeping claims in the order of their calls.
    sleeping: BTreeMap<u64, oneshot::Sender<()>>,
}

impl Queue {
    /// Wakes up to `n` claims, latest call first: an old call may be that of a worker that hangs or is gone.
    fn wake(&mut self, n: usize) {
        for _ in 0..n {
            let Some((_, wake)) = self.sleeping.pop_last() else { return };
            // A leaving claim removes itself under the same lock, so a claim in the queue can be woken.
            self.woken += usize::from(wake.send(()).is_ok());
        }
    }

    /// Wakes one claim if there is news that no woken claim is checking.
    fn look_into(&mut self, heard: i64) {
        if heard > self.exhausted && self.woken == 0 {
            self.wake(1);
        }
    }
}

impl ClaimWaiters {
    /// Bounds the claims, in all and of one org.
    pub(super) fn new(limit: usize, per_org: usize) -> Arc<Self> {
        Arc::new(Self { orgs: Mutex::default(), state: Mutex::default(), limit, per_org })
    }

    /// Registers a claim before its first attempt. From here on it hears of jobs that become ready.
    pub(super) fn enter(self: &Arc<Self>, org: OrgId, types: Types) -> Result<Visit, LedgerError> {
        let mut state = self.state.lock();
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
        let mut orgs = self.orgs.lock();
        let slot = orgs.entry(org).or_default();
        let org = slot.upgrade().unwrap_or_else(|| {
            let org = Arc::new(Org { id: org, room: Arc::downgrade(self), queues: Mutex::default() });
            *slot = Arc::downgrade(&org);
            org
        });
        drop(orgs);
        // Each claim on the org has a reference. Other references are short-lived.
        if Arc::strong_count(&org) > self.per_org {
            self.state.lock().claims -= 1;
            return Err(LedgerError::Overloaded);
        }
        let heard_before = org.queues.lock().heard;
        Ok(Visit { room: Arc::clone(self), org, types, order, is_woken: false, heard_before })
    }

    /// Records how many jobs of each type a batch of this server made ready; [`ALL_TYPES`] stands for jobs of any type.
    pub(super) fn became_ready(&self, org: OrgId, generation: i64, ready: &BTreeMap<Arc<str>, usize>) {
        let Some(org) = self.org(org) else { return };
        let mut queues = org.queues.lock();
        queues.heard = queues.heard.max(generation);
        let wanted = queues.wanted(ready);
        let of_any = ready.get(ALL_TYPES).copied().unwrap_or(0);
        for (types, queue) in &mut queues.queues {
            let jobs = match types.is_empty() {
                true => ready.values().sum(),
                false => of_any + wanted.get(&queue.number).copied().unwrap_or(0),
            };
            if jobs > 0 {
                queue.wake(jobs);
            } else if queue.exhausted == generation - 1 {
                queue.exhausted = generation;
            } else {
                // Another server's generations in between may have made jobs of these types ready.
                queue.look_into(generation);
            }
        }
    }

    /// Records a generation that another server announced, or that was found in the database.
    pub(super) fn heard(&self, org: OrgId, generation: i64) {
        let Some(org) = self.org(org) else { return };
        let mut queues = org.queues.lock();
        if generation <= queues.heard {
            return;
        }
        queues.heard = generation;
        for queue in queues.queues.values_mut() {
            queue.look_into(generation);
        }
    }

    pub(super) fn sleeping(&self) -> usize {
        let orgs: Vec<_> = self.orgs.lock().values().filter_map(Weak::upgrade).collect();
        let of_org =
            |org: &Arc<Org>| org.queues.lock().queues.values().map(|queue| queue.sleeping.len()).sum::<usize>();
        orgs.iter().map(of_org).sum()
    }

    /// The orgs that have claims.
    pub(super) fn orgs(&self) -> Vec<OrgId> {
        self.orgs.lock().keys().copied().collect()
    }

    /// Ends all claims and refuses new ones.
    pub(super) fn close(&self) {
        self.state.lock().is_closed = true;
        let orgs: Vec<_> = self.orgs.lock().values().filter_map(Weak::upgrade).collect();
        for org in orgs {
            for queue in org.queues.lock().queues.values_mut() {
                // A claim whose waker is dropped ends with `Draining`.
                queue.sleeping.clear();
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.state.lock().is_closed
    }

    fn org(&self, org: OrgId) -> Option<Arc<Org>> {
        self.orgs.lock().get(&org).and_then(Weak::upgrade)
    }
}

impl Drop for Org {
    /// The last claim has left. If a new claim has registered the org anew meanwhile, that entry stays.
    fn drop(&mut self) {
        let Some(room) = self.room.upgrade() else { return };
        let mut orgs = room.orgs.lock();
        if orgs.get(&self.id).is_some_and(|slot| slot.strong_count() == 0) {
            orgs.remove(&self.id);
        }
    }
}

/// One claim, while it tries and waits by turns.
pub(super) struct Visit {
    room: Arc<ClaimWaiters>,
    org: Arc<Org>,
    types: Types,
    /// Its position among all calls.
    order: u64,
    /// It was woken, and has not reported what it found.
    is_woken: bool,
    /// The generation heard of when its current attempt began.
    heard_before: i64,
}

impl Visit {
    /// Reports an attempt: the generation that it saw, and whether it left jobs.
    pub(super) fn found(&mut self, generation: i64, has_more: bool) {
        let mut queues = self.org.queues.lock();
        // The attempt began after this generation was announced and saw an earlier one: the announcement was false. (What the
        // attempt saw counts for its own queue only, since the other queues have not checked.)
        if generation < self.heard_before && queues.heard == self.heard_before {
            queues.heard = generation;
        }
        let heard = queues.heard;
        let Some(queue) = queues.queues.get_mut(&self.types) else {
            // No claim waits for these types.
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

    /// Waits until there may be a job that an attempt at this generation, which found and left nothing, did not see. May be
    /// dropped while it waits.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Draining`] when the server shuts down.
    pub(super) async fn news(&mut self, generation: i64) -> Result<(), LedgerError> {
        let (id, woken) = {
            let mut queues = self.org.queues.lock();
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
                visit.heard_before = visit.org.queues.lock().heard;
                Ok(())
            }
            Err(_) => Err(LedgerError::Draining),
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.room.state.lock().claims -= 1;
        if !self.is_woken {
            return;
        }
        // It was woken and did not check: another claim has to.
        let mut queues = self.org.queues.lock();
        let heard = queues.heard;
        if let Some(queue) = queues.queues.get_mut(&self.types) {
            queue.woken -= 1;
            queue.look_into(heard);
        }
        queues.forget_if_empty(&self.types);
    }
}

/// A sleeping claim. Dropped, it leaves the queue. If it was woken just then, the visit passes the news on.
struct Sleep<'a> {
    visit: &'a mut Visit,
    id: u64,
    woken: Option<oneshot::Receiver<()>>,
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        let Some(mut woken) = self.woken.take() else { return };
        let mut queues = self.visit.org.queues.lock();
        if let Some(queue) = queues.queues.get_mut(&self.visit.types) {
            queue.sleeping.remove(&self.id);
        }
        queues.forget_if_empty(&self.visit.types);
        drop(queues);
        self.visit.is_woken = woken.try_recv().is_ok();
    }
}

impl Queues {
    /// How many of these jobs each queue that names types wants, by queue number.
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

    /// The queue of these types, opened if there is none.
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

#[cfg(test)]
mod tests;
