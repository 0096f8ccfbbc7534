//! What happened to jobs over time: how many began, how they ended, how long they waited and ran.
//!
//! A [`Timeline`] follows one job from event to event and tells what each event adds. Batches start it at the job's
//! row, retention and `verify` at the first event. Both run the same code, so their counts agree.

use std::time::Duration;

use chrono::{DateTime, TimeDelta};

use super::{
    clock::Time,
    event::{EventKind, JobEvent},
    job::Job,
    status::JobStatus,
};

/// Buckets for each doubling of a duration. The middle of a bucket is within 2^(1/8), 9.1 per cent, of every duration
/// in it.
const BUCKETS_PER_DOUBLING: f64 = 4.0;
/// Shorter durations go into bucket 0.
const SHORTEST: Duration = Duration::from_millis(1);
/// The last bucket has all durations longer than 3,181 days.
const MAX_BUCKETS: usize = 154;

/// A histogram of durations: `counts[0]` counts those below a millisecond, then four buckets follow for each doubling.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram(Vec<i64>);

impl Histogram {
    /// A histogram with these counts, as [`Histogram::counts`] returns them.
    pub fn new(mut counts: Vec<i64>) -> Self {
        counts.truncate(counts.iter().rposition(|n| *n != 0).map_or(0, |last| last + 1));
        Self(counts)
    }

    /// The counts, up to the last one that is not zero.
    pub fn counts(&self) -> &[i64] {
        &self.0
    }

    /// True if the histogram is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of durations in the histogram.
    pub fn total(&self) -> i64 {
        self.0.iter().sum()
    }

    /// Adds one duration.
    pub fn add(&mut self, duration: Duration) {
        let bucket = if duration < SHORTEST {
            0
        } else {
            let doublings = (duration.as_secs_f64() / SHORTEST.as_secs_f64()).log2();
            (1 + (doublings * BUCKETS_PER_DOUBLING) as usize).min(MAX_BUCKETS - 1)
        };
        if self.0.len() <= bucket {
            self.0.resize(bucket + 1, 0);
        }
        self.0[bucket] += 1;
    }

    /// Adds all durations of another histogram.
    pub fn add_all(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine += theirs;
        }
    }

    /// The duration that this share (0 to 1) of all durations does not exceed, to within 9.1 per cent or a millisecond,
    /// whichever is more. `None` if the histogram is empty.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let rank = ((self.total() as f64 * share).ceil() as i64).max(1);
        let mut seen = 0;
        let bucket = self.0.iter().position(|n| {
            seen += n;
            seen >= rank
        })?;
        Some(match bucket.checked_sub(1) {
            None => SHORTEST / 2,
            Some(above) => {
                let middle = SHORTEST.as_micros() as f64 * ((above as f64 + 0.5) / BUCKETS_PER_DOUBLING).exp2();
                Duration::from_micros(middle.round() as u64)
            }
        })
    }
}

/// The number of counts in a [`Flow`], without its histograms.
pub const FLOW_COUNTS: usize = 7;

/// What happened to some jobs in some period.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flow {
    /// Jobs created.
    pub created: i64,
    /// Attempts started.
    pub started: i64,
    /// Attempts that succeeded.
    pub succeeded: i64,
    /// Attempts that failed, whether or not another followed.
    pub failed: i64,
    /// How often jobs were queued again after they had ended: by a retry or a redrive.
    pub retried: i64,
    /// Jobs canceled.
    pub canceled: i64,
    /// Attempts that were lost: their leases expired.
    pub lost: i64,
    /// From the time a job was ready to the start of its attempt.
    pub waits: Histogram,
    /// From the start of an attempt to its success, failure or cancellation. Released and lost attempts don't count.
    pub runs: Histogram,
}

impl Flow {
    /// The names of the counts, in the order of [`Flow::counts`].
    pub const NAMES: [&'static str; FLOW_COUNTS] =
        ["created", "started", "succeeded", "failed", "retried", "canceled", "lost"];

    /// The counts, without the histograms.
    pub const fn counts(&self) -> [i64; FLOW_COUNTS] {
        [self.created, self.started, self.succeeded, self.failed, self.retried, self.canceled, self.lost]
    }

    /// A flow with these counts and empty histograms.
    pub fn of_counts([created, started, succeeded, failed, retried, canceled, lost]: [i64; FLOW_COUNTS]) -> Self {
        Self { created, started, succeeded, failed, retried, canceled, lost, ..Self::default() }
    }

    /// True if nothing happened.
    pub fn is_empty(&self) -> bool {
        self.counts() == [0; FLOW_COUNTS] && self.waits.is_empty() && self.runs.is_empty()
    }

    /// Adds another flow.
    pub fn add_all(&mut self, other: &Self) {
        self.created += other.created;
        self.started += other.started;
        self.succeeded += other.succeeded;
        self.failed += other.failed;
        self.retried += other.retried;
        self.canceled += other.canceled;
        self.lost += other.lost;
        self.waits.add_all(&other.waits);
        self.runs.add_all(&other.runs);
    }
}

/// The parts of an event that a [`Timeline`] needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Milestone {
    /// What happened.
    pub kind: EventKind,
    /// When it happened.
    pub ts: Time,
    /// When the event was written.
    pub recorded_at: Time,
    /// True if it happened in the system that the job was imported from.
    pub is_past: bool,
    /// On an event that leads to queued: the earliest time for the next attempt.
    pub scheduled_at: Option<Time>,
}

