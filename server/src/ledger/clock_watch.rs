//! Detects steps of the database's clock.
//!
//! Each reading of the clock is compared with this machine's monotonic time, which nobody sets and which goes on while the
//! machine sleeps. The clock was read between the moments at which the request was sent and the answer arrived, so a detected
//! step is certain, however slow the answers are.

use std::time::Duration;

use chrono::TimeDelta;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::domain::{clock::Time, transition::Jump};

/// By how much the clocks may differ without a step: one second, and a thousandth of the elapsed time.
const TOLERANCE: Duration = Duration::from_secs(1);
const TOLERANCE_SHARE: u32 = 1_000;
/// Jumps within this time count as one.
const ONE_JUMP: TimeDelta = TimeDelta::hours(1);

/// A moment of this machine's monotonic time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// The current moment.
    #[cfg(target_os = "linux")]
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32))
    }

    /// The current moment. On this platform it stands still while the machine sleeps, so a sleep looks like a jump.
    #[cfg(not(target_os = "linux"))]
    pub fn now() -> Self {
        static FIRST: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);
        Self(FIRST.elapsed())
    }

    /// Time from the other moment to this one; negative if the other is later.
    fn since(self, other: Self) -> TimeDelta {
        let signed = |time: Duration| TimeDelta::from_std(time).unwrap_or(TimeDelta::MAX);
        signed(self.0) - signed(other.0)
    }
}

/// A reading of the database's clock, and the moments between which it was read.
#[derive(Debug, Clone, Copy)]
pub struct ClockReading {
    /// When it was requested.
    pub asked: Moment,
    /// The clock's time.
    pub clock: Time,
    /// When the answer arrived.
    pub heard: Moment,
}

/// The database's clock was set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockStep {
    /// It jumped ahead by this much.
    Ahead(TimeDelta),
    /// It was set back by this much.
    Back(TimeDelta),
}

/// Compares readings, and keeps the steps found for one caller.
#[derive(Default)]
pub(super) struct ClockWatch {
    state: Mutex<WatchState>,
    stepped: Notify,
}

#[derive(Default)]
struct WatchState {
    last: Option<ClockReading>,
    jump: Option<Jump>,
    /// Steps in each direction that are not delivered yet.
    ahead: Option<TimeDelta>,
    back: Option<TimeDelta>,
    /// The clock jumped ahead, and retention is not paused in the database yet.
    is_retention_barred: bool,
}

impl WatchState {
    /// Jumps ahead first, because retention stays barred until they are delivered.
    fn take_step(&mut self) -> Option<ClockStep> {
        let ahead = self.ahead.take().map(ClockStep::Ahead);
        ahead.or_else(|| self.back.take().map(ClockStep::Back))
    }
}

/// What a batch has to know about the clock besides its time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ClockState {
    /// The last jump ahead.
    pub(super) jump: Option<Jump>,
    /// Nothing may be removed because of its age.
    pub(super) is_retention_barred: bool,
}

impl ClockWatch {
    pub(super) fn observe(&self, reading: ClockReading) -> ClockState {
        let mut state = self.state();
        if let Some(step) = state.last.and_then(|last| step_between(&last, &reading)) {
            match step {
                ClockStep::Ahead(by) => {
                    let before = state.jump.filter(|before| reading.clock - before.at < ONE_JUMP + by);
                    let by = before.map_or(by, |before| before.by + by);
                    state.jump = Some(Jump { at: reading.clock, by });
                    state.is_retention_barred = true;
                    state.ahead = Some(by);
                }
                // The rest of the jump remains; a jump that was taken back is forgotten.
                ClockStep::Back(by) => {
                    state.back = state.back.max(Some(by));
                    let rest = state.jump.map(|jump| Jump { at: jump.at - by, by: jump.by - by });
                    state.jump = rest.filter(|rest| rest.by > TimeDelta::seconds(1));
                }
            }
            self.stepped.notify_one();
        }
        if state.last.is_none_or(|last| last.asked <= reading.asked) {
            state.last = Some(reading);
        }
        ClockState { jump: state.jump, is_retention_barred: state.is_retention_barred }
    }

    /// Waits until the clock is set.
    pub(super) async fn step(&self) -> ClockStep {
        loop {
            if let Some(step) = self.state().take_step() {
                return step;
            }
            self.stepped.notified().await;
        }
    }

    /// Retention is paused in the database, so it need not be barred here. A jump that is not delivered yet keeps it barred.
    pub(super) fn retention_waits(&self) {
        let mut state = self.state();
        state.is_retention_barred = state.ahead.is_some();
    }

