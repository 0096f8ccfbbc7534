//! What can go wrong, by what to do about it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jobledger_proto::v1::JobStatus;
use prost::Message as _;
use thiserror::Error;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The domain of the service's ErrorInfo.
const DOMAIN: &str = "jobledger";

/// Why a call failed. Built from the google.rpc.ErrorInfo that every error of the service carries.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum Error {
    /// The request breaks the contract (`INVALID_FIELD`): correct it.
    #[error("invalid request: {message}")]
    InvalidRequest {
        /// All of it in one line.
        message: String,
        /// Field by field.
        violations: Vec<Violation>,
    },
    /// A payload or result is over its limit (`PAYLOAD_TOO_LARGE`): store it elsewhere and refer to it.
    #[error("{message}")]
    PayloadTooLarge {
        /// What is too large.
        message: String,
        /// The limit in encoded bytes.
        limit: usize,
        /// What it took.
        size: usize,
    },
    /// The org has no such job (`JOB_NOT_FOUND`).
    #[error("no job {job_id}")]
    JobNotFound {
        /// The id asked for.
        job_id: String,
    },
    /// The idempotency key came with a different request before (`IDEMPOTENCY_KEY_REUSED`).
    #[error("the idempotency key was used with a different request, for job {existing_job_id}")]
    IdempotencyKeyReused {
        /// The job of that request.
        existing_job_id: String,
    },
    /// The job's status does not allow it (`INVALID_TRANSITION`).
    #[error("the job is {}, which does not allow this", current.as_str_name())]
    InvalidTransition {
        /// Where the job stands.
        current: JobStatus,
    },
    /// The job is not, or no longer, held under the lease (`LEASE_LOST`): stop working on it.
    #[error("the lease is lost")]
    LeaseLost,
    /// The job has changed since its etag was read (`ETAG_MISMATCH`): read it again.
    #[error("the job has changed; its etag is {current_etag}")]
    EtagMismatch {
        /// The job's etag now.
        current_etag: String,
    },
    /// The cursor is beyond the head of the log (`CURSOR_AHEAD`): it comes from another log.
    #[error("the cursor is beyond the head of the log, {head_seq}")]
    CursorAhead {
        /// The lowest `seq` kept.
        oldest_seq: i64,
        /// The head.
        head_seq: i64,
    },
    /// The events after the cursor are no longer kept (`CURSOR_EXPIRED`).
    #[error("the events after the cursor are no longer kept; the oldest is {oldest_seq}")]
    CursorExpired {
        /// The lowest `seq` kept.
        oldest_seq: i64,
        /// The head.
        head_seq: i64,
    },
    /// The cursor belongs to another log than the service has now (`EPOCH_CHANGED`): its database was restored from a backup, or
    /// replaced by a standby that lacks commits. Begin anew, with a snapshot.
    #[error("the cursor belongs to another log; this one is {log_id}")]
    EpochChanged {
        /// The log that the service has.
        log_id: String,
    },
    /// An event is missing, came twice, or is out of order: a defect of the service, noticed in builds with debug assertions.
    #[error("event {found_seq} came after {after_seq}")]
    OutOfOrder {
        /// What had come.
        after_seq: i64,
        /// What came next.
        found_seq: i64,
    },
    /// The service doesn't know who calls, or no longer (`UNAUTHENTICATED`): a [`Token`](crate::Token) is missing, has expired or
    /// was revoked.
    #[error("unauthenticated: {message}")]
    Unauthenticated {
        /// For people.
        message: String,
    },
    /// Who calls may not do this (`PERMISSION_DENIED`).
    #[error("permission denied: {message}")]
    PermissionDenied {
        /// For people.
        message: String,
    },
    /// Something is used up: queues, streams, types, disk, or what the org may take at a time (`OVERLOADED`, `RATE_LIMITED`,
    /// `TOO_MANY_STREAMS`, `TOO_MANY_TYPES`, `QUOTA_EXCEEDED`, `STORAGE_FULL`).
    #[error("{reason}: {message}")]
    Exhausted {
        /// The service's reason.
        reason: String,
        /// For people.
        message: String,
        /// When to come back, where waiting helps.
        retry_after: Option<Duration>,
    },
    /// The service can't be reached or can't work now. A write may or may not have happened.
    #[error("unavailable: {message}")]
    Unavailable {
        /// The service's reason; empty when the connection failed.
        reason: String,
        /// For people.
        message: String,
        /// When to come back.
        retry_after: Option<Duration>,
    },
    /// The deadline passed. A write may or may not have happened.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// Anything else the service said.
    #[error("{code:?} {reason}: {message}")]
    Other {
        /// gRPC's code.
        code: Code,
        /// The service's reason, if it gave one.
        reason: String,
        /// For people.
        message: String,
    },
    /// A payload or result is not what it was taken for.
    #[error("JSON: {0}")]
    Json(#[source] Arc<serde_json::Error>),
    /// A payload or result holds a number that may arrive as another: the contract's numbers are doubles, which tell whole numbers
    /// apart below ±2⁵³. Send it as a string.
    #[error("{path}: {number} is ±2^53 or beyond, where a double may not give it back; send it as a string")]
    Number {
        /// Where it is, as `payload.items[2].id`.
        path: String,
        /// The number.
        number: String,
    },
    /// The text is not that of a [`Cursor`](crate::Cursor).
    #[error("{0:?} is not a cursor: expected LOG_ID:SEQ")]
    Cursor(String),
    /// The token has characters that no token has.
    #[error("that is no token: it has characters that a header can't have")]
    Token,
    /// There is no tokio runtime, or it can't do what is asked of it.
    #[error("{0}")]
    Runtime(String),
    /// A worker can't be made so: it has no handler, or two for one type.
    #[error("{0}")]
    Worker(String),
    /// The endpoint is not of the form `http://HOST:PORT` or `https://HOST:PORT`, or its certificates can't be used.
    #[error("invalid endpoint {0}")]
    Endpoint(String),
}

