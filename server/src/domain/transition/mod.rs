//! The state machine: the only place where a job changes.
//!
//! ```text
//!            create          claim, or report running           succeeded
//!   (none) ─────────▶ queued ─────────────────────────▶ running ──────────▶ succeeded
//!                     │ ▲  ▲                           │ │ │  ▲
//!              cancel │ │  └──── give back, lost ──────┘ │ │  └─ progress, cancel requested
//!                     │ │                                │ │
//!                     ▼ │ retry                          │ └──▶ canceled   (at once without a lease; else by every exit
//!              canceled │                                ▼                  but success, once it was requested)
//!                       └────────────────────────────  failed              failed, run timed out, lost too often
//!                         by itself while the budget     │
//!                         lasts, or on request           └──▶ dead_letter   a budget of more than one attempt is used up
//! ```
//!
//! While a job is queued, what its creator asked for may be edited, which leads from queued to queued. Once it has finished, it may
//! be erased, which leads from its status to the same and ends what can happen to it.
//! An attempt is lost when its lease expires; up to `max_lost_attempts` lost attempts don't count as failures. A redrive
//! leads from dead_letter and canceled back to queued, as it does from failed. An imported job ([`Job::import`]) starts in
//! the status that it has in the other system. Each arrow is exactly one event. A failure that is retried, or that uses the
//! budget up, takes two arrows at once. A command is checked in this order: repetition of the same outcome, lease, etag,
//! transition.

mod builder;
mod cancel_redrive;
mod edit;
mod erase;
mod lease;
mod legacy;
mod redate;
mod report;
mod sweep;

use std::{sync::Arc, time::Duration};

use thiserror::Error;

use self::builder::{Detail, Path};
pub use self::{
    cancel_redrive::{Cancel, Retry},
    edit::{Edit, FoundPayload},
    erase::Erase,
    lease::{Claim, GiveBack, Heartbeat, Redeliver},
    legacy::{Import, ImportOutcome, ImportRefusal, ImportedState, LegacyReport, Mark, Past, PastKey, Target},
    report::{Ending, News, Outcome, Report, Step},
    sweep::{Jump, LEASE_EXPIRED, LONGEST_GRACE, RUN_TIMEOUT, Sweep},
};
use super::{
    clock::Time,
    event::{EventKind, JobEvent},
    id::{JobId, OrgId},
    job::{Job, JobSpec},
    lease::LeaseSecret,
    status::JobStatus,
};

/// Time and position at which a command is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// The clock, unadjusted. Leases, waits and timeouts go by it, and events happen at it.
    pub now: Time,
    /// When the events are written. Never before the log's last event, even if the clock was set back since.
    pub recorded_at: Time,
    /// The `seq` of the next event.
    pub next_seq: i64,
    /// The batch's secret, from which the nonces of new leases are derived.
    pub secret: LeaseSecret,
}

/// A command on an existing job.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// A worker's report.
    Report(Report),
    /// A report of an old worker, which names a status without regard to transitions.
    LegacyReport(LegacyReport),
    /// A worker claims the job.
    Claim(Claim),
    /// A worker extends its lease.
    Heartbeat(Heartbeat),
    /// A worker repeats its claim because it did not get the first answer.
    Redeliver(Redeliver),
    /// The answer with this lease was not delivered: the job is given back.
    GiveBack(GiveBack),
    /// Somebody asks for the job to be canceled.
    Cancel(Cancel),
    /// Somebody redrives the job.
    Retry(Retry),
    /// Somebody changes what the creator asked for.
    Edit(Box<Edit>),
    /// Somebody blanks the job for good.
    Erase(Erase),
    /// A sweep handles what is due.
    Sweep(Sweep),
    /// The clock was set back after it had been ahead, by at most this much as far as known.
    Redate(Duration),
}

/// The effect of a command: the changed job, and the events of the change.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The job after the command.
    pub job: Job,
    /// One event for each arrow, numbered from the tick's `next_seq`.
    pub events: Vec<JobEvent>,
    /// True if the job differs from before. Without an event, that is an extended lease, a wait that ended or a changed due
    /// time.
    pub is_changed: bool,
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransitionError {
    /// No arrow leads from the job's status to the wanted one.
    #[error("the job is {current}; this status does not allow the operation")]
    InvalidTransition {
        /// The job's status.
        current: JobStatus,
    },
    /// The lease token is not that of the job's current lease, or it is missing.
    #[error("the lease is lost: the lease token is missing, or is not the token of the job's current lease")]
    LeaseLost,
    /// The job was erased: nothing can run again.
    #[error("the job was erased")]
    Erased {
        /// The job's status.
        current: JobStatus,
    },
    /// The job has changed since its payload was read for an edit.
    #[error("the job changes faster than its payload can be compared")]
    PayloadOutdated,
    /// The job has changed since the caller read it.
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
            erased_at: None,
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
    /// If the command is not allowed on this job; the job then stays as it is.
    pub fn apply(&self, command: &Command, at: Tick) -> Result<Transition, TransitionError> {
        match command {
            Command::Retry(_) | Command::LegacyReport(_) if self.erased_at.is_some() => {
                Err(TransitionError::Erased { current: self.status })
            }
            Command::Report(report) => self.report(report, at),
            Command::LegacyReport(report) => self.legacy_report(report, at),
            Command::Claim(claim) => self.claim(claim, at),
            Command::Heartbeat(heartbeat) => self.heartbeat(heartbeat, at),
            Command::Redeliver(redeliver) => self.redeliver(*redeliver, at),
            Command::GiveBack(given) => Ok(self.give_back(*given, at)),
            Command::Cancel(cancel) => self.cancel(cancel, at),
            Command::Retry(retry) => self.retry(retry, at),
            Command::Edit(edit) => self.edit(edit, at),
            Command::Erase(erase) => self.erase(erase, at),
            Command::Sweep(sweep) => Ok(self.sweep(*sweep, at)),
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