impl Milestone {
    /// The milestone of an event.
    pub fn of(event: &JobEvent) -> Self {
        let JobEvent { kind, ts, recorded_at, is_past, scheduled_at, .. } = *event;
        Self { kind, ts, recorded_at, is_past, scheduled_at }
    }
}

/// Where one job stands in time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timeline {
    /// When the job becomes or became ready.
    ready_at: Option<Time>,
    /// When the current attempt started.
    attempt_started_at: Option<Time>,
}

impl Timeline {
    /// The timeline at a job's row.
    pub fn of(job: &Job) -> Self {
        let is_running = job.status == JobStatus::Running;
        Self { ready_at: Some(job.ready_at), attempt_started_at: job.attempt_started_at.filter(|_| is_running) }
    }

    /// True if the timeline agrees with a job's row.
    pub fn is_of(&self, job: &Job) -> bool {
        match job.status {
            JobStatus::Queued => self.ready_at == Some(job.ready_at),
            JobStatus::Running => self.attempt_started_at == job.attempt_started_at,
            _ => true,
        }
    }

    /// Follows the job through its next event, and adds what the event counts to the flow. Past events of imported jobs
    /// move the timeline along but are not counted.
    pub fn follow(&mut self, event: &Milestone, flow: &mut Flow) {
        let is_own = !event.is_past && event.kind != EventKind::Imported;
        let own = i64::from(is_own);
        match event.kind {
            EventKind::Created => flow.created += own,
            EventKind::Claimed | EventKind::Started => flow.started += own,
            EventKind::Succeeded => flow.succeeded += own,
            EventKind::Failed => flow.failed += own,
            EventKind::RetryScheduled | EventKind::Requeued => flow.retried += own,
            EventKind::Canceled => flow.canceled += own,
            EventKind::Lost => flow.lost += own,
            EventKind::Progress
            | EventKind::Released
            | EventKind::CancelRequested
            | EventKind::DeadLettered
            | EventKind::Edited
            | EventKind::Erased
            | EventKind::Imported => {}
        }
        match event.kind {
            EventKind::Created
            | EventKind::RetryScheduled
            | EventKind::Requeued
            | EventKind::Released
            | EventKind::Lost => {
                self.ready_at = Some(event.scheduled_at.map_or(event.ts, |time| time.max(event.ts)));
                self.attempt_started_at = None;
            }
            EventKind::Claimed | EventKind::Started => {
                if let Some(ready_at) = self.ready_at.filter(|_| is_own) {
                    // A reporter may start a job before it is ready: the wait is then zero.
                    flow.waits.add((event.ts - ready_at).to_std().unwrap_or_default());
                }
                self.attempt_started_at = Some(event.ts);
            }
            EventKind::Succeeded | EventKind::Failed | EventKind::Canceled => {
                if let Some(began) = self.attempt_started_at.take().filter(|_| is_own) {
                    flow.runs.add((event.ts - began).to_std().unwrap_or_default());
                }
            }
            EventKind::Edited => {
                if let Some(time) = event.scheduled_at {
                    self.ready_at = Some(time.max(event.ts));
                }
            }
            EventKind::Imported => *self = Self { ready_at: Some(event.ts), attempt_started_at: None },
            EventKind::Progress | EventKind::CancelRequested | EventKind::DeadLettered | EventKind::Erased => {}
        }
    }
}

/// The width of a bucket of the series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Width {
    /// One minute. Buckets are kept for a day and an hour at least.
    Minute,
    /// One hour. Buckets are kept for a week and a day at least.
    Hour,
}

impl Width {
    /// Both widths.
    pub const ALL: [Self; 2] = [Self::Minute, Self::Hour];

    /// The width in seconds.
    pub const fn seconds(self) -> i64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3_600,
        }
    }

    /// The width in which a series over a window of this length is returned.
    pub fn of(window: TimeDelta) -> Self {
        if window <= Self::Minute.longest_window() { Self::Minute } else { Self::Hour }
    }

    /// The longest window whose series is returned in buckets of this width.
    pub const fn longest_window(self) -> TimeDelta {
        match self {
            Self::Minute => TimeDelta::days(1),
            Self::Hour => TimeDelta::days(7),
        }
    }

    /// The start of the bucket that contains a time.
    pub fn start(self, time: Time) -> Time {
        let seconds = time.timestamp().div_euclid(self.seconds()) * self.seconds();
        DateTime::from_timestamp(seconds, 0).unwrap_or(time)
    }

    /// Once the log has reached `time`, buckets that start before this may be removed.
    pub fn kept_since(self, time: Time) -> Time {
        let spare = match self {
            Self::Minute => TimeDelta::hours(1),
            Self::Hour => TimeDelta::days(1),
        };
        Self::Hour.start(time) - self.longest_window() - spare
    }
}

/// A window over the series: where it begins, and which buckets cover it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The start of the window: a whole minute if the window is a day or shorter, else a whole hour.
    pub since: Time,
    /// Hour buckets cover the window from here on, minute buckets before.
    pub hours_since: Time,
    /// The width in which the series over this window is returned.
    pub width: Width,
}

impl Window {
    /// The window of this length that ends at `now`.
    pub fn ending_at(now: Time, length: TimeDelta) -> Self {
        let width = Width::of(length);
        let since = width.start(now - length);
        let hour = Width::Hour.start(since);
        let hours_since = if hour == since { since } else { hour + TimeDelta::hours(1) };
        Self { since, hours_since, width }
    }
}
