//! The source of time.

use chrono::{DateTime, SubsecRound, Utc};

/// A point in time with the precision that both databases keep: microseconds.
pub type Time = DateTime<Utc>;

/// A source of the current time, so that tests can move it by hand.
pub trait Clock: Send + Sync + 'static {
    /// The current time, in whole microseconds.
    fn now(&self) -> Time;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
    fn now(&self) -> Time {
        Utc::now().trunc_subsecs(6)
    }
}
