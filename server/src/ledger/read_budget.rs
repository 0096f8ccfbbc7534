//! Bounds the memory of past pages that were read for streams and not taken yet, in all and for each org. Only streams without
//! pages queue for room. A stream with pages waits for its caller to take them, and ends with the caller if it takes nothing.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::LedgerError;
use crate::domain::id::OrgId;

/// Memory is counted in units of this many bytes.
const UNIT: usize = 1 << 10;

/// The memory for pages.
pub(super) struct ReadBudget {
    all: Pool,
    per_org: usize,
    orgs: Mutex<HashMap<OrgId, Weak<Pool>>>,
}

/// A number of units.
struct Pool {
    free: Arc<Semaphore>,
    total: usize,
}

impl Pool {
    fn new(total: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(total)), total }
    }

    fn is_tight(&self) -> bool {
        self.free.available_permits() < self.total / 4
    }
}

/// One stream's access to the memory.
#[derive(Clone)]
pub struct StreamPages {
    memory: Arc<ReadBudget>,
    of_org: Arc<Pool>,
    own: Arc<Own>,
}

/// The pages of one stream.
#[derive(Debug, Default)]
struct Own {
    pages: AtomicUsize,
    given_back: Notify,
}

/// The memory of one page, until it is dropped.
#[derive(Debug, Default)]
pub struct PageShare(Option<Share>);

#[derive(Debug)]
struct Share {
    of_org: OwnedSemaphorePermit,
    of_all: OwnedSemaphorePermit,
    own: Arc<Own>,
}

impl ReadBudget {
    /// Memory of `bytes`, of which one org may have `per_org`.
    pub(super) fn new(bytes: usize, per_org: usize) -> Arc<Self> {
        let units = |bytes: usize| (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        let total = units(bytes);
        Arc::new(Self { all: Pool::new(total), per_org: units(per_org).min(total), orgs: Mutex::default() })
    }

    /// The access of a new stream of this org.
    pub(super) fn stream(self: &Arc<Self>, org: OrgId) -> StreamPages {
        let mut orgs = self.orgs.lock();
        if let Some(of_org) = orgs.get(&org).and_then(Weak::upgrade) {
            return StreamPages { memory: Arc::clone(self), of_org, own: Arc::default() };
        }
        // Removes orgs without streams when the map would grow.
        if orgs.len() == orgs.capacity() {
            orgs.retain(|_, of_org| of_org.strong_count() > 0);
        }
        let of_org = Arc::new(Pool::new(self.per_org));
        orgs.insert(org, Arc::downgrade(&of_org));
        StreamPages { memory: Arc::clone(self), of_org, own: Arc::default() }
    }
}

impl StreamPages {
    /// Waits for memory for a page of this size. While the stream has other pages, it waits for its caller to take one.
    pub(super) async fn take(&self, bytes: usize) -> Result<PageShare, LedgerError> {
        let units = self.units(bytes);
        loop {
            if let Some(share) = self.try_take(bytes) {
                return Ok(share);
            }
            if self.own.pages.load(Ordering::Acquire) == 0 {
                break;
            }
            self.own.given_back.notified().await;
        }
        let closed = |_| LedgerError::Draining;
        let of_org = Arc::clone(&self.of_org.free).acquire_many_owned(units).await.map_err(closed)?;
        let of_all = Arc::clone(&self.memory.all.free).acquire_many_owned(units).await.map_err(closed)?;
        Ok(self.share(of_org, of_all))
    }

    /// Takes memory for a page of this size, if there is some at once.
    pub(super) fn try_take(&self, bytes: usize) -> Option<PageShare> {
        let units = self.units(bytes);
        let of_org = Arc::clone(&self.of_org.free).try_acquire_many_owned(units).ok()?;
        let of_all = Arc::clone(&self.memory.all.free).try_acquire_many_owned(units).ok()?;
        Some(self.share(of_org, of_all))
    }

    fn units(&self, bytes: usize) -> u32 {
        (bytes / UNIT + 1).min(self.of_org.total) as u32
    }

    fn share(&self, of_org: OwnedSemaphorePermit, of_all: OwnedSemaphorePermit) -> PageShare {
        self.own.pages.fetch_add(1, Ordering::AcqRel);
        PageShare(Some(Share { of_org, of_all, own: Arc::clone(&self.own) }))
    }

    /// True while the stream has pages, including one that the caller has taken whole but not dropped.
    pub fn has_pages(&self) -> bool {
        self.own.pages.load(Ordering::Acquire) > 0
    }

    /// True if less than a quarter is free, in all or of the org's part, and the stream has pages.
    pub fn is_memory_tight(&self) -> bool {
        self.has_pages() && (self.of_org.is_tight() || self.memory.all.is_tight())
    }
}

impl PageShare {
    /// Gives back what the page does not need.
    pub(super) fn shrink(&mut self, bytes: usize) {
        if let Some(Share { of_org, of_all, .. }) = &mut self.0 {
            for taken in [of_org, of_all] {
                let surplus = taken.num_permits().saturating_sub(bytes / UNIT + 1);
                drop(taken.split(surplus));
            }
        }
    }
}

impl Drop for PageShare {
    fn drop(&mut self) {
        if let Some(Share { of_org, of_all, own }) = self.0.take() {
            drop((of_org, of_all));
            own.pages.fetch_sub(1, Ordering::AcqRel);
            own.given_back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;
    use uuid::Uuid;

    use super::*;

    fn org(n: u128) -> OrgId {
        OrgId(Uuid::from_u128(n))
    }

    #[tokio::test]
    async fn a_page_takes_what_it_needs_and_gives_it_back() {
        let memory = ReadBudget::new(24 << 10, 8 << 10);
        let stream = memory.stream(org(0));
        let mut page = stream.take(6 << 10).await.unwrap();
        assert!(stream.is_memory_tight() && !memory.stream(org(0)).is_memory_tight(), "who holds none is not hurried");
        page.shrink(2 << 10);
        assert!(!stream.is_memory_tight());
        // A page larger than the org's whole part takes all of it.
        drop(page);
        drop(stream.take(1 << 30).await.unwrap());
        assert_eq!((stream.of_org.free.available_permits(), memory.all.free.available_permits()), (8, 24));
    }

    #[tokio::test]
    async fn one_org_leaves_room_to_others_and_who_waits_holds_nothing() {
        const AT_ONCE: Duration = Duration::ZERO;
        let memory = ReadBudget::new(24 << 10, 8 << 10);
        let [first, second, other] = [org(0), org(0), org(1)].map(|org| memory.stream(org));
        let page = first.take(7 << 10).await.unwrap();
        // There is room in all, but not in the org's part.
        assert!(timeout(AT_ONCE, second.take(7 << 10)).await.is_err());
        drop(other.take(7 << 10).await.unwrap());
        // It waits for its own caller, not in the queue of streams without pages.
        let mut more = Box::pin(first.take(7 << 10));
        assert!(timeout(AT_ONCE, &mut more).await.is_err());
        let mut waits = Box::pin(second.take(7 << 10));
        assert!(timeout(AT_ONCE, &mut waits).await.is_err());
        drop(page);
        drop(waits.await.unwrap());
        drop(more.await.unwrap());
        drop((first, second, other));
        drop(memory.stream(org(2)));
        assert!(memory.orgs.lock().values().all(|of_org| of_org.strong_count() == 0));
    }
}
