//! What happened to jobs, counted over time: how many began and how they ended, how long they waited and ran.
//!
//! A [`Timeline`] follows one job from event to event and says what each adds. Batches follow jobs from where their rows
//! stand, and retention and `verify` from their first event: the same code, and so the same counts.

use std::time::Duration;

use chrono::{DateTime, TimeDelta};

use super::{
    clock::Time,
    event::{EventKind, JobEvent},
    job::Job,
    status::JobStatus,
};

/// Buckets for each doubling of a duration. The middle of one is within 2^(1/8) of all in it: 9.1 per cent.
const BUCKETS_PER_DOUBLING: f64 = 4.0;
/// What is shorter counts as nothing.
const SHORTEST: Duration = Duration::from_millis(1);
/// The last bucket takes all that is longer than 3,181 days.
const MAX_BUCKETS: usize = 154;

/// Durations by their size: `counts[0]` of those below a millisecond, then four buckets for each doubling.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram(Vec<i64>);

impl Histogram {
    /// With these counts, as [`Histogram::counts`] gives them.
    pub fn new(mut counts: Vec<i64>) -> Self {
        counts.truncate(counts.iter().rposition(|n| *n != 0).map_or(0, |last| last + 1));
        Self(counts)
    }

    /// The counts, up to the last that is not zero.
    pub fn counts(&self) -> &[i64] {
        &self.0
    }

    /// True if nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many durations are in it.
    pub fn total(&self) -> i64 {
        self.0.iter().sum()
    }

    /// Takes one more.
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

    /// Takes all of another.
    pub fn add_all(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine += theirs;
        }
    }

    /// The duration that this share (0 to 1) of all are no longer than: within 9.1 per cent, or a millisecond. `None` of
    /// nothing.
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

/// How many counts a [`Flow`] has beside its durations.
pub const FLOW_COUNTS: usize = 7;

/// What happened to some jobs within some time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flow {
    /// Jobs created.
    pub created: i64,
    /// Attempts begun.
    pub started: i64,
    /// Attempts that ended well.
    pub succeeded: i64,
    /// Attempts that failed, whether or not another followed.
    pub failed: i64,
    /// Times that a job was queued again after its end: by itself, or on request.
    pub retried: i64,
    /// Jobs canceled.
    pub canceled: i64,
    /// Attempts that were lost: their leases expired.
    pub lost: i64,
    /// From when a job was ready to when an attempt began.
    pub waits: Histogram,
    /// From when an attempt began to when it succeeded, failed or was canceled. One that is given back or lost is not counted.
    pub runs: Histogram,
}

impl Flow {
    /// The names of the counts, in the order of [`Flow::counts`].
    pub const NAMES: [&'static str; FLOW_COUNTS] =
        ["created", "started", "succeeded", "failed", "retried", "canceled", "lost"];

    /// The counts but for the durations.
    pub const fn counts(&self) -> [i64; FLOW_COUNTS] {
        [self.created, self.started, self.succeeded, self.failed, self.retried, self.canceled, self.lost]
    }

    /// With these counts, and no durations.
    pub fn of_counts([created, started, succeeded, failed, retried, canceled, lost]: [i64; FLOW_COUNTS]) -> Self {
        Self { created, started, succeeded, failed, retried, canceled, lost, ..Self::default() }
    }

    /// True if nothing happened.
    pub fn is_empty(&self) -> bool {
        self.counts() == [0; FLOW_COUNTS] && self.waits.is_empty() && self.runs.is_empty()
    }

    /// Takes what happened elsewhere, or at another time.
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

/// What a timeline needs to know of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Milestone {
    /// What happened.
    pub kind: EventKind,
    /// When.
    pub ts: Time,
    /// When it was written.
    pub recorded_at: Time,
    /// Whether it happened in the system from which the job was brought in.
    pub is_past: bool,
    /// For an event that leads to queued: the time before which the job is not to be worked on.
    pub scheduled_at: Option<Time>,
}

impl Milestone {
    /// What an event says of it.
    pub fn of(event: &JobEvent) -> Self {
        let JobEvent { kind, ts, recorded_at, is_past, scheduled_at, .. } = *event;
        Self { kind, ts, recorded_at, is_past, scheduled_at }
    }
}

/// Where one job stands in time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timeline {
    /// When its wait in the queue became, or becomes, ready to end.
    ready_at: Option<Time>,
    /// When the attempt began that is under way.
    attempt_started_at: Option<Time>,
}

