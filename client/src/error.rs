//! Errors, sorted by what a caller can do about them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jobledger_proto::v1::JobStatus;
use prost::Message as _;
use thiserror::Error;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The domain of the service's ErrorInfo.
const DOMAIN: &str = "jobledger";

/// Why a call failed. The reason in the `google.rpc.ErrorInfo` of the service's error (in capitals) selects the variant.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum Error {
    /// The request breaks the contract (`INVALID_FIELD`). Correct it.
    #[error("invalid request: {message}")]
    InvalidRequest {
        /// All violations in one line.
        message: String,
        /// The fields that break the contract, at most 16.
        violations: Vec<Violation>,
    },
    /// A payload or result is over its limit (`PAYLOAD_TOO_LARGE`). Store the data elsewhere and send a reference.
    #[error("{message}")]
    PayloadTooLarge {
        /// Says which field is too large.
        message: String,
        /// The limit in encoded bytes.
        limit: usize,
        /// The encoded size of the field in bytes.
        size: usize,
    },
    /// The org has no such job (`JOB_NOT_FOUND`).
    #[error("no job {job_id}")]
    JobNotFound {
        /// The id that was asked for.
        job_id: String,
    },
    /// The org has no job with this idempotency key (`JOB_NOT_FOUND`).
    #[error("no job with the idempotency key {idempotency_key:?}")]
    KeyNotFound {
        /// The key that was asked for.
        idempotency_key: String,
    },
    /// The org has no such bulk operation (`BULK_OPERATION_NOT_FOUND`).
    #[error("no bulk operation {operation_id}")]
    BulkOperationNotFound {
        /// The id that was asked for.
        operation_id: String,
    },
    /// The org has no such API token (`TOKEN_NOT_FOUND`).
    #[error("no API token {token_id}")]
    TokenNotFound {
        /// The id that was asked for.
        token_id: String,
    },
    /// A different request has started a bulk operation with this id (`BULK_OPERATION_EXISTS`).
    #[error("a different request has started bulk operation {operation_id}")]
    BulkOperationExists {
        /// The id.
        operation_id: String,
    },
    /// The org has neither jobs nor settings of this type (`JOB_TYPE_NOT_FOUND`).
    #[error("no job type {job_type:?}")]
    JobTypeNotFound {
        /// The type that was asked for.
        job_type: String,
    },
    /// The idempotency key was used before with a different request (`IDEMPOTENCY_KEY_REUSED`).
    #[error("the idempotency key was used with a different request, for job {existing_job_id}")]
    IdempotencyKeyReused {
        /// The job that the earlier request created.
        existing_job_id: String,
    },
    /// The job's status does not allow the change (`INVALID_TRANSITION`).
    #[error("the job is {}, which does not allow this", current.as_str_name())]
    InvalidTransition {
        /// The job's status.
        current: JobStatus,
    },
    /// The job is not, or no longer, held under this lease (`LEASE_LOST`). Stop working on it.
    #[error("the lease is lost")]
    LeaseLost,
    /// The job has changed since its etag was read (`ETAG_MISMATCH`). Read the job again.
    #[error("the job has changed; its etag is {current_etag}")]
    EtagMismatch {
        /// The job's current etag.
        current_etag: String,
    },
    /// The cursor is beyond the head of the log (`CURSOR_AHEAD`), so it belongs to another log.
    #[error("the cursor is beyond the head of the log, {head_seq}")]
    CursorAhead {
        /// The lowest `seq` that the log keeps.
        oldest_seq: i64,
        /// The `seq` of the log's head.
        head_seq: i64,
    },
    /// Retention has removed events after the cursor (`CURSOR_EXPIRED`). Start again with a snapshot.
    #[error("the events after the cursor are no longer kept; the oldest is {oldest_seq}")]
    CursorExpired {
        /// The lowest `seq` that the log keeps.
        oldest_seq: i64,
        /// The `seq` of the log's head.
        head_seq: i64,
    },
    /// The cursor belongs to another log than the service has (`EPOCH_CHANGED`): the database was restored from a
    /// backup, or replaced by a standby that lacked commits. Start again with a snapshot.
    #[error("the cursor belongs to another log; this one is {log_id}")]
    EpochChanged {
        /// UUID of the service's log.
        log_id: String,
    },
    /// An event is missing, duplicated or out of order: a defect of the service. Checked in builds with debug assertions.
    #[error("events out of order: seq {found_seq} came after {after_seq}")]
    OutOfOrder {
        /// The `seq` of the last correct event or bookmark.
        after_seq: i64,
        /// The `seq` of the event that came next.
        found_seq: i64,
    },
    /// The service does not accept the credential (`UNAUTHENTICATED`): the [`Token`](crate::Token) is missing, unknown,
    /// expired or revoked.
    #[error("unauthenticated: {message}")]
    Unauthenticated {
        /// A description for people.
        message: String,
    },
    /// The caller's roles or org do not allow this call (`PERMISSION_DENIED`).
    #[error("permission denied: {message}")]
    PermissionDenied {
        /// A description for people.
        message: String,
    },
    /// A limit is reached: queues, calls, streams, types, quotas, disk or message size (`OVERLOADED`, `RATE_LIMITED`,
    /// `TOO_MANY_STREAMS`, `TOO_MANY_TYPES`, `QUOTA_EXCEEDED`, `STORAGE_FULL`, `MESSAGE_TOO_LARGE`).
    #[error("{reason}: {message}")]
    Exhausted {
        /// The service's reason, such as `OVERLOADED`; empty if something else than the service answered.
        reason: String,
        /// A description for people.
        message: String,
        /// How long to wait before the next try, if waiting helps.
        retry_after: Option<Duration>,
    },
    /// The service can't be reached or can't work at present. A write may or may not have been committed.
    #[error("unavailable: {message}")]
    Unavailable {
        /// The service's reason; empty when the connection failed.
        reason: String,
        /// A description for people.
        message: String,
        /// How long to wait before the next try, if the service said so.
        retry_after: Option<Duration>,
    },
    /// The deadline passed. A write may or may not have been committed.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// Any other error.
    #[error("{code:?} {reason}: {message}")]
    Other {
        /// The gRPC status code.
        code: Code,
        /// The service's reason; empty if there is none.
        reason: String,
        /// A description for people.
        message: String,
    },
    /// A payload or result can't be converted to or from JSON, or does not have the expected type.
    #[error("JSON: {0}")]
    Json(#[source] Arc<serde_json::Error>),
    /// A payload or result contains a number that may not arrive unchanged. The contract's numbers are doubles, which
    /// represent whole numbers exactly only below ±2⁵³. Send the number as a string.
    #[error("{path}: {number} is ±2^53 or beyond, which a double can't represent exactly; send it as a string")]
    Number {
        /// The path of the number, such as `payload.items[2].id`.
        path: String,
        /// The number as text.
        number: String,
    },
    /// The text is not a [`Cursor`](crate::Cursor).
    #[error("{0:?} is not a cursor: expected LOG_ID:SEQ")]
    Cursor(String),
    /// The token has characters that a header can't carry.
    #[error("invalid token: it has characters that a header can't carry")]
    Token,
    /// There is no tokio runtime, or the runtime or the system can't provide what is needed.
    #[error("{0}")]
    Runtime(String),
    /// A worker's configuration is invalid: it has no handler, or two handlers for one type.
    #[error("{0}")]
    Worker(String),
    /// An endpoint is missing or malformed (expected `http://HOST:PORT` or `https://HOST:PORT`), or its certificates
    /// are invalid.
    #[error("invalid endpoint {0}")]
    Endpoint(String),
}

