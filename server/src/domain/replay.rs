//! Folds a job's events into its state. A job's row must equal this fold.
//!
//! An IMPORTED event sets the state regardless of the events before it. Past events of an imported job are in the log as
//! the other system had them, and need not chain.

use std::sync::Arc;

use thiserror::Error;

use super::{
    clock::Time,
    event::{EventKind, JobError, JobEvent, Position},
    job::Job,
    status::JobStatus,
};

/// The state of a job by its events. What events don't carry (payload, labels, the bounds on attempts) is left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// The current status.
    pub status: JobStatus,
    /// How often the job has entered running.
    pub attempt: i32,
    /// Failures since the job was created or redriven; for imported jobs since the import, with a failure there as the
    /// first.
    pub failures: i32,
    /// Lost attempts since then that did not count as failures.
    pub lost_attempts: i32,
    /// What the worker is doing, in its own words.
    pub stage: Option<Arc<str>>,
    /// Progress of the attempt, in per cent.
    pub progress: Option<u8>,
    /// The position of the event that has the result.
    pub result_at: Option<Position>,
    /// The last failure or lost attempt.
    pub last_error: Option<JobError>,
    /// When the first event happened; for imported jobs, when the other system created the job.
    pub created_at: Time,
    /// When the last event happened.
    pub updated_at: Time,
    /// When the job first entered running.
    pub started_at: Option<Time>,
    /// When the job reached its terminal status.
    pub finished_at: Option<Time>,
    /// The requested end of the current or last wait in the queue.
    pub scheduled_at: Option<Time>,
    /// `job_seq` of the last event.
    pub last_job_seq: i64,
    /// `seq` of the last event.
    pub last_seq: i64,
    /// `recorded_at` of the last event.
    pub last_recorded_at: Time,
}

/// Why events are not the whole history of a job.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReplayError {
    /// There are no events.
    #[error("no events")]
    Empty,
    /// `job_seq` is not 1, 2, 3, …
    #[error("event {seq} has job_seq {found}, not {expected}")]
    NotDense {
        /// `seq` of the event.
        seq: i64,
        /// Its `job_seq`.
        found: i64,
        /// The `job_seq` that would follow the event before.
        expected: i64,
    },
    /// An event does not begin in the status where the one before ended, or goes back in the log, in time or in attempts.
    #[error("event {seq} does not follow from the one before it")]
    NotChained {
        /// `seq` of the event.
        seq: i64,
    },
}

impl Replay {
    /// The same state, as the row has it.
    pub fn of(job: &Job) -> Self {
        Self {
            status: job.status,
            attempt: job.attempt,
            failures: job.failures,
            lost_attempts: job.lost_attempts,
            stage: job.stage.clone(),
            progress: job.progress,
            result_at: job.result_at,
            last_error: job.last_error.clone(),
            created_at: job.created_at,
            updated_at: job.updated_at,
            started_at: job.started_at,
            finished_at: job.finished_at,
            scheduled_at: job.scheduled_at,
            last_job_seq: job.last_job_seq,
            last_seq: job.last_seq,
            last_recorded_at: job.last_recorded_at,
        }
    }

