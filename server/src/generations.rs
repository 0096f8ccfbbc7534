//! A map that keeps the entries that were used last.

use std::{collections::HashMap, hash::Hash};

/// An approximate LRU map of two generations. When the young generation has half of `most` entries, it becomes the old one,
/// and the previous old one is dropped. Reading an entry moves it to the young generation.
#[derive(Debug)]
pub(crate) struct Generations<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    most: usize,
}

impl<K: Eq + Hash, V> Generations<K, V> {
    /// A map of at most this many entries.
    pub(crate) fn new(most: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), most }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<&V> {
        if let Some((key, value)) = self.old.remove_entry(key) {
            self.insert(key, value);
        }
        self.young.get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.most / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.old.remove(&key);
        self.young.insert(key, value);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.young.iter().chain(&self.old)
    }

    pub(crate) fn remove(&mut self, key: &K) {
        self.young.remove(key);
        self.old.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::Generations;

    #[test]
    fn what_is_used_stays_and_the_rest_goes() {
        let mut kept = Generations::new(8);
        for n in 0..100 {
            kept.insert(n, n);
            assert_eq!(kept.get(&0), Some(&0), "{n}");
            assert!(kept.young.len() + kept.old.len() <= 8);
        }
        assert_eq!([99, 98, 50].map(|n| kept.get(&n).copied()), [Some(99), Some(98), None]);
        kept.insert(98, 7);
        kept.remove(&99);
        assert_eq!([98, 99].map(|n| kept.get(&n).copied()), [Some(7), None]);
    }
}