/// A field that breaks the contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field's name in the contract.
    pub field: String,
    /// What is wrong with the field.
    pub description: String,
}

impl Error {
    /// True if the same call may succeed later: the service was away or overloaded, the connection broke, or a proxy
    /// answered instead of the service. It does not say whether repeating the call is safe.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::DeadlineExceeded => true,
            Self::Exhausted { reason, .. } => !matches!(reason.as_str(), "TOO_MANY_TYPES" | "MESSAGE_TOO_LARGE"),
            // The service gives a reason with every error, and its own defects are not transient. A proxy gives none.
            Self::Other { code, reason, .. } => reason.is_empty() && may_come_from_between(*code),
            Self::InvalidRequest { .. }
            | Self::PayloadTooLarge { .. }
            | Self::JobNotFound { .. }
            | Self::KeyNotFound { .. }
            | Self::JobTypeNotFound { .. }
            | Self::BulkOperationNotFound { .. }
            | Self::TokenNotFound { .. }
            | Self::BulkOperationExists { .. }
            | Self::IdempotencyKeyReused { .. }
            | Self::InvalidTransition { .. }
            | Self::LeaseLost
            | Self::EtagMismatch { .. }
            | Self::CursorAhead { .. }
            | Self::CursorExpired { .. }
            | Self::EpochChanged { .. }
            | Self::OutOfOrder { .. }
            | Self::Unauthenticated { .. }
            | Self::PermissionDenied { .. }
            | Self::Json(_)
            | Self::Number { .. }
            | Self::Cursor(_)
            | Self::Token
            | Self::Endpoint(_)
            | Self::Runtime(_)
            | Self::Worker(_) => false,
        }
    }

    /// True if the service decided nothing and gave a retry delay. Repeating any call is then safe.
    pub(crate) fn is_refused_for_now(&self) -> bool {
        matches!(self, Self::Exhausted { retry_after: Some(_), .. })
    }

    /// True if the service was away or the connection broke.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// An answer that breaks the contract because it has no job.
    pub(crate) fn without_job() -> Self {
        Self::without("a job")
    }

    /// An answer that breaks the contract because it lacks `what`.
    pub(crate) fn without(what: &str) -> Self {
        let (reason, message) = ("INVALID_ANSWER".to_owned(), format!("the answer lacks {what}"));
        Self::Other { code: Code::Internal, reason, message }
    }

    /// How long the service asked to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } | Self::Exhausted { retry_after, .. } => *retry_after,
            Self::InvalidRequest { .. }
            | Self::PayloadTooLarge { .. }
            | Self::JobNotFound { .. }
            | Self::KeyNotFound { .. }
            | Self::JobTypeNotFound { .. }
            | Self::BulkOperationNotFound { .. }
            | Self::TokenNotFound { .. }
            | Self::BulkOperationExists { .. }
            | Self::IdempotencyKeyReused { .. }
            | Self::InvalidTransition { .. }
            | Self::LeaseLost
            | Self::EtagMismatch { .. }
            | Self::CursorAhead { .. }
            | Self::CursorExpired { .. }
            | Self::EpochChanged { .. }
            | Self::OutOfOrder { .. }
            | Self::Unauthenticated { .. }
            | Self::PermissionDenied { .. }
            | Self::DeadlineExceeded
            | Self::Other { .. }
            | Self::Json(_)
            | Self::Number { .. }
            | Self::Cursor(_)
            | Self::Token
            | Self::Endpoint(_)
            | Self::Runtime(_)
            | Self::Worker(_) => None,
        }
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(Arc::new(error))
    }
}

