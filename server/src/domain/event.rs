//! The events of an org's log.

use std::{collections::BTreeMap, sync::Arc};

use uuid::Uuid;

use super::{
    clock::Time,
    edit::JobEdit,
    id::{Digest, JobId, OrgId},
    job::Labels,
    json::Json,
    status::JobStatus,
};

/// The actor of events that the ledger causes by itself.
pub const ACTOR_LEDGER: &str = "jobledger";

/// What happened. Each arrow of the state machine has one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// Queued for the first time.
    Created,
    /// queued → running, under a lease.
    Claimed,
    /// queued → running, by a reporter without a lease.
    Started,
    /// running → running, with a new stage, progress or message.
    Progress,
    /// running → succeeded.
    Succeeded,
    /// running → failed.
    Failed,
    /// failed → queued, without a request.
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
    /// Imported from another system, with the status that the job had there.
    Imported,
    /// running → queued, because the lease expired.
    Lost,
    /// queued → queued: what the creator asked for was changed.
    Edited,
    /// A finished job was blanked, with its events.
    Erased,
}

impl EventKind {
    /// Every kind, in the order of the contract.
    pub const ALL: [Self; 16] = [
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
        Self::Edited,
        Self::Erased,
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
            Self::Edited => "edited",
            Self::Erased => "erased",
        }
    }

    /// The kind with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// An error, as the worker reported it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobError {
    /// A short, stable code; may be empty.
    pub code: Arc<str>,
    /// A message for people; may be empty.
    pub message: Arc<str>,
}

/// What an imported job was in its system of origin, beyond the common fields of its [`EventKind::Imported`] event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Digest of the whole imported job, to recognise the same job when it is imported again.
    pub digest: Digest,
    /// When the job was created there.
    pub created_at: Time,
    /// When the job was first worked on there, if that is known.
    pub started_at: Option<Time>,
    /// When the job ended there.
    pub finished_at: Option<Time>,
}

/// The position of an event: in its org's log, and in time, by which a database may partition the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The number of the event in the org's log.
    pub seq: i64,
    /// When the event was written.
    pub recorded_at: Time,
}

/// One event of an org's log. Once it is written, only an erasure of its job changes it ([`JobEvent::blank`]).
#[derive(Debug, Clone, PartialEq)]
pub struct JobEvent {
    /// The org that owns the log.
    pub org_id: OrgId,
    /// The number of the event in the org's log: 1, 2, 3, …
    pub seq: i64,
    /// The job.
    pub job_id: JobId,
    /// The number among the job's events: 1, 2, 3, …
    pub job_seq: i64,
    /// When it happened, by the database's clock; for imported past events, by the clock of the other system.
    pub ts: Time,
    /// When it was written. Never falls along `seq`.
    pub recorded_at: Time,
    /// What happened.
    pub kind: EventKind,
    /// The status before; `None` for a job's first event.
    pub prev_status: Option<JobStatus>,
    /// The status after.
    pub next_status: JobStatus,
    /// The job's attempt after the event.
    pub attempt: i32,
    /// Who caused the event; empty when unknown.
    pub actor: Arc<str>,
    /// The job's type.
    pub job_type: Arc<str>,
    /// The job's labels.
    pub labels: Labels,
    /// The job's stage after the event.
    pub stage: Option<Arc<str>>,
    /// The job's progress after the event, in per cent.
    pub progress: Option<u8>,
    /// A remark of the reporter; empty for none.
    pub message: Arc<str>,
    /// The result that came with this event.
    pub result: Option<Json>,
    /// The error that came with this event.
    pub error: Option<JobError>,
    /// On an event that leads to queued: the earliest time for the next attempt; `None` if the job is ready at once.
    pub scheduled_at: Option<Time>,
    /// What the other system had of the job; only on [`EventKind::Imported`] events.
    pub origin: Option<Arc<Origin>>,
    /// True if it happened in the system that the job was imported from.
    pub is_past: bool,
    /// The bulk operation that caused it.
    pub bulk_operation: Option<Uuid>,
    /// What was changed; only on [`EventKind::Edited`] events, and not once the job is erased. `labels` are those after it.
    pub edit: Option<Arc<JobEdit>>,
}

impl JobEvent {
    /// The approximate size of the event in memory and on the wire, in bytes.
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
            + self.edit.as_ref().map_or(0, |edit| FIXED + edit.before.text_bytes() + edit.after.text_bytes())
    }

    /// Removes what people have put into the event, for the erasure of its job. Its place, kind, statuses, times, attempt and
    /// progress stay, and the actor unless that is the job's requester.
    pub fn blank(&mut self, requester: &str) {
        if *self.actor == *requester {
            self.actor = Arc::default();
        }
        self.labels = Labels::default();
        (self.stage, self.message) = (None, Arc::default());
        (self.result, self.error, self.edit) = (None, None, None);
        if let Some(origin) = &mut self.origin {
            Arc::make_mut(origin).digest = Digest([0; 32]);
        }
    }

    /// True if the event has nothing that [`JobEvent::blank`] removes, the actor aside.
    pub fn is_blank(&self) -> bool {
        let mut blank = self.clone();
        blank.blank(&self.actor);
        blank.actor = Arc::clone(&self.actor);
        blank == *self
    }

    /// True if the job has these labels, before or after the event. An erasure tells no labels, and so is about all.
    pub fn has_labels(&self, wanted: &BTreeMap<String, String>) -> bool {
        let have = |labels: &Labels| wanted.iter().all(|(key, value)| labels.get(key) == Some(value));
        self.kind == EventKind::Erased
            || have(&self.labels)
            || self.edit.as_ref().and_then(|edit| edit.before.labels.as_ref()).is_some_and(have)
    }
}
