//! Bounds the bytes of answers that callers have not taken: in all, and for each org (or address, for answers without an
//! org). Above a bound, the org or address with too many bytes over all its connections loses the largest connection.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::shares::{Most, network};

/// Bytes counted for an answer beside its own.
const OF_EACH: usize = 2 << 10;

/// The unread answers of all connections.
pub(super) struct ResponseMemory {
    most: Most,
    next: AtomicU64,
    state: Mutex<HeldMemory>,
}

#[derive(Default)]
struct HeldMemory {
    in_all: usize,
    holders: HashMap<Holder, usize>,
    /// Connections with unread answers, by holder and by the order in which the connections came.
    connections: BTreeMap<(Holder, u64), Connection>,
}

struct Connection {
    bytes: usize,
    address: SocketAddr,
    cut: CancellationToken,
}

/// Whom an answer's bytes are counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Holder {
    /// The org, from whatever addresses it is called.
    Org(Uuid),
    /// The caller's network, if the answer has no org.
    Network(IpAddr),
}

/// The bytes of a complete answer, and its org. An extension of the response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerBytes {
    pub(crate) bytes: usize,
    pub(crate) org: Option<Uuid>,
}

/// Marks a stream's answer, which has its own bounds and is not counted here. An extension of the response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamingResponse;

/// One connection's handle to [`ResponseMemory`].
#[derive(Clone)]
pub(super) struct Share {
    all: Arc<ResponseMemory>,
    id: u64,
    address: SocketAddr,
    cut: CancellationToken,
}

impl ResponseMemory {
    pub(super) fn new(most: Most) -> Arc<Self> {
        Arc::new(Self { most, next: AtomicU64::new(0), state: Mutex::default() })
    }

    /// The share of a new connection. `cut` is cancelled if it has to be closed.
    pub(super) fn share(self: &Arc<Self>, address: SocketAddr, cut: CancellationToken) -> Share {
        Share { all: Arc::clone(self), id: self.next.fetch_add(1, Ordering::Relaxed), address, cut }
    }

    fn state(&self) -> MutexGuard<'_, HeldMemory> {
        self.state.lock()
    }
}

impl Share {
    /// Counts an answer until the returned value is dropped. Cuts connections while a bound is exceeded.
    pub(super) fn hold(&self, bytes: usize, org: Option<Uuid>) -> Holding {
        let holder = org.map_or_else(|| Holder::Network(network(self.address.ip())), Holder::Org);
        let mut state = self.all.state();
        let bytes = if self.cut.is_cancelled() { 0 } else { bytes + OF_EACH };
        if bytes > 0 {
            let (address, cut) = (self.address, &self.cut);
            let new = || Connection { bytes: 0, address, cut: cut.clone() };
            state.connections.entry((holder, self.id)).or_insert_with(new).bytes += bytes;
            *state.holders.entry(holder).or_default() += bytes;
            state.in_all += bytes;
        }
        while let Some(holder) = state.too_much(holder, self.all.most)
            && let Some(most) = state.largest_of(holder)
        {
            state.cut(most);
        }
        Holding { share: self.clone(), holder, bytes }
    }
}

impl HeldMemory {
    /// The holder to cut, after `more` has grown. `more` itself if it exceeds its bound and over half of the total is
    /// taken; the largest holder if the total is exceeded.
    fn too_much(&self, more: Holder, most: Most) -> Option<Holder> {
        if self.in_all > most.in_all / 2 && self.holders.get(&more).is_some_and(|bytes| *bytes > most.each) {
            return Some(more);
        }
        let holders = self.holders.iter().filter(|_| self.in_all > most.in_all);
        holders.max_by_key(|(_, bytes)| **bytes).map(|(holder, _)| *holder)
    }

    /// The holder's connection with the most bytes.
    fn largest_of(&self, holder: Holder) -> Option<u64> {
        let of_holder = self.connections.range((holder, 0)..=(holder, u64::MAX));
        of_holder.max_by_key(|(_, of)| of.bytes).map(|((_, id), _)| *id)
    }

