//! The wait between a failed or lost attempt and the next one.

use std::time::Duration;

use super::id::JobId;

/// Exponential backoff with full jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// Upper bound of the first delay.
    pub initial_backoff: Duration,
    /// Growth of the upper bound from one failure to the next; at least 1.
    pub multiplier: f64,
    /// The upper bound grows no further than this.
    pub max_backoff: Duration,
}

impl Default for RetryPolicy {
    /// 1 s, doubled with each failure up to 10 min.
    fn default() -> Self {
        Self { initial_backoff: Duration::from_secs(1), multiplier: 2.0, max_backoff: Duration::from_secs(600) }
    }
}

impl RetryPolicy {
    /// The delay after a job's `failures`-th failure or lost attempt (from 1): evenly distributed between zero and the
    /// upper bound.
    ///
    /// The draw depends only on the job and the failure, so that the same decision gives the same delay again.
    pub fn delay(&self, job: JobId, failures: i32) -> Duration {
        let exponent = failures.saturating_sub(1);
        let ceiling =
            (self.initial_backoff.as_secs_f64() * self.multiplier.powi(exponent)).min(self.max_backoff.as_secs_f64());
        let micros = ceiling * fraction(job, failures) * 1e6;
        Duration::from_micros(micros as u64)
    }
}

/// A number in [0, 1), evenly distributed over jobs and failures: the finaliser of SplitMix64 over both.
fn fraction(job: JobId, failures: i32) -> f64 {
    let (high, low) = job.0.as_u64_pair();
    let mut z = (high ^ low.rotate_left(32)).wrapping_add((failures as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn delays_grow_to_the_bound_and_spread_below_it() {
        let policy = RetryPolicy::default();
        let mut longest = [Duration::ZERO; 12];
        for _ in 0..500 {
            let job = JobId(Uuid::now_v7());
            for (n, longest) in longest.iter_mut().enumerate() {
                let delay = policy.delay(job, n as i32 + 1);
                assert_eq!(delay, policy.delay(job, n as i32 + 1), "the same draw twice");
                *longest = delay.max(*longest);
            }
        }
        for (n, longest) in longest.iter().enumerate() {
            let ceiling = Duration::from_secs(1 << n).min(policy.max_backoff);
            assert!(*longest <= ceiling, "failure {}: {longest:?} over {ceiling:?}", n + 1);
            assert!(*longest > ceiling / 2, "failure {}: 500 draws never came over half of {ceiling:?}", n + 1);
        }
    }
}