impl Timeline {
    /// Where a job's row says that it stands.
    pub fn of(job: &Job) -> Self {
        let is_running = job.status == JobStatus::Running;
        Self { ready_at: Some(job.ready_at), attempt_started_at: job.attempt_started_at.filter(|_| is_running) }
    }

    /// True if it stands where a job's row says.
    pub fn is_of(&self, job: &Job) -> bool {
        match job.status {
            JobStatus::Queued => self.ready_at == Some(job.ready_at),
            JobStatus::Running => self.attempt_started_at == job.attempt_started_at,
            _ => true,
        }
    }

    /// Follows the job through its next event, and adds to the flow what it tells. What happened before it was written,
    /// in the system from which it was brought in, moves the job along and is not counted.
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
                    // A reporter may begin before the time.
                    flow.waits.add((event.ts - ready_at).to_std().unwrap_or_default());
                }
                self.attempt_started_at = Some(event.ts);
            }
            EventKind::Succeeded | EventKind::Failed | EventKind::Canceled => {
                if let Some(began) = self.attempt_started_at.take().filter(|_| is_own) {
                    flow.runs.add((event.ts - began).to_std().unwrap_or_default());
                }
            }
            EventKind::Imported => *self = Self { ready_at: Some(event.ts), attempt_started_at: None },
            EventKind::Progress | EventKind::CancelRequested | EventKind::DeadLettered => {}
        }
    }
}

/// How wide a bucket of the series is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Width {
    /// A minute; kept for a day and an hour at least.
    Minute,
    /// An hour; kept for a week and a day at least.
    Hour,
}

impl Width {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Minute, Self::Hour];

    /// Seconds.
    pub const fn seconds(self) -> i64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3_600,
        }
    }

    /// That in which a window of this length is told.
    pub fn of(window: TimeDelta) -> Self {
        if window <= Self::Minute.longest_window() { Self::Minute } else { Self::Hour }
    }

    /// The longest window that is told in buckets of this width.
    pub const fn longest_window(self) -> TimeDelta {
        match self {
            Self::Minute => TimeDelta::days(1),
            Self::Hour => TimeDelta::days(7),
        }
    }

    /// The first instant of the bucket that a time is in.
    pub fn start(self, time: Time) -> Time {
        let seconds = time.timestamp().div_euclid(self.seconds()) * self.seconds();
        DateTime::from_timestamp(seconds, 0).unwrap_or(time)
    }

    /// Buckets that begin before this may be forgotten once the log has come to a time.
    pub fn kept_since(self, time: Time) -> Time {
        let spare = match self {
            Self::Minute => TimeDelta::hours(1),
            Self::Hour => TimeDelta::days(1),
        };
        Self::Hour.start(time) - self.longest_window() - spare
    }
}

/// Where a window over the series begins, and which buckets make it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first instant: of a minute where the window is a day or shorter, else of an hour.
    pub since: Time,
    /// From here on by the hour, and before by the minute.
    pub hours_since: Time,
    /// The width in which it is told as a series.
    pub width: Width,
}

impl Window {
    /// The window of this length that ends now.
    pub fn ending_at(now: Time, length: TimeDelta) -> Self {
        let width = Width::of(length);
        let since = width.start(now - length);
        let hour = Width::Hour.start(since);
        let hours_since = if hour == since { since } else { hour + TimeDelta::hours(1) };
        Self { since, hours_since, width }
    }
}
