//! The lines of an org's log.

use std::sync::Arc;

use super::{
    clock::Time,
    id::{Digest, JobId, OrgId},
    job::Labels,
    json::Json,
    status::JobStatus,
};

/// The actor of what the ledger does by itself.
pub const ACTOR_LEDGER: &str = "jobledger";

/// What an event says happened: one kind for each arrow of the state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// Queued for the first time.
    Created,
    /// queued → running, under a lease.
    Claimed,
    /// queued → running, by a reporter without a lease.
    Started,
    /// running → running, with news.
    Progress,
    /// running → succeeded.
    Succeeded,
    /// running → failed.
    Failed,
    /// failed → queued, by itself.
    RetryScheduled,
    /// running → queued, given back.
    Released,
    /// running → running, asked to stop.
    CancelRequested,
    /// queued or running → canceled.
    Canceled,
    /// failed → dead_letter.
    DeadLettered,
    /// failed, canceled or dead_letter → queued, on request.
    Requeued,
    /// Brought in from another system.
    Imported,
    /// running → queued, because the lease expired.
    Lost,
}

impl EventKind {
    /// Every kind, in the order of the contract.
    pub const ALL: [Self; 14] = [
        Self::Created,
        Self::Claimed,
        Self::Started,
        Self::Progress,
        Self::Succeeded,
        Self::Failed,
        Self::RetryScheduled,
        Self::Released,
        Self::CancelRequested,
        Self::Canceled,
        Self::DeadLettered,
        Self::Requeued,
        Self::Imported,
        Self::Lost,
    ];

    /// The name in the database.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Claimed => "claimed",
            Self::Started => "started",
            Self::Progress => "progress",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::RetryScheduled => "retry_scheduled",
            Self::Released => "released",
            Self::CancelRequested => "cancel_requested",
            Self::Canceled => "canceled",
            Self::DeadLettered => "dead_lettered",
            Self::Requeued => "requeued",
            Self::Imported => "imported",
            Self::Lost => "lost",
        }
    }

    /// The kind with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// What went wrong, as the worker put it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobError {
    /// A short, stable name; may be empty.
    pub code: Arc<str>,
    /// For people; may be empty.
    pub message: Arc<str>,
}

/// What a job was in the system that it was brought in from, beside what its [`EventKind::Imported`] event says like any other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Of all that was brought in, to know the same when it comes again.
    pub digest: Digest,
    /// When it was created there.
    pub created_at: Time,
    /// When it was first worked on there, as far as that is known.
    pub started_at: Option<Time>,
    /// When it ended there.
    pub finished_at: Option<Time>,
}

/// Where an event stands: in its org's log, and in time, by which databases may part the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The place in the org's log.
    pub seq: i64,
    /// When it was written.
    pub recorded_at: Time,
}

/// One line of an org's log. Never changed after it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct JobEvent {
    /// Whose log.
    pub org_id: OrgId,
    /// The place in the org's log: 1, 2, 3, …
    pub seq: i64,
    /// The job.
    pub job_id: JobId,
    /// The place among the job's events: 1, 2, 3, …
    pub job_seq: i64,
    /// When it happened.
    pub ts: Time,
    /// When it was written; never falls along `seq`.
    pub recorded_at: Time,
    /// What happened.
    pub kind: EventKind,
    /// The status before; `None` for a job's first event.
    pub prev_status: Option<JobStatus>,
    /// The status after.
    pub next_status: JobStatus,
    /// The job's attempt after the event.
    pub attempt: i32,
    /// Who caused it; empty when unknown.
    pub actor: Arc<str>,
    /// The job's type.
    pub job_type: Arc<str>,
    /// The job's labels.
    pub labels: Labels,
    /// The job's stage after the event.
    pub stage: Option<Arc<str>>,
    /// The job's progress after the event, in per cent.
    pub progress: Option<u8>,
    /// A remark; empty for none.
    pub message: Arc<str>,
    /// The result that this event brought.
    pub result: Option<Json>,
    /// The error that this event brought.
    pub error: Option<JobError>,
    /// For an event that leads to queued: the time before which the job is not to be worked on.
    pub scheduled_at: Option<Time>,
    /// What was brought in, of an [`EventKind::Imported`] event.
    pub origin: Option<Arc<Origin>>,
    /// It happened in the system from which the job was brought in.
    pub is_past: bool,
}

impl JobEvent {
    /// About how many bytes the event takes in memory and on the wire.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 256;
        FIXED
            + self.actor.len()
            + self.job_type.len()
            + self.labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
            + self.stage.as_deref().map_or(0, str::len)
            + self.message.len()
            + self.result.as_ref().map_or(0, Json::len)
            + self.error.as_ref().map_or(0, |error| error.code.len() + error.message.len())
    }
}