/// Converts the error of one item of a batch.
impl From<tonic_types::Status> for Error {
    fn from(status: tonic_types::Status) -> Self {
        let details = status.encode_to_vec();
        Status::with_details(Code::from_i32(status.code), status.message, details.into()).into()
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let code = status.code();
        let message = message_of(&status);
        let retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
        let Some(info) = info else {
            return match code {
                Code::DeadlineExceeded => Self::DeadlineExceeded,
                // The service gives a reason with every error, so a proxy sent this. tonic reports a cut stream as Unknown.
                Code::Unavailable | Code::Unknown => Self::Unavailable { reason: String::new(), message, retry_after },
                // tonic's own timer fired before this client's.
                Code::Cancelled if has_source::<tonic::TimeoutExpired>(&status) => Self::DeadlineExceeded,
                // tonic made this status, not the server: the connection broke. The code depends on when it broke.
                _ if std::error::Error::source(&status).is_some() => {
                    Self::Unavailable { reason: String::new(), message, retry_after }
                }
                Code::Unauthenticated => Self::Unauthenticated { message },
                Code::PermissionDenied => Self::PermissionDenied { message },
                Code::ResourceExhausted => Self::Exhausted { reason: String::new(), message, retry_after },
                _ => Self::Other { code, reason: String::new(), message },
            };
        };
        let reason = info.reason;
        let facts = Facts(info.metadata);
        match (code, reason.as_str()) {
            (Code::InvalidArgument, "INVALID_FIELD") => {
                let found = status.get_details_bad_request().map(|bad| bad.field_violations).unwrap_or_default();
                let violations = found
                    .into_iter()
                    .map(|violation| Violation { field: violation.field, description: violation.description });
                Self::InvalidRequest { violations: violations.collect(), message }
            }
            (Code::InvalidArgument, "PAYLOAD_TOO_LARGE") => {
                Self::PayloadTooLarge { message, limit: facts.number("limit"), size: facts.number("size") }
            }
            (_, "JOB_NOT_FOUND") if facts.0.contains_key("idempotency_key") => {
                Self::KeyNotFound { idempotency_key: facts.text("idempotency_key") }
            }
            (_, "JOB_NOT_FOUND") => Self::JobNotFound { job_id: facts.text("job_id") },
            (_, "BULK_OPERATION_NOT_FOUND") => Self::BulkOperationNotFound { operation_id: facts.text("operation_id") },
            (_, "TOKEN_NOT_FOUND") => Self::TokenNotFound { token_id: facts.text("token_id") },
            (_, "BULK_OPERATION_EXISTS") => Self::BulkOperationExists { operation_id: facts.text("operation_id") },
            (_, "JOB_TYPE_NOT_FOUND") => Self::JobTypeNotFound { job_type: facts.text("type") },
            (_, "IDEMPOTENCY_KEY_REUSED") => {
                Self::IdempotencyKeyReused { existing_job_id: facts.text("existing_job_id") }
            }
            (_, "INVALID_TRANSITION") => {
                let current = JobStatus::from_str_name(&facts.text("current_status")).unwrap_or_default();
                Self::InvalidTransition { current }
            }
            (_, "LEASE_LOST") => Self::LeaseLost,
            (_, "ETAG_MISMATCH") => Self::EtagMismatch { current_etag: facts.text("current_etag") },
            (_, "CURSOR_AHEAD") => {
                Self::CursorAhead { oldest_seq: facts.number("oldest_seq"), head_seq: facts.number("head_seq") }
            }
            (_, "CURSOR_EXPIRED") => {
                Self::CursorExpired { oldest_seq: facts.number("oldest_seq"), head_seq: facts.number("head_seq") }
            }
            (_, "EPOCH_CHANGED") => Self::EpochChanged { log_id: facts.text("log_id") },
            (Code::Unauthenticated, _) => Self::Unauthenticated { message },
            (Code::PermissionDenied, _) => Self::PermissionDenied { message },
            (Code::ResourceExhausted, _) => Self::Exhausted { reason, message, retry_after },
            (Code::Unavailable, _) => Self::Unavailable { reason, message, retry_after },
            (Code::DeadlineExceeded, _) => Self::DeadlineExceeded,
            _ => Self::Other { code, reason, message },
        }
    }
}

/// True of codes that a proxy may answer with when it does not reach the server.
fn may_come_from_between(code: Code) -> bool {
    match code {
        Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => true,
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::Unimplemented
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unauthenticated => false,
    }
}

/// The status's message, followed by the errors that caused it if the connection failed.
fn message_of(status: &Status) -> String {
    let mut message = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let text = error.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        source = error.source();
    }
    message
}

fn has_source<E: std::error::Error + 'static>(status: &Status) -> bool {
    std::error::Error::source(status).is_some_and(|source| source.is::<E>())
}

/// The metadata of an ErrorInfo. A missing value reads as empty or zero.
struct Facts(HashMap<String, String>);

impl Facts {
    fn text(&self, key: &str) -> String {
        self.0.get(key).cloned().unwrap_or_default()
    }

    fn number<T: std::str::FromStr + Default>(&self, key: &str) -> T {
        self.0.get(key).and_then(|text| text.parse().ok()).unwrap_or_default()
    }
}
