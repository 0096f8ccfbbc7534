//! Answers that their callers have not taken: so many bytes in all. Beyond that, whoever holds most of them loses its connection.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

/// What is kept of an answer besides its bytes.
const OF_EACH: usize = 2 << 10;

/// Of all connections.
pub(super) struct Unread {
    limit: usize,
    next: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    in_all: usize,
    /// Those with answers, by the order they came in.
    connections: HashMap<u64, Connection>,
}

struct Connection {
    bytes: usize,
    address: SocketAddr,
    cut: CancellationToken,
}

/// How many bytes an answer has, for one that is all made: an extension of the response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerBytes(pub(crate) usize);

/// An answer that goes on and has bounds of its own, and so is not counted: an extension of the response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GoesOn;

/// Of one connection.
#[derive(Clone)]
pub(super) struct Share {
    all: Arc<Unread>,
    id: u64,
    address: SocketAddr,
    cut: CancellationToken,
}

impl Unread {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, next: AtomicU64::new(0), state: Mutex::default() })
    }

    /// The share of a new connection, which is cut if it becomes too much.
    pub(super) fn share(self: &Arc<Self>, address: SocketAddr, cut: CancellationToken) -> Share {
        Share { all: Arc::clone(self), id: self.next.fetch_add(1, Ordering::Relaxed), address, cut }
    }

    /// The map stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Counts an answer for as long as what is returned is kept.
    pub(super) fn hold(&self, bytes: usize) -> Holding {
        let mut state = self.all.state();
        let is_cut = self.cut.is_cancelled();
        let bytes = if is_cut { 0 } else { bytes + OF_EACH };
        if !is_cut {
            let (address, cut) = (self.address, &self.cut);
            let new = || Connection { bytes: 0, address, cut: cut.clone() };
            state.connections.entry(self.id).or_insert_with(new).bytes += bytes;
            state.in_all += bytes;
        }
        while state.in_all > self.all.limit
            && let Some(most) = state.connections.iter().max_by_key(|(_, of)| of.bytes).map(|(id, _)| *id)
        {
            state.cut(most);
        }
        Holding { share: self.clone(), bytes }
    }
}

impl State {
    fn cut(&mut self, id: u64) {
        let Some(Connection { bytes, address, cut }) = self.connections.remove(&id) else { return };
        self.in_all -= bytes;
        tracing::warn!(%address, bytes, "a connection is cut that does not take its answers");
        cut.cancel();
    }
}

/// An answer that is not taken yet.
pub(super) struct Holding {
    share: Share,
    bytes: usize,
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut state = self.share.all.state();
        // Of one that was cut for it nothing is counted any more.
        let Some(of) = state.connections.get_mut(&self.share.id) else { return };
        of.bytes -= self.bytes;
        if of.bytes == 0 {
            state.connections.remove(&self.share.id);
        }
        state.in_all -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_most_is_cut_and_nothing_of_it_counts_any_more() {
        let all = Unread::new(9 * OF_EACH);
        let cuts = [(); 3].map(|()| CancellationToken::new());
        let [few, most, late] = [0, 1, 2].map(|n| all.share(([127, 0, 0, 1], n as u16).into(), cuts[n].clone()));
        let of_few = [few.hold(0), few.hold(0)];
        let of_most = [most.hold(3 * OF_EACH), most.hold(0)];
        drop(late.hold(OF_EACH));
        assert!(cuts.iter().all(|cut| !cut.is_cancelled()));
        let of_late = late.hold(2 * OF_EACH);
        assert_eq!(cuts.each_ref().map(CancellationToken::is_cancelled), [false, true, false]);
        let after = most.hold(0);
        drop((of_most, after));
        assert_eq!(all.state().in_all, 5 * OF_EACH);
        drop((of_few, of_late));
        assert_eq!(all.state().in_all, 0);
        assert!(all.state().connections.is_empty());
    }
}
