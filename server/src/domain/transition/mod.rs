//! The state machine: the only place where a job changes.
//!
//! ```text
//!            create                 report running             succeeded
//!   (none) ─────────▶ queued ──────────────────────▶ running ─────────────▶ succeeded
//!                      ▲  ▲                          │ │ │ ▲
//!                      │  └──────── give back ───────┘ │ │ └─ progress
//!                      │                               │ │
//!                      │ retry       failed            │ └──▶ canceled   (every exit but success,
//!                      └────────── failed ◀────────────┘                  after cancel was requested)
//!                                    │ budget of more than one attempt used up
//!                                    └──▶ dead_letter
//! ```
//!
//! Each arrow is exactly one event. A failure that is retried, or that uses the budget up, takes two arrows at once.
//! Checks run in this order: repetition of the same outcome, lease, etag, transition.

mod path;
mod report;

use std::sync::Arc;

use thiserror::Error;

use self::path::{Detail, Path};
pub use self::report::{Ending, Outcome, Report, Step};
use super::{
    clock::Time,
    event::{EventKind, JobEvent},
    id::{JobId, OrgId},
    job::{Job, JobSpec},
    status::JobStatus,
};

/// The place in the org's log at which a command is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// The time of the batch, never before that of the log's last event.
    pub now: Time,
    /// The `seq` of the next event.
    pub next_seq: i64,
}

/// Something that is asked of an existing job.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A worker's report.
    Report(Report),
}

/// What a command does: the job after it, and the events that say so. No events: nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The job after the command.
    pub job: Job,
    /// One for each arrow taken, numbered from the tick's `next_seq`.
    pub events: Vec<JobEvent>,
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransitionError {
    /// No arrow leads there.
    #[error("the job is {current}: no such report leads on from there")]
    InvalidTransition {
        /// Where the job stands.
        current: JobStatus,
    },
    /// The reporter's lease is not the job's.
    #[error("the lease is lost: the job is not held under this lease token")]
    LeaseLost,
    /// The job has changed since.
    #[error("the job has changed: its etag is {current}")]
    EtagMismatch {
        /// The job's etag.
        current: String,
    },
}

impl Job {
    /// Queues a new job.
    pub fn create(id: JobId, org_id: OrgId, spec: Arc<JobSpec>, scheduled_at: Option<Time>, at: Tick) -> Transition {
        let actor = Arc::clone(&spec.requested_by);
        let job = Self {
            id,
            org_id,
            spec,
            status: JobStatus::Queued,
            attempt: 0,
            failures: 0,
            stage: None,
            progress: None,
            result_at: None,
            last_error: None,
            cancel_requested: false,
            outcome: None,
            created_at: at.now,
            updated_at: at.now,
            started_at: None,
            attempt_started_at: None,
            finished_at: None,
            scheduled_at,
            ready_at: scheduled_at.map_or(at.now, |time| time.max(at.now)),
            last_job_seq: 0,
            last_seq: 0,
            last_recorded_at: at.now,
        };
        let mut path = Path::new(&job, &actor, at);
        path.take(EventKind::Created, JobStatus::Queued, Detail { scheduled_at, ..Detail::default() });
        path.events[0].prev_status = None;
        path.finish()
    }

    /// Decides one command. Pure: the same job, command and tick give the same answer.
    ///
    /// # Errors
    ///
    /// If the job must not change in this way; it then stays as it is.
    pub fn apply(&self, command: &Command, at: Tick) -> Result<Transition, TransitionError> {
        match command {
            Command::Report(report) => self.report(report, at),
        }
    }
}
