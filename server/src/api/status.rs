//! Errors of the contract. All codes, reasons and details are defined here.

use std::{collections::HashMap, fmt, time::Duration};

use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use prost::Message as _;
use serde_json::json;
use tonic::{Code, Status, body::Body};
use tonic_types::{ErrorDetails, StatusExt};
use uuid::Uuid;

use super::convert;
use crate::{
    access::Refusal,
    domain::{job_type::EtagMismatch, transition::TransitionError},
    ledger::LedgerError,
};

/// The `domain` of every ErrorInfo.
const DOMAIN: &str = "jobledger";
/// The retry delay while the server is overloaded or its database is away.
const RETRY_SOON: Duration = Duration::from_millis(250);
/// Violations listed in an error. Details travel in trailers, which should stay under 4 KiB.
pub(super) const MAX_VIOLATIONS: usize = 16;

/// Violations listed in the error of one item of a batch. An answer has up to 1,000 such errors, and has to stay under 4 MiB.
const MAX_ITEM_VIOLATIONS: usize = 4;

#[derive(Debug)]
pub(crate) enum ApiError {
    /// Fields that violate the contract.
    Invalid(Vec<Violation>),
    /// A payload or result over its limit.
    TooLarge {
        field: &'static str,
        limit: usize,
        size: usize,
    },
    /// A request that is larger than the server accepts.
    MessageTooLarge {
        limit: usize,
    },
    /// A request that did not arrive whole in time.
    RequestTooSlow,
    /// The credential is missing or refused.
    Refused(Refusal),
    /// The caller may not make this call.
    Denied(&'static str),
    NoSuchCall,
    UnsupportedEncoding,
    /// The server or the org has as many calls under way as it may, or requests take as much memory as they may.
    Overloaded {
        scope: &'static str,
        limit: usize,
    },
    /// The processors are busy, mostly with this org's calls.
    Slowed,
    /// The org exceeds its rate; the next call is allowed after this time.
    TooFast {
        rate: u32,
        after: Duration,
    },
    /// A defect: the call panicked. The log has the panic under this id.
    Panicked {
        id: Uuid,
    },
    Internal,
    Ledger(LedgerError),
    DeadlineExceeded,
    /// A subscriber took nothing for too long.
    SlowConsumer,
}

/// A field that violates the contract, and how.
#[derive(Debug)]
pub(crate) struct Violation {
    pub(crate) field: String,
    pub(crate) description: String,
}

impl ApiError {
    /// The error of a single bad field.
    pub(super) fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), description: description.into() }])
    }
}

impl ApiError {
    /// The error for plain HTTP: code, message and retry delay.
    pub(crate) fn in_short(self) -> (Code, String, Option<Duration>) {
        let ErrorStatus { code, message, retry, .. } = ErrorStatus::of(self);
        (code, message, retry)
    }
}

