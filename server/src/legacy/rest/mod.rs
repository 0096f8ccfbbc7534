//! The REST calls of the service that jobledger replaces, for its clients: the same paths, words and JSON, and errors
//! in the form of FastAPI.

mod body;
mod error;
pub(crate) mod fuzzing;
mod receive;
mod report;

use axum::{
    Extension, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse as _, Response},
    routing::{any, get, post},
};
use jobledger_proto::v1 as pb;
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use self::{
    body::{Body, Fields},
    error::Problem,
    report::{OldReport, report_command},
};
use super::{error_text, isoformat, old_word};
use crate::{
    api::{ApiError, Caller, View, create_command},
    domain::{
        event::JobError,
        id::JobId,
        job::{Job, JobContents},
        json::Json,
        status::JobStatus,
    },
    ledger::{JobReply, Ledger, LedgerError},
};

/// The routes of the old calls.
pub(crate) fn routes(ledger: Ledger, request_bytes: usize) -> Router {
    let not_allowed = || async { Problem::text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed").into_response() };
    Router::new()
        .route("/jobs", post(create))
        .route("/jobs/{job_id}", get(read))
        .route("/jobs/{job_id}/status", post(update))
        .route("/jobs/", any(redirect))
        .route("/jobs/{job_id}/", any(redirect))
        .route("/jobs/{job_id}/status/", any(redirect))
        .route("/jobs/{job_id}/{*rest}", any(nowhere))
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(request_bytes, receive::receive))
        .with_state(ledger)
}

/// The answer to the old calls where they are off.
pub(crate) fn no_routes() -> Router {
    let off = || async {
        let detail = "Not Found: the old REST calls are off; start the server with --legacy-http";
        Problem::text(StatusCode::NOT_FOUND, detail).into_response()
    };
    Router::new().route("/jobs", any(off)).route("/jobs/", any(off)).route("/jobs/{*rest}", any(off))
}

/// Redirects a path with a trailing slash, as FastAPI does.
async fn redirect(uri: Uri) -> Response {
    let path = uri.path().trim_end_matches('/');
    let to = uri.query().map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    match HeaderValue::try_from(to) {
        Ok(to) => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response(),
        Err(_) => nowhere().await,
    }
}

async fn nowhere() -> Response {
    Problem::text(StatusCode::NOT_FOUND, "Not Found").into_response()
}

