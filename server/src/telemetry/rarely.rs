//! What happens often is said now and then: whoever makes it happen does not write the log.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often the same is said, at most.
const AGAIN: Duration = Duration::from_secs(60);
/// Of how many it is known when they were last said. Beyond that nothing is said of others until some of these are long past.
const KNOWN: usize = 1_024;

/// What was said when, and how often it has happened since.
pub(crate) struct Rarely<K>(Mutex<HashMap<K, (Instant, u64)>>);

impl<K> Default for Rarely<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq> Rarely<K> {
    /// Takes note that it has happened: how often since it was said last, this time included, if it is to be said.
    pub(crate) fn note(&self, what: K) -> Option<u64> {
        self.note_at(what, Instant::now())
    }

    fn note_at(&self, what: K, now: Instant) -> Option<u64> {
        // The map stays whole whatever panics beside it.
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, times)) = said.get_mut(&what) {
            *times += 1;
            let is_due = now.duration_since(*at) >= AGAIN;
            return is_due.then(|| {
                *at = now;
                std::mem::take(times)
            });
        }
        if said.len() >= KNOWN {
            said.retain(|_, (at, _)| now.duration_since(*at) < AGAIN);
        }
        if said.len() >= KNOWN {
            return None;
        }
        said.insert(what, (now, 0));
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_at_once_and_the_others_together() {
        let (rarely, now) = (Rarely::default(), Instant::now());
        assert_eq!(rarely.note_at("a", now), Some(1));
        assert_eq!((rarely.note_at("a", now), rarely.note_at("b", now)), (None, Some(1)));
        assert_eq!(rarely.note_at("a", now + AGAIN), Some(2));
        assert_eq!(rarely.note_at("a", now + AGAIN), None);
    }

    #[test]
    fn no_more_is_kept_than_is_said() {
        let (rarely, now) = (Rarely::default(), Instant::now());
        let said = (0..5_000).filter(|n| rarely.note_at(*n, now).is_some()).count();
        assert_eq!(said, KNOWN);
        assert_eq!(rarely.note_at(6_000, now + AGAIN), Some(1));
    }
}
