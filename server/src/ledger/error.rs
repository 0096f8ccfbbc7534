//! Errors of the ledger, as callers see them.

use std::fmt;

use thiserror::Error;
use uuid::Uuid;

use crate::{
    domain::{
        id::{JobId, LogId},
        transition::TransitionError,
    },
    store::StoreError,
};

/// A quantity that an org's quota bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Jobs, finished ones included.
    Jobs,
    /// Bytes of jobs and events, approximately.
    Bytes,
    /// Bulk operations under way.
    BulkOperations,
    /// API tokens.
    Tokens,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Jobs => "jobs",
            Self::Bytes => "bytes",
            Self::BulkOperations => "bulk_operations",
            Self::Tokens => "tokens",
        })
    }
}

/// An error of a request to the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LedgerError {
    /// The org has no such job.
    #[error("the org has no job {job}")]
    JobNotFound {
        /// The id asked for.
        job: JobId,
    },
    /// The org has no job with this idempotency key.
    #[error("the org has no job with the idempotency key {key:?}")]
    KeyNotFound {
        /// The key asked for.
        key: String,
    },
    /// The org has neither jobs nor settings of this type.
    #[error("the org has no job type {job_type:?}")]
    TypeNotFound {
        /// The type asked for.
        job_type: String,
    },
    /// The org has no such bulk operation.
    #[error("the org has no bulk operation {id}")]
    BulkOperationNotFound {
        /// The id asked for.
        id: Uuid,
    },
    /// A bulk operation with this id was started by a different request.
    #[error("a different request has started bulk operation {id}")]
    BulkOperationExists {
        /// The id.
        id: Uuid,
    },
    /// The org has no such API token.
    #[error("the org has no API token {id}")]
    TokenNotFound {
        /// The id asked for.
        id: Uuid,
    },
    /// A pause would end before it begins.
    #[error("must be in the future")]
    UntilPast,
    /// The settings of a type have changed since the caller read them.
    #[error(transparent)]
    TypeChanged(#[from] crate::domain::job_type::EtagMismatch),
    /// The idempotency key was used before with a different request.
    #[error("the idempotency key was used with a different request, for job {existing}")]
    IdempotencyKeyReused {
        /// The job that has the key.
        existing: JobId,
    },
    /// The state machine refuses the command.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// The org has reached its bound on types.
    #[error("the org has reached its limit of {limit} job types")]
    TooManyTypes {
        /// The bound.
        limit: usize,
    },
    /// The org has reached its quota.
    #[error("the org's quota of {limit} {quantity} is exceeded, or would be by this request")]
    QuotaExceeded {
        /// The quantity.
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
    /// The events after the cursor are no longer kept.
    #[error("the events after the cursor are no longer kept; the oldest is {oldest}")]
    CursorExpired {
        /// The lowest `seq` kept.
        oldest: i64,
        /// The head.
        head: i64,
    },
    /// The cursor belongs to another log: the database was restored from a backup.
    #[error("the cursor belongs to another log; the database was restored, and its log is now {current}")]
    EpochChanged {
        /// The current log.
        current: LogId,
    },
    /// The bound on open streams is reached.
    #[error("this {scope} has reached its limit of {limit} open event streams; try again later")]
    TooManyStreams {
        /// `server`, `org` or `connection`.
        scope: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Waiting claims and event streams have reached the bound on the bytes of types, labels and worker names.
    #[error(
        "the filters of waiting claims and event streams of this {scope} reached the limit of {limit} bytes; try again later"
    )]
    TooManyNames {
        /// `server` or `org`.
        scope: &'static str,
        /// The bound, in bytes.
        limit: usize,
    },
    /// The queues are full.
    #[error("too many commands are waiting; try again shortly")]
    Overloaded,
    /// The server is shutting down.
    #[error("this server is shutting down; try again")]
    Draining,
    /// The database does not answer.
    #[error("the database is not available; try again")]
    Unavailable,
    /// The connection broke during the commit, and its outcome could not be found.
    #[error("the outcome is unknown: the database went away during the commit")]
    OutcomeUnknown,
    /// The database's disk is full.
    #[error("the database's disk is full")]
    StorageFull,
    /// A defect: the database refused data that validation accepted.
    #[error("the request was refused by the database")]
    Refused,
}

impl From<StoreError> for LedgerError {
    /// The database's message goes to the server's log, not to the caller.
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