    /// Folds all events of one job, in order.
    ///
    /// # Errors
    ///
    /// If they are not the whole history of one job.
    pub fn fold<'a>(events: impl IntoIterator<Item = &'a JobEvent>) -> Result<Self, ReplayError> {
        let mut fold = Fold::default();
        for event in events {
            fold.follow(event);
        }
        fold.outcome().cloned()
    }

    /// The state before a job's first event.
    fn before(first: &JobEvent) -> Self {
        Self {
            status: first.next_status,
            attempt: 0,
            failures: 0,
            lost_attempts: 0,
            stage: None,
            progress: None,
            result_at: None,
            last_error: None,
            created_at: first.ts,
            updated_at: first.ts,
            started_at: None,
            finished_at: None,
            scheduled_at: None,
            last_job_seq: 0,
            last_seq: 0,
            last_recorded_at: first.recorded_at,
        }
    }

    /// True if the event begins in the job's status, and goes back neither in the log nor in time nor in attempts.
    fn leads_to(&self, event: &JobEvent) -> bool {
        let forward =
            event.seq > self.last_seq && event.recorded_at >= self.last_recorded_at && event.attempt >= self.attempt;
        forward && event.prev_status == (self.last_job_seq > 0).then_some(self.status)
    }

    /// Counts the attempt that the event ends, if it ends one, as failed or lost.
    fn count_attempt(&mut self, event: &JobEvent) {
        match event.kind {
            EventKind::Failed => self.failures += 1,
            EventKind::Lost => self.lost_attempts += 1,
            EventKind::Requeued => (self.failures, self.lost_attempts) = (0, 0),
            EventKind::Imported => {
                let has_failed = matches!(event.next_status, JobStatus::Failed | JobStatus::DeadLetter);
                (self.failures, self.lost_attempts) = (i32::from(has_failed), 0);
            }
            EventKind::Created
            | EventKind::Claimed
            | EventKind::Started
            | EventKind::Progress
            | EventKind::Succeeded
            | EventKind::RetryScheduled
            | EventKind::Released
            | EventKind::CancelRequested
            | EventKind::Canceled
            | EventKind::DeadLettered
            | EventKind::Edited
            | EventKind::Erased => {}
        }
    }

    fn take(&mut self, event: &JobEvent) {
        if let Some(origin) = &event.origin {
            self.created_at = origin.created_at;
            self.started_at = origin.started_at;
            self.scheduled_at = None;
            self.result_at = None;
            self.last_error = None;
        }
        self.status = event.next_status;
        self.attempt = event.attempt;
        self.count_attempt(event);
        self.stage.clone_from(&event.stage);
        self.progress = event.progress;
        if matches!(event.kind, EventKind::Claimed | EventKind::Started) {
            self.started_at.get_or_insert(event.ts);
            self.result_at = None;
        }
        if event.result.is_some() {
            self.result_at = Some(Position { seq: event.seq, recorded_at: event.recorded_at });
        }
        if event.error.is_some() {
            self.last_error.clone_from(&event.error);
        }
        if event.kind == EventKind::Erased {
            // What earlier events say of these is gone.
            (self.result_at, self.last_error) = (None, None);
        } else {
            let finished_at = event.origin.as_ref().map_or(Some(event.ts), |origin| origin.finished_at);
            self.finished_at = finished_at.filter(|_| event.next_status.is_terminal());
        }
        if event.next_status == JobStatus::Queued && (event.kind != EventKind::Edited || event.scheduled_at.is_some()) {
            self.scheduled_at = event.scheduled_at;
        }
        self.updated_at = event.ts;
        self.last_job_seq = event.job_seq;
        self.last_seq = event.seq;
        self.last_recorded_at = event.recorded_at;
    }
}

/// A fold in progress, for histories that are read in parts.
#[derive(Debug, Default)]
pub struct Fold {
    state: Option<Replay>,
    /// The first defect of the history. An IMPORTED event clears [`ReplayError::NotChained`], but not
    /// [`ReplayError::NotDense`].
    error: Option<ReplayError>,
}

impl Fold {
    /// Folds in the next event.
    pub fn follow(&mut self, event: &JobEvent) {
        if matches!(self.error, Some(ReplayError::NotDense { .. })) {
            return;
        }
        let state = self.state.get_or_insert_with(|| Replay::before(event));
        let expected = state.last_job_seq + 1;
        if event.job_seq != expected {
            self.error = Some(ReplayError::NotDense { seq: event.seq, found: event.job_seq, expected });
            return;
        }
        if event.kind == EventKind::Imported {
            let is_forward = event.seq > state.last_seq && event.origin.is_some();
            self.error = (!is_forward).then_some(ReplayError::NotChained { seq: event.seq });
        } else if !state.leads_to(event) {
            self.error.get_or_insert(ReplayError::NotChained { seq: event.seq });
        }
        state.take(event);
    }

    /// The state after the events so far.
    ///
    /// # Errors
    ///
    /// If they are not the whole history of one job so far.
    pub fn outcome(&self) -> Result<&Replay, ReplayError> {
        match (&self.error, &self.state) {
            (Some(error), _) => Err(error.clone()),
            (None, None) => Err(ReplayError::Empty),
            (None, Some(state)) => Ok(state),
        }
    }
}
