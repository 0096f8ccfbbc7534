//! Errors with which handlers end an attempt.

use std::{fmt, time::Duration};

/// The code of a failure whose error has no code of its own.
pub const HANDLER_FAILED: &str = "HANDLER_FAILED";
/// The code of a handler that panicked. Another attempt follows while the job's budget lasts.
pub const PANIC: &str = "PANIC";
/// The code of a payload that does not have the handler's input type. Permanent.
pub const INVALID_PAYLOAD: &str = "INVALID_PAYLOAD";
/// The code of a result that can't be stored: over 1 MiB, nested over 32 deep, not JSON, or refused. Permanent.
pub const INVALID_RESULT: &str = "INVALID_RESULT";

/// Why an attempt failed, or gave its job back.
///
/// Every error type converts by `?` to a failure that is retried while the job's budget lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub(super) code: String,
    pub(super) message: String,
    pub(super) kind: Kind,
    pub(super) retry_after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Retryable,
    Permanent,
    GiveBack,
}

impl Error {
    fn of(kind: Kind, message: impl fmt::Display) -> Self {
        Self { code: HANDLER_FAILED.to_owned(), message: message.to_string(), kind, retry_after: None }
    }

    /// A failure that another attempt may repair.
    pub fn new(message: impl fmt::Display) -> Self {
        Self::of(Kind::Retryable, message)
    }

    /// A failure that no other attempt would repair. The job fails, whatever is left of its budget.
    pub fn permanent(message: impl fmt::Display) -> Self {
        Self::of(Kind::Permanent, message)
    }

    /// A failure whose next attempt begins after `wait` (at most 365 days) instead of the retry policy's delay.
    pub fn retry_after(wait: Duration, message: impl fmt::Display) -> Self {
        Self { retry_after: Some(wait), ..Self::of(Kind::Retryable, message) }
    }

    /// Not a failure. The job goes back to the queue, becomes ready after `wait`, and keeps its budget.
    pub fn give_back(wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..Self::of(Kind::GiveBack, "") }
    }

    /// Sets a short, stable name of the failure, at most 100 characters. Default `HANDLER_FAILED`.
    #[must_use]
    pub fn code(mut self, code: impl Into<String>) -> Self {
        self.code = code.into();
        self
    }
}

impl<E: std::error::Error> From<E> for Error {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            message = format!("{message}: {error}");
            source = error.source();
        }
        Self::new(message)
    }
}
