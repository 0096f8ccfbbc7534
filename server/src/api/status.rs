//! Errors as the contract has them: the one place where codes, reasons and details are given.

use std::{collections::HashMap, time::Duration};

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::convert;
use crate::{domain::transition::TransitionError, ledger::LedgerError};

/// The domain of every ErrorInfo.
const DOMAIN: &str = "jobledger";
/// When a client should come back to a server that is busy, or whose database is away.
const RETRY_SOON: Duration = Duration::from_millis(250);
/// Bytes of a request: a value at its limit and plenty to spare; gRPC's own default.
pub(crate) const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Details travel in trailers, which should stay under 4 KiB: no more violations than this are listed.
pub(super) const MAX_VIOLATIONS: usize = 16;

/// An answer has up to a thousand such errors, and stays under 4 MiB.
const MAX_ITEM_VIOLATIONS: usize = 4;

/// Why a request fails.
#[derive(Debug)]
pub(super) enum ApiError {
    /// Fields that break the contract.
    Invalid(Vec<Violation>),
    /// A payload or result over its limit.
    TooLarge { field: &'static str, limit: usize, size: usize },
    /// A request that is larger than the server reads.
    MessageTooLarge,
    /// What the ledger said.
    Ledger(LedgerError),
    /// The deadline has passed.
    DeadlineExceeded,
    /// A subscriber took nothing for too long.
    SlowConsumer,
}

/// A field that breaks the contract, and how.
#[derive(Debug)]
pub(super) struct Violation {
    pub(super) field: String,
    pub(super) description: String,
}

impl ApiError {
    /// A single bad field.
    pub(super) fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), description: description.into() }])
    }
}

impl ApiError {
    /// For those who know nothing of gRPC's details: the code, a sentence, and when to come back.
    pub(super) fn in_short(self) -> (Code, String, Option<Duration>) {
        let Answer { code, message, retry, .. } = Answer::of(self);
        (code, message, retry)
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        Self::Ledger(error)
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let Answer { code, reason, message, metadata, retry, violations } = Answer::of(error);
        let metadata: HashMap<_, _> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
        for violation in violations {
            details.add_bad_request_violation(violation.field, violation.description);
        }
        if let Some(delay) = retry {
            details.set_retry_info(Some(delay));
        }
        Self::with_error_details(code, message, details)
    }
}

/// The same as the error of one item of a batch.
pub(super) fn item_error(error: impl Into<ApiError>) -> tonic_types::Status {
    let mut error = error.into();
    if let ApiError::Invalid(violations) = &mut error {
        violations.truncate(MAX_ITEM_VIOLATIONS);
    }
    let status = Status::from(error);
    // What the details of a gRPC error are, encoded.
    tonic_types::Status::decode(status.details()).unwrap_or_else(|_| tonic_types::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

struct Answer {
    code: Code,
    reason: &'static str,
    message: String,
    metadata: Vec<(&'static str, String)>,
    retry: Option<Duration>,
    violations: Vec<Violation>,
}

impl Answer {
    fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), metadata: Vec::new(), retry: None, violations: Vec::new() }
    }

    fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.metadata.push((key, value.to_string()));
        self
    }

    fn retry(mut self) -> Self {
        self.retry = Some(RETRY_SOON);
        self
    }

    fn of(error: ApiError) -> Self {
        match error {
            ApiError::Invalid(violations) => {
                let each: Vec<_> = violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
                let message = each.join("; ");
                Self { violations, ..Self::new(Code::InvalidArgument, "INVALID_FIELD", message) }
            }
            ApiError::TooLarge { field, limit, size } => {
                let message = format!("{field} takes {size} bytes encoded; the limit is {limit}");
                Self::new(Code::InvalidArgument, "PAYLOAD_TOO_LARGE", message)
                    .with("field", field)
                    .with("limit", limit)
                    .with("size", size)
            }
            ApiError::MessageTooLarge => {
                let message = format!("the request takes more than {MAX_REQUEST_BYTES} bytes");
                Self::new(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", message).with("limit", MAX_REQUEST_BYTES)
            }
            ApiError::DeadlineExceeded => Self::new(
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
                "the deadline passed before the answer was ready",
            ),
            ApiError::SlowConsumer => {
                let message = "the subscriber took nothing for too long; go on from the last seq seen";
                Self::new(Code::Unavailable, "SLOW_CONSUMER", message).retry()
            }
            ApiError::Ledger(error) => Self::of_ledger(&error),
        }
    }

    fn of_ledger(error: &LedgerError) -> Self {
        let message = error.to_string();
        match error {
            LedgerError::JobNotFound { job } => Self::new(Code::NotFound, "JOB_NOT_FOUND", message).with("job_id", job),
            LedgerError::IdempotencyKeyReused { existing } => {
                Self::new(Code::AlreadyExists, "IDEMPOTENCY_KEY_REUSED", message).with("existing_job_id", existing)
            }
            LedgerError::Transition(TransitionError::InvalidTransition { current }) => {
                let current = convert::status(*current).as_str_name();
                Self::new(Code::FailedPrecondition, "INVALID_TRANSITION", message).with("current_status", current)
            }
            LedgerError::Transition(TransitionError::LeaseLost) => {
                Self::new(Code::FailedPrecondition, "LEASE_LOST", message)
            }
            LedgerError::Transition(TransitionError::EtagMismatch { current }) => {
                Self::new(Code::Aborted, "ETAG_MISMATCH", message).with("current_etag", current)
            }
            LedgerError::TooManyTypes { limit } => {
                Self::new(Code::ResourceExhausted, "TOO_MANY_TYPES", message).with("limit", limit)
            }
            LedgerError::CursorAhead { oldest, head } => {
                Self::new(Code::OutOfRange, "CURSOR_AHEAD", message).with("oldest_seq", oldest).with("head_seq", head)
            }
            LedgerError::CursorExpired { oldest, head } => {
                Self::new(Code::OutOfRange, "CURSOR_EXPIRED", message).with("oldest_seq", oldest).with("head_seq", head)
            }
            LedgerError::EpochChanged { current } => {
                Self::new(Code::OutOfRange, "EPOCH_CHANGED", message).with("log_id", current)
            }
            LedgerError::Overloaded => Self::new(Code::ResourceExhausted, "OVERLOADED", message).retry(),
            LedgerError::TooManyStreams { scope, limit } => {
                let answer = Self::new(Code::ResourceExhausted, "TOO_MANY_STREAMS", message).retry();
                answer.with("scope", scope).with("limit", limit)
            }
            LedgerError::StorageFull => Self::new(Code::ResourceExhausted, "STORAGE_FULL", message),
            LedgerError::Draining => Self::new(Code::Unavailable, "DRAINING", message).retry(),
            LedgerError::Unavailable => Self::new(Code::Unavailable, "DATABASE_UNAVAILABLE", message).retry(),
            LedgerError::OutcomeUnknown => Self::new(Code::Unavailable, "OUTCOME_UNKNOWN", message).retry(),
            LedgerError::Refused => Self::new(Code::Internal, "REFUSED_BY_DATABASE", message),
        }
    }
}
