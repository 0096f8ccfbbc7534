//! Validates requests and converts them into commands. A refusal names every violation.

mod bulk;
mod check;
mod edit;
mod job_types;
mod list;
mod orgs;
mod page;
mod read;
mod spec;
mod tokens;
mod work;
mod workers;

use std::sync::Arc;

use jobledger_proto::v1 as pb;
use prost::Message as _;
use uuid::Uuid;

pub(crate) use self::check::ending_digest;
use self::check::{Check, digest};
pub(super) use self::{
    bulk::{bulk_token, list_bulk, operation, start_bulk},
    edit::edit,
    job_types::{delete_type, get_type, list_types, pause_type, resume_type, update_type},
    list::{Listing, list},
    orgs::list_orgs,
    page::token_after,
    read::{statistics, subscribe},
    tokens::{create_token, list_tokens, revoke_token},
    work::{claim, heartbeat},
    workers::list_workers,
};
use super::{caller::Caller, status::ApiError};
use crate::{
    domain::{
        id::JobId,
        job::{DEFAULT_MAX_LOST_ATTEMPTS, Idempotency, JobSpec},
        transition::{self, Cancel, Erase, Report, Retry},
    },
    ledger::{Command, Create},
};

/// The metadata key that names the org.
pub(super) const ORG_HEADER: &str = "x-org-id";

const MAX_LOST_ATTEMPTS: i32 = 100;
/// Items of one batch call.
const MAX_ITEMS: usize = 1_000;

/// Refuses a batch call without items or with too many.
pub(super) fn items(field: &str, n: usize) -> Result<(), ApiError> {
    if (1..=MAX_ITEMS).contains(&n) {
        return Ok(());
    }
    Err(ApiError::invalid(field, format!("must be 1 to {MAX_ITEMS}, not {n}")))
}

/// How a request names a job.
pub(super) enum JobName {
    Id(JobId),
    Key(String),
}

pub(super) fn get(request: pb::GetJobRequest) -> Result<JobName, ApiError> {
    let mut check = Check::default();
    let name = if request.idempotency_key.is_empty() {
        JobName::Id(check.job_id(&request.job_id))
    } else {
        check.that("job_id", request.job_id.is_empty(), || "must not be combined with idempotency_key".to_owned());
        check.name("idempotency_key", &request.idempotency_key);
        JobName::Key(request.idempotency_key)
    };
    check.finish()?;
    Ok(name)
}

pub(super) fn explain(request: &pb::ExplainJobRequest) -> Result<JobId, ApiError> {
    let mut check = Check::default();
    let job = check.job_id(&request.job_id);
    check.finish()?;
    Ok(job)
}

pub(crate) fn create(mut request: pb::CreateJobRequest, caller: &Caller) -> Result<Command, ApiError> {
    let mut check = Check::default();
    let key = std::mem::take(&mut request.idempotency_key);
    // Digest of the request as received, without its key: a field set to its default differs from an absent one.
    let idempotency =
        (!key.is_empty()).then(|| Idempotency { digest: Some(digest(&request)), key: Arc::from(key.as_str()) });
    check.name("idempotency_key", &key);
    check.job_type("type", &request.r#type);
    check.name("requested_by", &request.requested_by);
    check.labels("labels", &request.labels);
    let priority = check.priority("", request.priority);
    let max_attempts = check.max_attempts("", request.max_attempts);
    let max_lost_attempts = request.max_lost_attempts.unwrap_or(DEFAULT_MAX_LOST_ATTEMPTS);
    check.that("max_lost_attempts", (0..=MAX_LOST_ATTEMPTS).contains(&max_lost_attempts), || {
        format!("must be 0 to {MAX_LOST_ATTEMPTS}")
    });
    let retry_policy = check.retry_policy(request.retry_policy.as_ref());
    let scheduled_at = request.scheduled_at.and_then(|time| check.time("scheduled_at", time));
    let run_timeout = check.run_timeout("", request.run_timeout.as_ref());
    let requested_by = match caller.name() {
        Some(name) if request.requested_by.is_empty() => Arc::clone(name),
        _ => request.requested_by.into(),
    };
    let payload = check.value("payload", request.payload.as_ref());
    let payload_bytes = request.payload.as_ref().map_or(0, |payload| payload.encoded_len() as u32);
    check.finish()?;
    Ok(Command::Create(Box::new(Create {
        id: JobId(Uuid::now_v7()),
        spec: Arc::new(JobSpec {
            job_type: request.r#type.into(),
            priority,
            max_attempts,
            max_lost_attempts,
            retry_policy,
            idempotency,
            requested_by,
            labels: Arc::new(request.labels),
            run_timeout,
            payload_bytes,
        }),
        payload,
        scheduled_at,
    })))
}

pub(super) fn update(mut request: pb::UpdateJobStatusRequest) -> Result<Command, ApiError> {
    let mut check = Check::default();
    let job = check.job_id(&request.job_id);
    let news = check.news("", request.stage.take(), request.progress, std::mem::take(&mut request.message));
    let step = check.step(&request);
    let lease = check.lease_token("lease_token", request.lease_token);
    let etag = check.token("etag", request.etag);
    check.finish()?;
    let report = Report { step, news, lease, etag, actor: Arc::default() };
    Ok(Command::Apply { job, command: Box::new(transition::Command::Report(report)) })
}

pub(super) fn cancel(request: pb::CancelJobRequest) -> Result<Command, ApiError> {
    let mut check = Check::default();
    let job = check.job_id(&request.job_id);
    check.bytes("reason", &request.reason);
    let etag = check.token("etag", request.etag);
    check.finish()?;
    let cancel = Cancel { reason: request.reason.into(), etag, actor: Arc::default() };
    Ok(Command::Apply { job, command: Box::new(transition::Command::Cancel(cancel)) })
}

pub(super) fn retry(request: pb::RetryJobRequest) -> Result<Command, ApiError> {
    let mut check = Check::default();
    let job = check.job_id(&request.job_id);
    let etag = check.token("etag", request.etag);
    check.name("request_id", &request.request_id);
    check.finish()?;
    let request = (!request.request_id.is_empty()).then(|| request.request_id.into());
    let retry = Retry { etag, request, actor: Arc::default() };
    Ok(Command::Apply { job, command: Box::new(transition::Command::Retry(retry)) })
}

pub(super) fn erase(request: pb::EraseJobRequest) -> Result<(JobId, Erase), ApiError> {
    let mut check = Check::default();
    let job = check.job_id(&request.job_id);
    let etag = check.token("etag", request.etag);
    check.finish()?;
    Ok((job, Erase { cancel: request.cancel, etag, actor: Arc::default() }))
}