/// A field that breaks the contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its name in the contract.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

impl Error {
    /// True if the same call may go through later though nothing is changed: the service was away or overloaded, the connection broke,
    /// or something in between answered in its place. Whether repeating it is safe is another question.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::DeadlineExceeded => true,
            Self::Exhausted { reason, .. } => !matches!(reason.as_str(), "TOO_MANY_TYPES" | "MESSAGE_TOO_LARGE"),
            // The service gives a reason for whatever it says: its own defects don't mend themselves.
            Self::Other { code, reason, .. } => reason.is_empty() && may_come_from_between(*code),
            Self::InvalidRequest { .. }
            | Self::PayloadTooLarge { .. }
            | Self::JobNotFound { .. }
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

    /// True if nothing was decided, and the service said when to come back: repeating the call is safe, whatever it is.
    pub(crate) fn is_refused_for_now(&self) -> bool {
        matches!(self, Self::Exhausted { retry_after: Some(_), .. })
    }

    /// True if the service was away or the connection broke.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// For an answer that the contract rules out.
    pub(crate) fn without_job() -> Self {
        Self::without("a job")
    }

    /// The same, of anything.
    pub(crate) fn without(what: &str) -> Self {
        let (reason, message) = ("INVALID_ANSWER".to_owned(), format!("the answer is without {what}"));
        Self::Other { code: Code::Internal, reason, message }
    }

    /// When the service said to come back.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } | Self::Exhausted { retry_after, .. } => *retry_after,
            Self::InvalidRequest { .. }
            | Self::PayloadTooLarge { .. }
            | Self::JobNotFound { .. }
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

/// The error of one item of a batch.
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
                // The service gives a reason for whatever it says. Unknown is what tonic makes of a stream that was cut.
                Code::Unavailable | Code::Unknown => Self::Unavailable { reason: String::new(), message, retry_after },
                // tonic's own timer was quicker than ours.
                Code::Cancelled if has_source::<tonic::TimeoutExpired>(&status) => Self::DeadlineExceeded,
                // Made here, not there: the connection broke. What tonic makes of that depends on when it did.
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
            (_, "JOB_NOT_FOUND") => Self::JobNotFound { job_id: facts.text("job_id") },
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

/// True of what a proxy may say of a server that it does not reach.
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

/// The status's message, and what lies behind it where the connection failed.
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

/// The metadata of an ErrorInfo. What is missing reads as empty or zero.
struct Facts(HashMap<String, String>);

impl Facts {
    fn text(&self, key: &str) -> String {
        self.0.get(key).cloned().unwrap_or_default()
    }

    fn number<T: std::str::FromStr + Default>(&self, key: &str) -> T {
        self.0.get(key).and_then(|text| text.parse().ok()).unwrap_or_default()
    }
}
