//! What can go wrong with a request to the ledger, in terms of what its caller is told.

use std::fmt;

use thiserror::Error;

use crate::{
    domain::{
        id::{JobId, LogId},
        transition::TransitionError,
    },
    store::StoreError,
};

/// What an org may have so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Jobs, those that have ended among them.
    Jobs,
    /// Bytes of jobs and events, about.
    Bytes,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Jobs => "jobs",
            Self::Bytes => "bytes",
        })
    }
}

/// What can go wrong with a request to the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LedgerError {
    /// The org has no such job.
    #[error("the org has no job {job}")]
    JobNotFound {
        /// The id asked for.
        job: JobId,
    },
    /// The key came with another request before.
    #[error("the idempotency key was used with a different request, for job {existing}")]
    IdempotencyKeyReused {
        /// The job that holds the key.
        existing: JobId,
    },
    /// The state machine refuses the command.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// The org has as many types as it may.
    #[error("the org has {limit} types of jobs, and may not have more")]
    TooManyTypes {
        /// The bound.
        limit: usize,
    },
    /// The org has as much as it may.
    #[error("the org has, or would have, more than the {limit} {quantity} that it may have")]
    QuotaExceeded {
        /// Of what.
        quantity: Quantity,
        /// The bound.
        limit: u64,
    },
    /// The cursor is beyond the head.
    #[error("the cursor is beyond the head of the log, {head}")]
    CursorAhead {
        /// The lowest `seq` kept.
        oldest: i64,
        /// The head.
        head: i64,
    },
    /// The cursor is below what is kept.
    #[error("the events after the cursor are no longer kept; the oldest is {oldest}")]
    CursorExpired {
        /// The lowest `seq` kept.
        oldest: i64,
        /// The head.
        head: i64,
    },
    /// The cursor belongs to another log: the database was restored from a backup.
    #[error("the cursor belongs to another log than this one, {current}: the database was restored since")]
    EpochChanged {
        /// This log.
        current: LogId,
    },
    /// As many streams are open as may be.
    #[error("this {scope} has {limit} event streams open, and may not have more; try again later")]
    TooManyStreams {
        /// Of what: `server`, `org` or `connection`.
        scope: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Claims that wait and event streams name types, labels and workers of as many bytes as they may.
    #[error(
        "what waiting claims and event streams of this {scope} name takes {limit} bytes, and may not take more; try again later"
    )]
    TooManyNames {
        /// Of what: `server` or `org`.
        scope: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The queues are full.
    #[error("too many commands are waiting; try again shortly")]
    Overloaded,
    /// The server is going away.
    #[error("this server is shutting down; try again")]
    Draining,
    /// The database doesn't answer.
    #[error("the database is not available; try again")]
    Unavailable,
    /// The database died while committing.
    #[error("the outcome is unknown: the database went away during the commit")]
    OutcomeUnknown,
    /// The disk is full.
    #[error("the database's disk is full")]
    StorageFull,
    /// A defect: the database refused what validation let through.
    #[error("the request was refused by the database")]
    Refused,
}

impl From<StoreError> for LedgerError {
    /// What the database said is for the log, not for the caller.
    fn from(error: StoreError) -> Self {
        tracing::debug!(%error, "the database failed a request");
        match error {
            StoreError::Unavailable(_) | StoreError::Conflict(_) | StoreError::Unusable(_) => Self::Unavailable,
            StoreError::Refused(_) => Self::Refused,
            StoreError::Full(_) => Self::StorageFull,
            StoreError::OutcomeUnknown(_) => Self::OutcomeUnknown,
        }
    }
}
