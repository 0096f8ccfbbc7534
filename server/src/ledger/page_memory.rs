//! What pages of the past may take that were read for streams and not taken yet, in all.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::LedgerError;

/// PageMemory is counted in so many bytes.
const UNIT: usize = 1 << 10;

/// The room for pages. Whoever holds one and takes nothing of it is ended sooner where there is little left.
#[derive(Clone)]
pub struct PageMemory {
    free: Arc<Semaphore>,
    total: usize,
}

/// The room that a page takes, until it is dropped.
#[derive(Debug, Default)]
pub struct PageShare(Option<OwnedSemaphorePermit>);

impl PageMemory {
    pub(super) fn new(bytes: usize) -> Self {
        let total = (bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(total)), total }
    }

    /// Waits for room for a page of so many bytes.
    pub(super) async fn take(&self, bytes: usize) -> Result<PageShare, LedgerError> {
        let units = u32::try_from((bytes / UNIT + 1).min(self.total)).unwrap_or(u32::MAX);
        let taken = Arc::clone(&self.free).acquire_many_owned(units).await;
        Ok(PageShare(Some(taken.map_err(|_| LedgerError::Draining)?)))
    }

    /// True if little is left.
    pub fn is_tight(&self) -> bool {
        self.free.available_permits() < self.total / 4
    }
}

impl PageShare {
    /// Keeps no more than the page turned out to take.
    pub(super) fn shrink(&mut self, bytes: usize) {
        if let Some(taken) = &mut self.0 {
            let surplus = taken.num_permits().saturating_sub(bytes / UNIT + 1);
            drop(taken.split(surplus));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_page_takes_what_it_needs_and_gives_it_back() {
        let room = PageMemory::new(8 << 10);
        let mut page = room.take(6 << 10).await.unwrap();
        assert!(room.is_tight());
        page.shrink(2 << 10);
        assert!(!room.is_tight());
        // One that is larger than all there is takes all.
        drop(page);
        drop(room.take(1 << 30).await.unwrap());
        assert_eq!(room.free.available_permits(), 8);
    }
}
