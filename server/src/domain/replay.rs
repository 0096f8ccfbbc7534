//! A job's row is the fold of its events: this is the fold.

use std::sync::Arc;

use thiserror::Error;

use super::{
    clock::Time,
    event::{EventKind, JobError, JobEvent, Position},
    job::Job,
    status::JobStatus,
};

/// What a job's events say of it. What they don't carry (payload, labels, budget) is left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// As in [`Job`].
    pub status: JobStatus,
    /// As in [`Job`].
    pub attempt: i32,
    /// As in [`Job`].
    pub stage: Option<Arc<str>>,
    /// As in [`Job`].
    pub progress: Option<u8>,
    /// As in [`Job`].
    pub result_at: Option<Position>,
    /// As in [`Job`].
    pub last_error: Option<JobError>,
    /// As in [`Job`].
    pub created_at: Time,
    /// As in [`Job`].
    pub updated_at: Time,
    /// As in [`Job`].
    pub started_at: Option<Time>,
    /// As in [`Job`].
    pub finished_at: Option<Time>,
    /// As in [`Job`].
    pub scheduled_at: Option<Time>,
    /// As in [`Job`].
    pub last_job_seq: i64,
    /// As in [`Job`].
    pub last_seq: i64,
    /// As in [`Job`].
    pub last_recorded_at: Time,
}

/// Why events are not the history of a job.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReplayError {
    /// There are none.
    #[error("no events")]
    Empty,
    /// `job_seq` is not 1, 2, 3, …
    #[error("event {seq} has job_seq {found}, not {expected}")]
    NotDense {
        /// The event.
        seq: i64,
        /// What it says.
        found: i64,
        /// What comes after its predecessor.
        expected: i64,
    },
    /// An event does not begin where its predecessor ended, or goes back in time.
    #[error("event {seq} does not follow from the one before it")]
    NotChained {
        /// The event.
        seq: i64,
    },
}

impl Replay {
    /// What the row says of the same.
    pub fn of(job: &Job) -> Self {
        Self {
            status: job.status,
            attempt: job.attempt,
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

    /// Folds one job's events, in order.
    ///
    /// # Errors
    ///
    /// If they are not the whole history of one job.
    pub fn fold<'a>(events: impl IntoIterator<Item = &'a JobEvent>) -> Result<Self, ReplayError> {
        let mut events = events.into_iter();
        let mut state = Self::begin(events.next().ok_or(ReplayError::Empty)?)?;
        for event in events {
            state.follow(event)?;
        }
        Ok(state)
    }

    /// Begins with a job's first event.
    ///
    /// # Errors
    ///
    /// If it is not the first of a job.
    pub fn begin(first: &JobEvent) -> Result<Self, ReplayError> {
        if first.job_seq != 1 {
            return Err(ReplayError::NotDense { seq: first.seq, found: first.job_seq, expected: 1 });
        }
        if first.prev_status.is_some() {
            return Err(ReplayError::NotChained { seq: first.seq });
        }
        let mut state = Self {
            status: first.next_status,
            attempt: 0,
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
        };
        state.take(first);
        Ok(state)
    }

    /// Goes on with the next.
    ///
    /// # Errors
    ///
    /// If it does not follow.
    pub fn follow(&mut self, event: &JobEvent) -> Result<(), ReplayError> {
        if event.job_seq != self.last_job_seq + 1 {
            let expected = self.last_job_seq + 1;
            return Err(ReplayError::NotDense { seq: event.seq, found: event.job_seq, expected });
        }
        let forward = event.seq > self.last_seq && event.ts >= self.updated_at && event.attempt >= self.attempt;
        if event.prev_status != Some(self.status) || !forward {
            return Err(ReplayError::NotChained { seq: event.seq });
        }
        self.take(event);
        Ok(())
    }

    fn take(&mut self, event: &JobEvent) {
        self.status = event.next_status;
        self.attempt = event.attempt;
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
        self.finished_at = event.next_status.is_terminal().then_some(event.ts);
        if event.next_status == JobStatus::Queued {
            self.scheduled_at = event.scheduled_at;
        }
        self.updated_at = event.ts;
        self.last_job_seq = event.job_seq;
        self.last_seq = event.seq;
        self.last_recorded_at = event.recorded_at;
    }
}
