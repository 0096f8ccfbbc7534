//! Errors of the old REST calls, in the form that FastAPI gave them.

use std::time::Duration;

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tonic::Code;

use super::{super::old_word, answer};
use crate::{
    api::{ApiError, http_code},
    domain::transition::TransitionError,
};

/// An error answer: `{"detail": …}`.
#[derive(Debug)]
pub(super) struct Problem {
    code: StatusCode,
    detail: Value,
    retry: Option<Duration>,
}

impl Problem {
    /// An error with a sentence as its detail.
    pub(super) fn text(code: StatusCode, detail: impl Into<String>) -> Self {
        Self { code, detail: Value::String(detail.into()), retry: None }
    }

    /// A 422 for an invalid request, with a list of errors as its detail.
    pub(super) fn invalid(errors: Vec<Value>) -> Self {
        Self { code: StatusCode::UNPROCESSABLE_ENTITY, detail: Value::Array(errors), retry: None }
    }

    pub(super) fn no_uuid(place: [&str; 2], text: &str, error: &uuid::Error) -> Self {
        let error = error.to_string();
        let message = format!("Input should be a valid UUID, {error}");
        Self::invalid(vec![
            json!({"type": "uuid_parsing", "loc": place, "msg": message, "input": text, "ctx": {"error": error}}),
        ])
    }

    /// A 409 for a report that the state machine refuses, with statuses in the old words.
    pub(super) fn refused(refused: &TransitionError, wanted: Option<&str>) -> Self {
        let detail = match (refused, wanted) {
            (TransitionError::InvalidTransition { current }, Some(wanted)) => {
                format!("The job is {}, and can't become {wanted}", old_word(*current))
            }
            (TransitionError::InvalidTransition { current }, None) => {
                format!("The job is {}, so no worker is processing it", old_word(*current))
            }
            (TransitionError::LeaseLost, _) => {
                "The job is held by a worker under a lease, and only that worker may report on it".to_owned()
            }
            (
                TransitionError::EtagMismatch { .. }
                | TransitionError::PayloadOutdated
                | TransitionError::Erased { .. },
                _,
            ) => refused.to_string(),
        };
        Self::text(StatusCode::CONFLICT, detail)
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        let (code, message, retry) = error.in_short();
        if code == Code::NotFound {
            // The old service's message.
            return Self::text(StatusCode::NOT_FOUND, "Job not found");
        }
        Self { retry, ..Self::text(http_code(code), message) }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = answer(self.code, &json!({ "detail": self.detail }));
        if let Some(wait) = self.retry {
            let seconds = wait.as_secs_f64().ceil() as u64;
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
