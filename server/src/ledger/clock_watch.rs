//! Whether the database's clock goes as time does.
//!
//! Each reading of it is held against this machine's own count of time, which nobody sets and which goes on while the machine
//! sleeps. A reading lies between the moment at which it was asked for and that at which it was heard, so what is found is
//! certain, however long answers take.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::TimeDelta;
use tokio::sync::Notify;

use crate::domain::{clock::Time, transition::Jump};

/// What clocks may differ by without having been set: a second, and a thousandth of the time since.
const TOLERANCE: Duration = Duration::from_secs(1);
const TOLERANCE_SHARE: u32 = 1_000;
/// Jumps within this time count as one.
const ONE_JUMP: TimeDelta = TimeDelta::hours(1);

/// A moment by this machine's own count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// This one.
    #[cfg(target_os = "linux")]
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32))
    }

    /// This one. Here the time that the machine sleeps is not in it, and looks like a jump.
    #[cfg(not(target_os = "linux"))]
    pub fn now() -> Self {
        static FIRST: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);
        Self(FIRST.elapsed())
    }

    /// From the other to this one; below zero if that is later.
    fn since(self, other: Self) -> TimeDelta {
        let signed = |time: Duration| TimeDelta::from_std(time).unwrap_or(TimeDelta::MAX);
        signed(self.0) - signed(other.0)
    }
}

/// What the database's clock said, and between which moments.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// When it was asked for.
    pub asked: Moment,
    /// What it said.
    pub clock: Time,
    /// When the answer had come.
    pub heard: Moment,
}

/// Somebody has set the database's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockStep {
    /// It jumped ahead by so much.
    Ahead(TimeDelta),
    /// It was set back by so much.
    Back(TimeDelta),
}

/// See the module.
#[derive(Default)]
pub(super) struct ClockWatch {
    state: Mutex<State>,
    stepped: Notify,
}

#[derive(Default)]
struct State {
    last: Option<Reading>,
    jump: Option<Jump>,
    /// Steps each way that nobody was told of.
    ahead: Option<TimeDelta>,
    back: Option<TimeDelta>,
    /// It jumped ahead, and nobody has seen to it that retention waits.
    is_retention_barred: bool,
}

impl State {
    /// Those ahead first: until somebody is told of them retention is barred.
    fn take_step(&mut self) -> Option<ClockStep> {
        let ahead = self.ahead.take().map(ClockStep::Ahead);
        ahead.or_else(|| self.back.take().map(ClockStep::Back))
    }
}

/// What a batch has to know of the clock beside what it says.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Trust {
    /// The last jump ahead.
    pub(super) jump: Option<Jump>,
    /// Nothing may be removed for being old.
    pub(super) is_retention_barred: bool,
}

impl ClockWatch {
    /// Takes note of a reading.
    pub(super) fn observe(&self, reading: Reading) -> Trust {
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
                // What is left of the jump; of one that was taken back, nothing.
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
        Trust { jump: state.jump, is_retention_barred: state.is_retention_barred }
    }

    /// Waits until somebody sets the clock.
    pub(super) async fn step(&self) -> ClockStep {
        loop {
            if let Some(step) = self.state().take_step() {
                return step;
            }
            self.stepped.notified().await;
        }
    }

    /// Retention waits wherever it is asked whether it may begin; until the next jump nothing has to bar it here.
    pub(super) fn retention_waits(&self) {
        let mut state = self.state();
        state.is_retention_barred = state.ahead.is_some();
    }

    /// The state stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the clock was set between two readings, if that is certain.
fn step_between(before: &Reading, after: &Reading) -> Option<ClockStep> {
    let advance = after.clock - before.clock;
    let (least, most) = (after.asked.since(before.heard), after.heard.since(before.asked));
    let tolerance = |time: TimeDelta| {
        let share = time.abs().to_std().unwrap_or_default() / TOLERANCE_SHARE;
        TimeDelta::from_std(TOLERANCE + share).unwrap_or(TimeDelta::MAX)
    };
    if advance > most + tolerance(most) {
        Some(ClockStep::Ahead(advance - most))
    } else if after.asked >= before.heard && advance < least - tolerance(least) {
        // Of two that overlap the first may be heard of last.
        Some(ClockStep::Back(least - advance))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asked at one second, answered at another, with the clock so many seconds ahead.
    fn reading(asked: u64, heard: u64, ahead: i64) -> Reading {
        let moment = |seconds| Moment(Duration::from_secs(seconds));
        let clock = Time::UNIX_EPOCH + TimeDelta::seconds(1_700_000_000 + heard as i64 + ahead);
        Reading { asked: moment(asked), clock, heard: moment(heard) }
    }

    /// What is found of some readings, one after the other.
    fn steps(readings: &[Reading]) -> Vec<Option<ClockStep>> {
        let watch = ClockWatch::default();
        let observe = |reading: &Reading| {
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
        // Asleep for an hour, as the clock was not.
        assert_eq!(steps(&[reading(0, 0, 0), reading(3_600, 3_600, 3)]), [None, None]);
        // The answer took ten seconds, at whichever end of them the clock was read.
        assert_eq!(steps(&[reading(0, 10, -10), reading(11, 11, 0)]), [None, None]);
        assert_eq!(steps(&[reading(0, 0, 0), reading(1, 11, 0), reading(12, 12, 0)]), [None, None, None]);
        assert_eq!(steps(&[reading(0, 0, 0), reading(1, 11, 45)]), [None, ahead(45)]);
        // Readings that overlap, and are heard of in another order.
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