/// The error as an answer to plain HTTP: one line of JSON.
pub(super) fn plain(error: ApiError) -> http::Response<Body> {
    let ErrorStatus { code, message, retry, violations, .. } = ErrorStatus::of(error);
    let asks_who = code == Code::Unauthenticated;
    let code = http_code(code);
    let violation = |Violation { field, description }| json!({ "type": "value_error", "loc": ["header", field], "msg": description });
    let detail = match violations.is_empty() {
        true => json!(message),
        false => violations.into_iter().map(violation).collect(),
    };
    let mut response = http::Response::new(Body::new(json!({ "detail": detail }).to_string()));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if asks_who {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(wait) = retry {
        headers.insert(RETRY_AFTER, (wait.as_secs_f64().ceil() as u64).into());
    }
    response
}

/// The HTTP status for a gRPC code.
pub(crate) fn http_code(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument => StatusCode::UNPROCESSABLE_ENTITY,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound | Code::Unimplemented => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted | Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::UntilPast => Self::invalid("until", error.to_string()),
            error => Self::Ledger(error),
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let ErrorStatus { code, reason, message, metadata, retry, violations } = ErrorStatus::of(error);
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

/// The error of one item of a batch.
pub(super) fn item_error(error: impl Into<ApiError>) -> tonic_types::Status {
    let mut error = error.into();
    if let ApiError::Invalid(violations) = &mut error {
        violations.truncate(MAX_ITEM_VIOLATIONS);
    }
    let status = Status::from(error);
    // The details of a gRPC error are an encoded `google.rpc.Status`.
    tonic_types::Status::decode(status.details()).unwrap_or_else(|_| tonic_types::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

struct ErrorStatus {
    code: Code,
    reason: &'static str,
    message: String,
    metadata: Vec<(&'static str, String)>,
    retry: Option<Duration>,
    violations: Vec<Violation>,
}

impl ErrorStatus {
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
            ApiError::MessageTooLarge { limit } => {
                let message = format!("the request takes more than {limit} bytes");
                Self::new(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", message).with("limit", limit)
            }
            ApiError::RequestTooSlow => {
                Self::new(Code::DeadlineExceeded, "REQUEST_TOO_SLOW", "the request did not arrive completely in time")
            }
            ApiError::Refused(Refusal::Busy) => {
                Self::new(Code::ResourceExhausted, "OVERLOADED", Refusal::Busy.to_string()).retry()
            }
            ApiError::Refused(Refusal::Unavailable) => {
                Self::new(Code::Unavailable, "DATABASE_UNAVAILABLE", Refusal::Unavailable.to_string()).retry()
            }
            ApiError::Refused(refusal) => Self::new(Code::Unauthenticated, "UNAUTHENTICATED", refusal.to_string()),
            ApiError::Denied(why) => Self::new(Code::PermissionDenied, "PERMISSION_DENIED", why),
            ApiError::NoSuchCall => Self::new(Code::Unimplemented, "NO_SUCH_CALL", "there is no such call"),
            ApiError::UnsupportedEncoding => {
                Self::new(Code::Unimplemented, "UNSUPPORTED_ENCODING", "messages may not be compressed")
            }
            ApiError::Overloaded { scope, limit } => Self::overloaded(scope, limit),
            ApiError::Slowed => {
                let message =
                    "the server is busy, mostly with calls of this org; try again shortly, with fewer at once";
                Self::new(Code::ResourceExhausted, "OVERLOADED", message).retry().with("scope", "org")
            }
            ApiError::TooFast { rate, after } => {
                let message = format!("the org exceeded its limit of {rate} calls a second; try again shortly");
                let answer = Self::new(Code::ResourceExhausted, "RATE_LIMITED", message).with("limit", rate);
                Self { retry: Some(after), ..answer }
            }
            ApiError::Panicked { id } => {
                let message = "internal error; search the server's log for the error_id";
                Self::new(Code::Internal, "INTERNAL", message).with("error_id", id)
            }
            ApiError::Internal => Self::new(Code::Internal, "INTERNAL", "internal error"),
            ApiError::DeadlineExceeded => Self::new(
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
                "the deadline passed before the answer was ready",
            ),
            ApiError::SlowConsumer => {
                let message = "the subscriber did not read for too long; resume after the last seq received";
                Self::new(Code::Unavailable, "SLOW_CONSUMER", message).retry()
            }
            ApiError::Ledger(error) => Self::of_ledger(&error),
        }
    }

    fn overloaded(scope: &'static str, limit: usize) -> Self {
        let message = match scope {
            "requests" | "requests of one org" => {
                format!("{scope} in progress have reached the limit of {limit} bytes; try again shortly")
            }
            scope => format!("this {scope} has reached its limit of {limit} concurrent calls; try again shortly"),
        };
        Self::new(Code::ResourceExhausted, "OVERLOADED", message).retry().with("scope", scope).with("limit", limit)
    }

    fn of_transition(refused: &TransitionError, message: String) -> Self {
        match refused {
            TransitionError::InvalidTransition { current } | TransitionError::Erased { current } => {
                let current = convert::status(*current).as_str_name();
                Self::new(Code::FailedPrecondition, "INVALID_TRANSITION", message).with("current_status", current)
            }
            TransitionError::LeaseLost => Self::new(Code::FailedPrecondition, "LEASE_LOST", message),
            TransitionError::PayloadOutdated => {
                Self::new(Code::ResourceExhausted, "OVERLOADED", message).retry().with("scope", "job")
            }
            TransitionError::EtagMismatch { current } => {
                Self::new(Code::Aborted, "ETAG_MISMATCH", message).with("current_etag", current)
            }
        }
    }

    fn of_ledger(error: &LedgerError) -> Self {
        let message = error.to_string();
        let missing = |reason, key, value: &dyn fmt::Display| {
            Self::new(Code::NotFound, reason, error.to_string()).with(key, value)
        };
        match error {
            LedgerError::JobNotFound { job } => missing("JOB_NOT_FOUND", "job_id", job),
            LedgerError::KeyNotFound { key } => missing("JOB_NOT_FOUND", "idempotency_key", key),
            LedgerError::TypeNotFound { job_type } => missing("JOB_TYPE_NOT_FOUND", "type", job_type),
            LedgerError::BulkOperationNotFound { id } => missing("BULK_OPERATION_NOT_FOUND", "operation_id", id),
            LedgerError::TokenNotFound { id } => missing("TOKEN_NOT_FOUND", "token_id", id),
            LedgerError::BulkOperationExists { id } => {
                Self::new(Code::AlreadyExists, "BULK_OPERATION_EXISTS", message).with("operation_id", id)
            }
            LedgerError::IdempotencyKeyReused { existing } => {
                Self::new(Code::AlreadyExists, "IDEMPOTENCY_KEY_REUSED", message).with("existing_job_id", existing)
            }
            // It is turned into a violation before.
            LedgerError::UntilPast => Self::new(Code::InvalidArgument, "INVALID_FIELD", message),
            LedgerError::TypeChanged(EtagMismatch { current }) => {
                Self::new(Code::Aborted, "ETAG_MISMATCH", message).with("current_etag", current)
            }
            LedgerError::Transition(refused) => Self::of_transition(refused, message),
            LedgerError::TooManyTypes { limit } => {
                Self::new(Code::ResourceExhausted, "TOO_MANY_TYPES", message).with("limit", limit)
            }
            LedgerError::QuotaExceeded { quantity, limit } => {
                let answer = Self::new(Code::ResourceExhausted, "QUOTA_EXCEEDED", message).with("quota", quantity);
                answer.with("limit", limit)
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
            LedgerError::TooManyNames { scope, limit } => {
                let answer = Self::new(Code::ResourceExhausted, "OVERLOADED", message).retry();
                answer.with("scope", scope).with("limit", limit)
            }
            LedgerError::StorageFull => Self::new(Code::ResourceExhausted, "STORAGE_FULL", message),
            LedgerError::Draining => Self::new(Code::Unavailable, "DRAINING", message).retry(),
            LedgerError::Unavailable => Self::new(Code::Unavailable, "DATABASE_UNAVAILABLE", message).retry(),
            LedgerError::OutcomeUnknown => Self::new(Code::Unavailable, "OUTCOME_UNKNOWN", message).retry(),
            LedgerError::Refused => {
                // The ledger has logged the database's message.
                let id = Uuid::new_v4();
                tracing::error!(error_id = %id, "the database refused a request that passed validation");
                Self::new(Code::Internal, "REFUSED_BY_DATABASE", message).with("error_id", id)
            }
        }
    }
}
