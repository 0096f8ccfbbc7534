//! How a handler says that it did not work out.

use std::{fmt, time::Duration};

/// The code of a failure to which the handler gave none.
pub const HANDLER_FAILED: &str = "HANDLER_FAILED";
/// The code of a handler that panicked.
pub const PANIC: &str = "PANIC";
/// The code of a job whose payload is not what its handler takes, which no other attempt would change.
pub const INVALID_PAYLOAD: &str = "INVALID_PAYLOAD";
/// The code of a result over the limit of 1 MiB encoded, or one that the service refuses; another attempt would not help.
pub const INVALID_RESULT: &str = "INVALID_RESULT";

/// Why a handler gives up on an attempt.
///
/// Any error turns into one by `?`: a failure that is retried while the job's budget lasts.
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

    /// A failure that another attempt may mend.
    pub fn new(message: impl fmt::Display) -> Self {
        Self::of(Kind::Retryable, message)
    }

    /// A failure that no other attempt would mend: the job fails, whatever is left of its budget.
    pub fn permanent(message: impl fmt::Display) -> Self {
        Self::of(Kind::Permanent, message)
    }

    /// A failure that is not to be retried sooner than after this time, instead of the time of the job's retry policy.
    pub fn retry_after(wait: Duration, message: impl fmt::Display) -> Self {
        Self { retry_after: Some(wait), ..Self::of(Kind::Retryable, message) }
    }

    /// Not a failure: the job goes back to the queue, to be ready again after this time, and none of its budget is used.
    pub fn give_back(wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..Self::of(Kind::GiveBack, "") }
    }

    /// A short, stable name for what went wrong, at most 100 characters. Default `HANDLER_FAILED`.
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