    fn state(&self) -> MutexGuard<'_, WatchState> {
        self.state.lock()
    }
}

/// The step of the clock between two readings, if it is certain.
fn step_between(before: &ClockReading, after: &ClockReading) -> Option<ClockStep> {
    let advance = after.clock - before.clock;
    let (least, most) = (after.asked.since(before.heard), after.heard.since(before.asked));
    let tolerance = |time: TimeDelta| {
        let share = time.abs().to_std().unwrap_or_default() / TOLERANCE_SHARE;
        TimeDelta::from_std(TOLERANCE + share).unwrap_or(TimeDelta::MAX)
    };
    if advance > most + tolerance(most) {
        Some(ClockStep::Ahead(advance - most))
    } else if after.asked >= before.heard && advance < least - tolerance(least) {
        // Readings that overlap may arrive in either order.
        Some(ClockStep::Back(least - advance))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reading requested at one second and answered at another, with the clock ahead by some seconds.
    fn reading(asked: u64, heard: u64, ahead: i64) -> ClockReading {
        let moment = |seconds| Moment(Duration::from_secs(seconds));
        let clock = Time::UNIX_EPOCH + TimeDelta::seconds(1_700_000_000 + heard as i64 + ahead);
        ClockReading { asked: moment(asked), clock, heard: moment(heard) }
    }

    /// The steps found in some readings, in order.
    fn steps(readings: &[ClockReading]) -> Vec<Option<ClockStep>> {
        let watch = ClockWatch::default();
        let observe = |reading: &ClockReading| {
            watch.observe(*reading);
            watch.state().take_step()
        };
        readings.iter().map(observe).collect()
    }

    #[test]
    fn a_clock_that_is_set_is_found_and_slow_answers_are_no_step() {
        let ahead = |seconds| Some(ClockStep::Ahead(TimeDelta::seconds(seconds)));
        let back = |seconds| Some(ClockStep::Back(TimeDelta::seconds(seconds)));
        assert_eq!(steps(&[reading(0, 0, 0), reading(2, 2, 45), reading(4, 4, 45)]), [None, ahead(45), None]);
        assert_eq!(steps(&[reading(0, 0, 45), reading(2, 2, 0), reading(4, 4, 0)]), [None, back(45), None]);
        // The machine slept for an hour, and the clock went on.
        assert_eq!(steps(&[reading(0, 0, 0), reading(3_600, 3_600, 3)]), [None, None]);
        // The answer took ten seconds. The clock was read at the beginning or at the end of that time.
        assert_eq!(steps(&[reading(0, 10, -10), reading(11, 11, 0)]), [None, None]);
        assert_eq!(steps(&[reading(0, 0, 0), reading(1, 11, 0), reading(12, 12, 0)]), [None, None, None]);
        assert_eq!(steps(&[reading(0, 0, 0), reading(1, 11, 45)]), [None, ahead(45)]);
        // Readings that overlap, and arrive in the other order.
        assert_eq!(steps(&[reading(2, 4, 45), reading(1, 3, 0), reading(5, 5, 45)]), [None, None, None]);
    }

    #[test]
    fn jumps_add_up_and_bar_retention_until_it_waits() {
        let watch = ClockWatch::default();
        assert!(!watch.observe(reading(0, 0, 0)).is_retention_barred);
        let first = watch.observe(reading(2, 2, 45));
        assert_eq!(first.jump.unwrap().by, TimeDelta::seconds(45));
        let second = watch.observe(reading(4, 4, 100));
        assert_eq!(second.jump.unwrap().by, TimeDelta::seconds(100));
        assert!(second.is_retention_barred);
        watch.retention_waits();
        assert!(watch.observe(reading(5, 5, 100)).is_retention_barred, "nobody was told");
        assert!(matches!(watch.state().take_step(), Some(ClockStep::Ahead(_))));
        watch.retention_waits();
        assert!(!watch.observe(reading(6, 6, 100)).is_retention_barred);
        let later = watch.observe(reading(8_000, 8_000, 3_700));
        assert_eq!(later.jump.unwrap().by, TimeDelta::seconds(3_600), "the first are long over");
        let back = watch.observe(reading(8_002, 8_002, 3_100)).jump.unwrap();
        assert_eq!((back.by, back.at), (TimeDelta::seconds(3_000), later.jump.unwrap().at - TimeDelta::seconds(600)));
        assert_eq!(watch.observe(reading(8_004, 8_004, 100)).jump, None, "it was taken back");
    }
}
