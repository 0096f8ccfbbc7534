//! Backoff between tries.

use std::time::Duration;

/// Upper bound of the first wait.
const FIRST: Duration = Duration::from_millis(50);
/// Upper bound of all waits: short enough that the client soon finds a server that is back.
const LONGEST: Duration = Duration::from_secs(2);

/// Waits between tries: exponential with full jitter, so that after an outage the clients don't all return at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    tries: u32,
}

impl Backoff {
    /// The next wait, never shorter than the service asked for.
    pub(crate) fn next(&mut self, asked_for: Option<Duration>) -> Duration {
        let ceiling = FIRST.saturating_mul(1 << self.tries.min(10)).min(LONGEST);
        self.tries += 1;
        ceiling.mul_f64(fastrand::f64()).max(asked_for.unwrap_or_default())
    }

    /// Starts again with short waits after a success.
    pub(crate) fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_heed_the_service() {
        let ceiling = |n: usize| FIRST.saturating_mul(1 << n.min(10)).min(LONGEST);
        let mut longest = [Duration::ZERO; 12];
        for _ in 0..200 {
            let mut backoff = Backoff::default();
            for (n, longest) in longest.iter_mut().enumerate() {
                let wait = backoff.next(None);
                assert!(wait <= ceiling(n));
                *longest = wait.max(*longest);
            }
            assert!(backoff.next(Some(Duration::from_secs(9))) >= Duration::from_secs(9));
            backoff.reset();
            assert!(backoff.next(None) <= FIRST);
        }
        for (n, longest) in longest.into_iter().enumerate() {
            assert!(longest > ceiling(n) / 2, "200 draws of wait {n} never came over half of {:?}", ceiling(n));
        }
    }
}
