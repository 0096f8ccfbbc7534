//! Limits how often the same thing is logged, so that callers who cause it can't flood the log.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// The shortest time between two log lines about the same thing.
const AGAIN: Duration = Duration::from_secs(60);
/// Things that are tracked. All others share one entry, until some tracked ones were last logged over [`AGAIN`] ago.
const KNOWN: usize = 1_024;

/// When each thing was last logged, and how often it has happened since.
pub(crate) struct RateLimitedLog<K>(Mutex<Said<K>>);

struct Said<K> {
    known: HashMap<K, (Instant, u64)>,
    others: Option<(Instant, u64)>,
}

impl<K> Default for RateLimitedLog<K> {
    fn default() -> Self {
        Self(Mutex::new(Said { known: HashMap::new(), others: None }))
    }
}

impl<K: Hash + Eq> RateLimitedLog<K> {
    /// Counts an occurrence. Returns the count since the last log line, this one included, if a line is due.
    pub(crate) fn note(&self, what: K) -> Option<u64> {
        self.note_at(what, Instant::now())
    }

    fn note_at(&self, what: K, now: Instant) -> Option<u64> {
        let mut said = self.0.lock();
        let Said { known, others } = &mut *said;
        let again = |(at, times): &mut (Instant, u64)| {
            *times += 1;
            let is_due = now.duration_since(*at) >= AGAIN;
            is_due.then(|| {
                *at = now;
                std::mem::take(times)
            })
        };
        if let Some(of_it) = known.get_mut(&what) {
            return again(of_it);
        }
        if known.len() >= KNOWN {
            known.retain(|_, (at, _)| now.duration_since(*at) < AGAIN);
        }
        if known.len() < KNOWN {
            known.insert(what, (now, 0));
            return Some(1);
        }
        match others {
            Some(others) => again(others),
            None => {
                *others = Some((now, 0));
                Some(1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_at_once_and_the_others_together() {
        let (rarely, now) = (RateLimitedLog::default(), Instant::now());
        assert_eq!(rarely.note_at("a", now), Some(1));
        assert_eq!((rarely.note_at("a", now), rarely.note_at("b", now)), (None, Some(1)));
        assert_eq!(rarely.note_at("a", now + AGAIN), Some(2));
        assert_eq!(rarely.note_at("a", now + AGAIN), None);
    }

    #[test]
    fn no_more_is_kept_than_is_said() {
        let (rarely, now) = (RateLimitedLog::default(), Instant::now());
        let said = (0..5_000).filter(|n| rarely.note_at(*n, now).is_some()).count();
        assert_eq!(said, KNOWN + 1, "one of the others");
        let soon = now + AGAIN / 2;
        (0..KNOWN).for_each(|n| assert_eq!(rarely.note_at(n, soon), None));
        assert_eq!(rarely.note_at(6_000, now + AGAIN), Some(1), "those of before are long past");
    }

    #[test]
    fn those_beyond_what_is_known_are_said_together() {
        let (rarely, now) = (RateLimitedLog::default(), Instant::now());
        (0..KNOWN).for_each(|n| assert_eq!(rarely.note_at(n, now), Some(1)));
        assert_eq!(rarely.note_at(KNOWN, now - AGAIN / 2), Some(1));
        let others = (2_000..2_100).filter_map(|n| rarely.note_at(n, now));
        assert_eq!(others.count(), 0);
        assert_eq!(rarely.note_at(3_000, now + AGAIN / 2), Some(101));
    }
}
