//! Errors of databases.

use thiserror::Error;

/// Database errors, by what the caller can do about them.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The database doesn't answer, or not in time. Nothing was committed.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The transaction conflicted with another, or relied on a stale state. Nothing was committed; it may be run again.
    #[error("the transaction conflicted with another: {0}")]
    Conflict(String),
    /// The database refused data that validation accepted. Nothing was committed.
    #[error("the database refused the data: {0}")]
    Refused(String),
    /// The disk is full. Nothing was committed; reads still work.
    #[error("the database's disk is full: {0}")]
    Full(String),
    /// The connection broke while the transaction was being committed.
    #[error("it is not known whether the transaction was committed: {0}")]
    OutcomeUnknown(String),
    /// The database can't be used: wrong file or version, in use, or damaged.
    #[error("{0}")]
    Unusable(String),
}
