//! Places, for connections or else: so many in all, and for one address.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// All places.
pub(crate) struct Places {
    in_all: usize,
    per_address: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    in_all: usize,
    addresses: HashMap<IpAddr, usize>,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    Server,
    Address,
}

/// A place, for as long as it is held.
pub(crate) struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    pub(crate) fn new(in_all: usize, per_address: usize) -> Arc<Self> {
        Arc::new(Self { in_all, per_address, taken: Mutex::default() })
    }

    /// Takes a place for somebody at this address.
    pub(crate) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Place, Full> {
        let address = network(address);
        let mut taken = self.taken();
        if taken.in_all >= self.in_all {
            return Err(Full::Server);
        }
        let of_address = taken.addresses.entry(address).or_default();
        if *of_address >= self.per_address {
            return Err(Full::Address);
        }
        *of_address += 1;
        taken.in_all += 1;
        Ok(Place { places: Arc::clone(self), address })
    }

    /// The map stays whole whatever panics beside it.
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.in_all -= 1;
        leave(&mut taken.addresses, &self.address);
    }
}

/// Gives one of a key's places back; nothing is kept of a key that has none.
pub(crate) fn leave<K: Hash + Eq>(taken: &mut HashMap<K, usize>, key: &K) {
    if let Some(n) = taken.get_mut(key) {
        *n -= 1;
        if *n == 0 {
            taken.remove(key);
        }
    }
}

/// Whoever has an address of IPv6 has those of its network, too.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_takes_its_places_and_gives_them_back() {
        let places = Places::new(4, 2);
        let take = |address: &str| places.take(address.parse().unwrap());
        let held = [take("2001:db8::1").unwrap(), take("2001:db8::2").unwrap()];
        assert_eq!(take("2001:db8::3").err(), Some(Full::Address));
        let other = take("2001:db8:0:1::1").unwrap();
        // IPv4 is the same in either form.
        let four = take("::ffff:10.0.0.1").unwrap();
        assert_eq!(take("10.0.0.1").err(), Some(Full::Server));
        drop((held, other, four));
        assert!(places.taken().addresses.is_empty());
        drop([take("10.0.0.1").unwrap(), take("::ffff:10.0.0.1").unwrap()]);
    }
}