/// `POST /jobs`: `{"type": …}`.
async fn create(
    State(ledger): State<Ledger>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Created {
        job_id: String,
    }
    let job_type = read_create(&headers, &bytes)?;
    let command = create_command(pb::CreateJobRequest { r#type: job_type, ..Default::default() }, &caller)?;
    let JobReply { job, .. } = ledger.submit(caller.by, command).await.map_err(ApiError::from)?;
    Ok(answer(StatusCode::OK, &Created { job_id: job.id.to_string() }))
}

/// Reads the body of `POST /jobs`: the job's type.
fn read_create(headers: &HeaderMap, bytes: &[u8]) -> Result<String, Problem> {
    let body = Body::read(headers, bytes)?;
    let mut fields = Fields::of(&body)?;
    let job_type = fields.job_type();
    fields.finish()?;
    Ok(job_type)
}

/// Reads the body of `POST /jobs/{job_id}/status`.
fn read_update(headers: &HeaderMap, bytes: &[u8]) -> Result<OldReport, Problem> {
    let body = Body::read(headers, bytes)?;
    let mut fields = Fields::of(&body)?;
    let (status, news) = (fields.status(), fields.news());
    let (result, error) = (fields.result(), fields.error());
    fields.finish()?;
    Ok(OldReport { status, news, result, error })
}

/// Reads bytes as each of the two bodies. Returns the HTTP status of a refusal.
fn read_any(headers: &HeaderMap, bytes: &[u8]) -> [Result<(), StatusCode>; 2] {
    [read_create(headers, bytes).map(|_| ()), read_update(headers, bytes).map(|_| ())]
        .map(|read| read.map_err(|problem| problem.into_response().status()))
}

/// `GET /jobs/{job_id}`.
async fn read(
    State(ledger): State<Ledger>,
    Extension(caller): Extension<Caller>,
    Path(job_id): Path<String>,
) -> Result<Response, Problem> {
    let id = job_id_of(&job_id)?;
    let (record, _turn) = ledger.job(caller.org(), id).await.map_err(ApiError::from)?;
    match caller.view() {
        View::Whole => Ok(job_as_it_was(&record.job, &record.contents)),
        View::WithoutContents => {
            let last_error = record.job.last_error.clone().map(|error| JobError { message: "".into(), ..error });
            let job = Job { last_error, ..record.job.clone() };
            Ok(job_as_it_was(&job, &JobContents::default()))
        }
    }
}

/// `POST /jobs/{job_id}/status`: a worker's report, with the arguments of the old `_update_job_status`.
async fn update(
    State(ledger): State<Ledger>,
    Extension(caller): Extension<Caller>,
    Path(job_id): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Problem> {
    let (org, id) = (caller.org(), job_id_of(&job_id)?);
    let report = read_update(&headers, &bytes)?;
    let status = report.status;
    if report.result.is_some() && !matches!(status, Some(JobStatus::Succeeded | JobStatus::Failed)) {
        let detail = "a result is allowed only with the status completed or failed";
        return Err(Problem::text(StatusCode::CONFLICT, detail));
    }
    // The old words have none for a dead letter.
    let wanted = status.map(|status| if status == JobStatus::DeadLetter { status.as_str() } else { old_word(status) });
    let command = report_command(id, report);
    let job = match ledger.submit(caller.by, command).await {
        Ok(reply) => reply.job,
        Err(LedgerError::Transition(refused)) => return Err(Problem::refused(&refused, wanted)),
        Err(error) => return Err(ApiError::from(error).into()),
    };
    let mut contents = JobContents::default();
    if job.result_at.is_some() {
        let turn = ledger.read_turn(org).await.map_err(ApiError::from)?;
        let found = turn.contents(org, vec![id]).await.map_err(ApiError::from)?;
        contents = found.into_iter().next().map(|(_, contents)| contents).unwrap_or_default();
    }
    Ok(job_as_it_was(&job, &contents))
}

fn job_id_of(text: &str) -> Result<JobId, Problem> {
    Uuid::try_parse(text).map(JobId).map_err(|error| Problem::no_uuid(["path", "job_id"], text, &error))
}

/// A job in the old words. The fields and their order are those of the old `JobStatusResponse`.
fn job_as_it_was(job: &Job, contents: &JobContents) -> Response {
    #[derive(Serialize)]
    struct JobStatusResponse<'a> {
        id: String,
        status: &'static str,
        stage: Option<&'a str>,
        progress: u8,
        result: Option<&'a RawValue>,
        error: Option<&'a str>,
        created_at: String,
        updated_at: String,
    }
    // The exact text, so that numbers keep all their digits.
    let raw = |json: &'_ Json| serde_json::from_str::<Box<RawValue>>(json.as_str()).ok();
    let result = contents.result.as_ref().and_then(raw);
    answer(
        StatusCode::OK,
        &JobStatusResponse {
            id: job.id.to_string(),
            status: old_word(job.status),
            stage: job.stage.as_deref(),
            progress: job.progress.unwrap_or_default(),
            result: result.as_deref(),
            // A failure without code and message has no error.
            error: job.last_error.as_ref().map(error_text).filter(|text| !text.is_empty()),
            created_at: isoformat(job.created_at),
            updated_at: isoformat(job.updated_at),
        },
    )
}

fn answer(code: StatusCode, body: &impl Serialize) -> Response {
    let text = serde_json::to_string(body).expect("strings, numbers and raw JSON serialise");
    (code, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}