    /// Cuts a connection, and stops counting its answers, whichever holder they belong to.
    fn cut(&mut self, id: u64) {
        let holders: Vec<_> = self.holders.keys().copied().collect();
        for holder in holders {
            let Some(Connection { bytes, address, cut }) = self.connections.remove(&(holder, id)) else { continue };
            self.gives_back(holder, bytes);
            if !cut.is_cancelled() {
                tracing::warn!(%address, ?holder, bytes, "closing a connection whose client does not read its answers");
                cut.cancel();
            }
        }
    }

    fn gives_back(&mut self, holder: Holder, bytes: usize) {
        self.in_all -= bytes;
        if let Some(of) = self.holders.get_mut(&holder) {
            *of -= bytes;
            if *of == 0 {
                self.holders.remove(&holder);
            }
        }
    }
}

/// An unread answer.
pub(super) struct Holding {
    share: Share,
    holder: Holder,
    bytes: usize,
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut state = self.share.all.state();
        let key = (self.holder, self.share.id);
        // The answers of a cut connection are no longer counted.
        let Some(of) = state.connections.get_mut(&key) else { return };
        of.bytes -= self.bytes;
        if of.bytes == 0 {
            state.connections.remove(&key);
        }
        state.gives_back(self.holder, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_holds_most_is_cut_and_nothing_of_it_counts_any_more() {
        let all = ResponseMemory::new(Most { in_all: 9 * OF_EACH, each: usize::MAX });
        let cuts = [(); 3].map(|()| CancellationToken::new());
        let [few, most, late] = [0, 1, 2].map(|n| all.share(([127, 0, 0, 1], n as u16).into(), cuts[n].clone()));
        let of_few = [few.hold(0, None), few.hold(0, None)];
        let of_most = [most.hold(3 * OF_EACH, None), most.hold(0, None)];
        drop(late.hold(OF_EACH, None));
        assert!(cuts.iter().all(|cut| !cut.is_cancelled()));
        let of_late = late.hold(2 * OF_EACH, None);
        assert_eq!(cuts.each_ref().map(CancellationToken::is_cancelled), [false, true, false]);
        let after = most.hold(0, None);
        drop((of_most, after));
        assert_eq!(all.state().in_all, 5 * OF_EACH);
        drop((of_few, of_late));
        assert_eq!(all.state().in_all, 0);
        assert!(all.state().connections.is_empty() && all.state().holders.is_empty());
    }

    #[test]
    fn whoever_holds_most_in_many_connections_has_one_of_them_cut() {
        let all = ResponseMemory::new(Most { in_all: 20 * OF_EACH, each: usize::MAX });
        let cuts = [(); 11].map(|()| CancellationToken::new());
        let share = |n: usize| all.share(([127, 0, 0, n as u8], 1).into(), cuts[n].clone());
        let [many, large] = [1, 2].map(|n| Some(Uuid::from_u128(n)));
        // This org has the largest answers, but fewer bytes than the other org has in all.
        let of_large = share(10).hold(7 * OF_EACH, large);
        let of_many: Vec<_> = (0..7).map(|n| share(n).hold(OF_EACH, many)).collect();
        let _stranger = share(10).hold(0, None);
        assert!(!cuts[10].is_cancelled());
        assert_eq!(cuts.iter().filter(|cut| cut.is_cancelled()).count(), 2);
        drop((of_large, of_many));
        assert_eq!(all.state().in_all, OF_EACH);
        assert_eq!(all.state().holders.len(), 1);
    }

    #[test]
    fn whoever_holds_more_than_its_part_has_a_connection_cut_though_there_is_room() {
        let all = ResponseMemory::new(Most { in_all: 22 * OF_EACH, each: 6 * OF_EACH });
        let cuts = [(); 3].map(|()| CancellationToken::new());
        let [first, second, other] = [0, 1, 2].map(|n| all.share(([127, 0, 0, 1], n as u16).into(), cuts[n].clone()));
        let [org, another] = [1, 2].map(|n| Some(Uuid::from_u128(n)));
        let _held = (first.hold(3 * OF_EACH, org), other.hold(5 * OF_EACH, another), second.hold(OF_EACH, org));
        assert!(cuts.iter().all(|cut| !cut.is_cancelled()), "half of all is not taken");
        let _more = second.hold(0, org);
        assert_eq!(cuts.each_ref().map(CancellationToken::is_cancelled), [true, false, false]);
        assert_eq!(all.state().in_all, 9 * OF_EACH);
    }
}
