//! Events of an org's log that are about no single job: changes of settings. They have places in the same `seq`.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    bulk::{BulkAction, BulkStatus},
    clock::Time,
    event::JobEvent,
    id::OrgId,
    job_type::Pause,
};

/// One event of an org's log that is about no single job. It never changes once it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrgEvent {
    /// The org that owns the log.
    pub org_id: OrgId,
    /// The number of the event in the org's log.
    pub seq: i64,
    /// When it happened, by the database's clock.
    pub ts: Time,
    /// When it was written. Never falls along `seq`.
    pub recorded_at: Time,
    /// Who caused the event; empty when unknown.
    pub actor: Arc<str>,
    /// What changed.
    pub change: OrgChange,
}

/// What an org event changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrgChange {
    /// Claims get no more jobs of the type, or of any type.
    TypePaused {
        /// The type; empty for all types.
        job_type: Arc<str>,
        /// The pause.
        pause: Pause,
        /// The pause that it replaces.
        before: Option<Pause>,
    },
    /// A pause ended: somebody resumed the type, or the pause's time was over.
    TypeResumed {
        /// The type; empty for all types.
        job_type: Arc<str>,
        /// The pause that ended.
        pause: Pause,
    },
    /// The settings of the type changed.
    TypeUpdated {
        /// The type.
        job_type: Arc<str>,
        /// The description before.
        before: Arc<str>,
        /// The description after.
        after: Arc<str>,
    },
    /// All settings of the type were removed.
    TypeReset {
        /// The type.
        job_type: Arc<str>,
        /// The description that it had.
        description: Arc<str>,
        /// The pause that ended with it.
        pause: Option<Pause>,
    },
    /// A bulk operation began.
    BulkStarted {
        /// Its id.
        id: Uuid,
        /// What it does to each job.
        action: BulkAction,
        /// Why, in the words of the caller that started it; may be empty.
        reason: Arc<str>,
        /// It only counts.
        is_dry_run: bool,
    },
    /// A bulk operation ended.
    BulkEnded {
        /// Its id.
        id: Uuid,
        /// How it ended.
        status: BulkStatus,
        /// Jobs that matched when they were counted.
        matched: i64,
        /// Jobs that it has changed.
        changed: i64,
    },
}

impl OrgEvent {
    /// Approximate bytes of the event in the database and in memory.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 256;
        let of_pause = |pause: &Pause| pause.reason.len() + pause.actor.len();
        let change = match &self.change {
            OrgChange::TypePaused { job_type, pause, before } => {
                job_type.len() + of_pause(pause) + before.as_ref().map_or(0, of_pause)
            }
            OrgChange::TypeResumed { job_type, pause } => job_type.len() + of_pause(pause),
            OrgChange::TypeUpdated { job_type, before, after } => job_type.len() + before.len() + after.len(),
            OrgChange::TypeReset { job_type, description, pause } => {
                job_type.len() + description.len() + pause.as_ref().map_or(0, of_pause)
            }
            OrgChange::BulkStarted { reason, .. } => reason.len(),
            OrgChange::BulkEnded { .. } => 0,
        };
        FIXED + self.actor.len() + change
    }
}

/// One event of an org's log.
#[derive(Debug, Clone, PartialEq)]
pub enum LogEvent {
    /// A change of one job.
    Job(Arc<JobEvent>),
    /// A change of settings.
    Org(Arc<OrgEvent>),
}

impl LogEvent {
    /// The number of the event in the org's log.
    pub fn seq(&self) -> i64 {
        match self {
            Self::Job(event) => event.seq,
            Self::Org(event) => event.seq,
        }
    }

    /// Approximate bytes of the event in the database and in memory.
    pub fn weight(&self) -> usize {
        match self {
            Self::Job(event) => event.weight(),
            Self::Org(event) => event.weight(),
        }
    }

    /// The event, if it is a change of one job.
    pub fn job(&self) -> Option<&Arc<JobEvent>> {
        match self {
            Self::Job(event) => Some(event),
            Self::Org(_) => None,
        }
    }
}
