//! The state machine: the only place where a job changes.
//!
//! ```text
//!            create          claim, or report running           succeeded
//!   (none) ─────────▶ queued ─────────────────────────▶ running ──────────▶ succeeded
//!                     │ ▲  ▲                           │ │ │  ▲
//!              cancel │ │  └──── give back, lost ──────┘ │ │  └─ progress, cancel requested
//!                     │ │                                │ │
//!                     ▼ │ retry                          │ └──▶ canceled   (at once where nobody holds the job; else every
//!              canceled │                                ▼                  exit but success, after it was requested)
//!                       └────────────────────────────  failed              failed, run timed out, lost too often
//!                         by itself while the budget     │
//!                         lasts, or on request           └──▶ dead_letter   a budget of more than one attempt is used up
//! ```
//!
//! An attempt is lost when its lease expires; `max_lost_attempts` of them don't count as failures.
//! dead_letter and canceled lead back to queued on request, as failed does.
//! A job that is brought in from another system ([`Job::import`]) is where it was there.
//! Each arrow is exactly one event. A failure that is retried, or that uses the budget up, takes two arrows at once.
//! Checks run in this order: repetition of the same outcome, lease, etag, transition.

mod ask;
mod due;
mod hold;
mod import;
mod path;
mod reach;
mod redate;
mod report;

use std::{sync::Arc, time::Duration};

use thiserror::Error;

use self::path::{Detail, Path};
pub use self::{
    ask::{Cancel, Retry},
    due::{Jump, LEASE_EXPIRED, LONGEST_GRACE, Look, RUN_TIMEOUT},
    hold::{Abandon, Claim, Heartbeat, Renew},
    import::{Import, ImportOutcome, ImportRefusal, Mark, Past, PastKey, State},
    reach::{Reach, Target},
    report::{Ending, News, Outcome, Report, Step},
};
use super::{
    clock::Time,
    event::{EventKind, JobEvent},
    id::{JobId, OrgId},
    job::{Job, JobSpec},
    lease::LeaseSecret,
    status::JobStatus,
};

/// The place in the org's log at which a command is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// What the clock says, as it is: leases, waits and time-outs go by it, and it is when events happen.
    pub now: Time,
    /// When the events are written: never before the log's last one, even where the clock was set back since.
    pub recorded_at: Time,
    /// The `seq` of the next event.
    pub next_seq: i64,
    /// What nobody can know beforehand of leases that are granted.
    pub secret: LeaseSecret,
}

/// Something that is asked of an existing job.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A worker's report.
    Report(Report),
    /// What a worker says of a job whatever leads there.
    Reach(Reach),
    /// A worker takes the job.
    Claim(Claim),
    /// A worker goes on holding it.
    Heartbeat(Heartbeat),
    /// A worker takes again what it has taken: its first answer was lost.
    Renew(Renew),
    /// The worker that was given this lease never heard of it.
    Abandon(Abandon),
    /// Somebody asks for the job to end.
    Cancel(Cancel),
    /// Somebody asks for it to run again.
    Retry(Retry),
    /// Time has passed.
    Look(Look),
    /// The clock was ahead, by so much at most as far as is known, and was set back since.
    Redate(Duration),
}

/// What a command does: the job after it, and the events that say so.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The job after the command.
    pub job: Job,
    /// One for each arrow taken, numbered from the tick's `next_seq`.
    pub events: Vec<JobEvent>,
    /// Whether the job is another than before: also without an event, where a lease was extended or a wait has ended.
    pub is_changed: bool,
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransitionError {
    /// No arrow leads there.
    #[error("the job is {current}, and that is not possible from there")]
    InvalidTransition {
        /// Where the job stands.
        current: JobStatus,
    },
    /// The reporter's lease is not the job's.
    #[error(
        "the lease is lost: the job is not, or no longer, held under this lease token, or it is held and none was given"
    )]
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
            lost_attempts: 0,
            stage: None,
            progress: None,
            result_at: None,
            payload_recorded_at: None,
            last_error: None,
            cancel_requested: false,
            outcome: None,
            lease: None,
            lease_nonce: 0,
            retry_request: None,
            created_at: at.now,
            updated_at: at.now,
            started_at: None,
            attempt_started_at: None,
            finished_at: None,
            scheduled_at,
            ready_at: scheduled_at.map_or(at.now, |time| time.max(at.now)),
            due_at: None,
            created_seq: at.next_seq,
            last_job_seq: 0,
            last_seq: 0,
            last_recorded_at: at.recorded_at,
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
            Command::Reach(reach) => self.reach(reach, at),
            Command::Claim(claim) => self.claim(claim, at),
            Command::Heartbeat(heartbeat) => self.heartbeat(heartbeat, at),
            Command::Renew(renew) => self.renew(*renew, at),
            Command::Abandon(abandon) => Ok(self.abandon(*abandon, at)),
            Command::Cancel(cancel) => self.cancel(cancel, at),
            Command::Retry(retry) => self.retry(retry, at),
            Command::Look(look) => Ok(self.look(*look, at)),
            Command::Redate(by) => Ok(self.redate(*by, at)),
        }
    }

    fn unchanged(&self) -> Transition {
        Transition { job: self.clone(), events: Vec::new(), is_changed: false }
    }

    fn check_etag(&self, wanted: Option<&str>) -> Result<(), TransitionError> {
        let current = self.etag();
        match wanted {
            Some(etag) if etag != current => Err(TransitionError::EtagMismatch { current }),
            _ => Ok(()),
        }
    }
}
