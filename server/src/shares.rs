//! Shared bounds: an amount in all, and a smaller share for each key (an org, an address).

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};

use crate::domain::id::OrgId;

/// A bound plus a reserve of a quarter, at least 1. Only calls that keep running jobs alive or end them may use the
/// reserve, so they get through when others are refused.
pub(crate) const fn with_reserve(limit: usize) -> usize {
    let reserve = limit / 4;
    limit.saturating_add(if reserve == 0 { 1 } else { reserve })
}

/// Who takes part of what is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Whose {
    Org(OrgId),
    /// The network of an address, see [`network`], where nothing else is known or it is about no org.
    Address(IpAddr),
}

/// Bounds or amounts: in all, and of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Most {
    pub(crate) in_all: usize,
    pub(crate) each: usize,
}

impl Most {
    /// True if one of the amounts exceeds its bound.
    pub(crate) const fn exceeds(self, most: Self) -> bool {
        self.in_all > most.in_all || self.each > most.each
    }

    /// The bounds with their reserves, see [`with_reserve`].
    pub(crate) const fn with_reserve(self) -> Self {
        Self { in_all: with_reserve(self.in_all), each: with_reserve(self.each) }
    }
}

/// Counts who has taken how much, by key.
pub(crate) struct Shares<K> {
    most: Most,
    taken: Mutex<Taken<K>>,
}

struct Taken<K> {
    in_all: usize,
    /// Keys that have taken nothing have no entry.
    each: HashMap<K, usize>,
}

/// Which bound was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The bound in all.
    InAll,
    /// The bound of the key.
    Each,
}

/// An amount that a key has taken. Dropping it returns the amount.
pub(crate) struct Part<K: Hash + Eq + Clone> {
    shares: Arc<Shares<K>>,
    key: K,
    n: usize,
}

impl<K: Hash + Eq + Clone> Shares<K> {
    pub(crate) fn new(most: Most) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::new(Taken { in_all: 0, each: HashMap::new() }) })
    }

    /// Takes `n` for a key.
    pub(crate) fn take(self: &Arc<Self>, key: K, n: usize) -> Result<Part<K>, Full> {
        let mut part = Part { shares: Arc::clone(self), key, n: 0 };
        part.grow(n, self.most)?;
        Ok(part)
    }

    /// An empty part, to be grown.
    pub(crate) fn nothing(self: &Arc<Self>, key: K) -> Part<K> {
        Part { shares: Arc::clone(self), key, n: 0 }
    }

    pub(crate) fn most(&self) -> Most {
        self.most
    }

    fn taken(&self) -> MutexGuard<'_, Taken<K>> {
        self.taken.lock()
    }
}

impl<K: Hash + Eq + Clone> Part<K> {
    /// Takes `n` more, if that stays within `most`. If refused, nothing changes.
    pub(crate) fn grow(&mut self, n: usize, most: Most) -> Result<(), Full> {
        let mut taken = self.shares.taken();
        if taken.in_all.saturating_add(n) > most.in_all {
            return Err(Full::InAll);
        }
        let has = taken.each.get(&self.key).copied().unwrap_or_default();
        if has.saturating_add(n) > most.each {
            return Err(Full::Each);
        }
        if n > 0 {
            taken.in_all += n;
            *taken.each.entry(self.key.clone()).or_default() += n;
            self.n += n;
        }
        Ok(())
    }

    /// The amounts taken in all, and by the key of this part.
    pub(crate) fn beside(&self) -> Most {
        let taken = self.shares.taken();
        Most { in_all: taken.in_all, each: taken.each.get(&self.key).copied().unwrap_or_default() }
    }

    pub(crate) fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Hash + Eq + Clone> Drop for Part<K> {
    fn drop(&mut self) {
        if self.n == 0 {
            return;
        }
        let mut taken = self.shares.taken();
        taken.in_all -= self.n;
        if let Some(has) = taken.each.get_mut(&self.key) {
            *has -= self.n;
            if *has == 0 {
                taken.each.remove(&self.key);
            }
        }
    }
}

/// The key of an address: of IPv6 its /64 network, because one host usually has a whole network.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_takes_its_share_and_gives_it_back() {
        let shares = Shares::new(Most { in_all: 4, each: 2 });
        let take = |address: &str| shares.take(network(address.parse().unwrap()), 1);
        let held = [take("2001:db8::1").unwrap(), take("2001:db8::2").unwrap()];
        assert_eq!(take("2001:db8::3").err(), Some(Full::Each));
        let other = take("2001:db8:0:1::1").unwrap();
        // An IPv4 address counts as the same in both forms.
        let four = take("::ffff:10.0.0.1").unwrap();
        assert_eq!(take("10.0.0.1").err(), Some(Full::InAll));
        drop((held, other, four));
        assert!(shares.taken().each.is_empty());
        drop([take("10.0.0.1").unwrap(), take("::ffff:10.0.0.1").unwrap()]);
        assert_eq!(shares.taken().in_all, 0);
    }

    #[test]
    fn a_part_grows_within_bounds_and_is_as_it_was_where_it_can_not() {
        let shares = Shares::new(Most { in_all: 10, each: 4 });
        let mut part = shares.nothing(1);
        part.grow(3, shares.most()).unwrap();
        assert_eq!(part.grow(2, shares.most()), Err(Full::Each));
        part.grow(2, Most { in_all: 10, each: 5 }).unwrap();
        assert_eq!(part.beside(), Most { in_all: 5, each: 5 });
        assert_eq!(shares.take(2, 6).err(), Some(Full::InAll));
        drop(part);
        assert!(shares.taken().each.is_empty());
    }
}
