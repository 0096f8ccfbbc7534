//! Requests of BulkOperationService, and the filter that they share with lists.

use chrono::DateTime;
use jobledger_proto::v1 as pb;
use uuid::Uuid;

use super::{
    super::status::ApiError,
    check::{Check, digest},
};
use crate::domain::{
    bulk::{BulkAction, BulkRequest},
    clock::Time,
    edit::{EditableField, EditableFields},
    job::MAX_ERROR_CODE_CHARS,
    job_filter::JobFilter,
};

const DEFAULT_PAGE: usize = 50;
/// An operation may have 40 KiB, mostly of its filter.
const MAX_PAGE: usize = 50;
/// Longest reason: the event of each job repeats it.
const MAX_REASON_CHARS: usize = 200;

/// What an operation may change: everything but payloads.
const CHANGEABLE: [EditableField; 5] = [
    EditableField::Priority,
    EditableField::ScheduledAt,
    EditableField::Labels,
    EditableField::MaxAttempts,
    EditableField::RunTimeout,
];

impl Check {
    /// Checks the filters for jobs. `prefix` goes before their names in violations.
    pub(super) fn job_filter(&mut self, prefix: &str, filter: pb::JobFilter) -> JobFilter {
        let field = |name: &str| format!("{prefix}{name}");
        let statuses = self.statuses(&field("statuses"), &filter.statuses);
        let types = self.types(&field("types"), filter.types);
        self.labels(&field("labels"), &filter.labels);
        self.name(&field("requested_by"), &filter.requested_by);
        self.name(&field("idempotency_key"), &filter.idempotency_key);
        self.text(&field("error_code"), &filter.error_code, MAX_ERROR_CODE_CHARS);
        self.name(&field("worker_id"), &filter.worker_id);
        let mut time = |name, time: Option<_>| time.and_then(|time| self.time(&field(name), time));
        let created_after = time("created_after", filter.created_after);
        let created_before = time("created_before", filter.created_before);
        let finished_after = time("finished_after", filter.finished_after);
        let finished_before = time("finished_before", filter.finished_before);
        let given = |text: String| (!text.is_empty()).then_some(text);
        JobFilter {
            statuses,
            types,
            labels: filter.labels,
            requested_by: given(filter.requested_by),
            created_after,
            created_before,
            idempotency_key: given(filter.idempotency_key),
            error_code: given(filter.error_code),
            worker: given(filter.worker_id),
            finished_after,
            finished_before,
        }
    }
}

pub(in super::super) fn start_bulk(mut request: pb::StartBulkOperationRequest) -> Result<BulkRequest, ApiError> {
    let mut check = Check::default();
    let id = std::mem::take(&mut request.operation_id);
    let digest = digest(&request);
    let id = if id.is_empty() { Some(Uuid::now_v7()) } else { Uuid::try_parse(&id).ok() };
    check.that("operation_id", id.is_some(), || "must be a UUID".to_owned());
    let action = match pb::BulkAction::try_from(request.action) {
        Ok(pb::BulkAction::Cancel) => Some(BulkAction::Cancel),
        Ok(pb::BulkAction::Retry) => Some(BulkAction::Retry),
        Ok(pb::BulkAction::Update) => Some(BulkAction::Update),
        Ok(pb::BulkAction::Erase) => Some(BulkAction::Erase),
        Ok(pb::BulkAction::CancelAndErase) => Some(BulkAction::CancelAndErase),
        Ok(pb::BulkAction::Unspecified) | Err(_) => None,
    };
    check.that("action", action.is_some(), || match request.action {
        0 => "is required".to_owned(),
        action => format!("{action} is not an action"),
    });
    let edit = match (action, request.update) {
        (Some(BulkAction::Update), Some(changes)) => check.job_changes("update.", &CHANGEABLE, changes, false),
        (Some(BulkAction::Update), None) => {
            check.refuse("update", "is required for BULK_ACTION_UPDATE");
            EditableFields::default()
        }
        (_, update) => {
            check.that("update", update.is_none(), || "is only for BULK_ACTION_UPDATE".to_owned());
            EditableFields::default()
        }
    };
    let filter = check.job_filter("filter.", request.filter.unwrap_or_default());
    check.that("filter", filter != JobFilter::default() || request.expected_count.is_some(), || {
        "must restrict the jobs, unless expected_count says how many all of them are".to_owned()
    });
    check.text("reason", &request.reason, MAX_REASON_CHARS);
    check.that("expected_count", request.expected_count.is_none_or(|n| n >= 0), || "must not be negative".to_owned());
    check.finish()?;
    Ok(BulkRequest {
        id: id.unwrap_or_default(),
        action: action.unwrap_or(BulkAction::Cancel),
        edit,
        filter,
        reason: request.reason.into(),
        is_dry_run: request.dry_run,
        expected_count: request.expected_count,
        digest,
    })
}

/// The id of an operation.
pub(in super::super) fn operation(id: &str) -> Result<Uuid, ApiError> {
    let otherwise = if id.is_empty() { "is required" } else { "must be a UUID" };
    Uuid::try_parse(id).map_err(|_| ApiError::invalid("operation_id", otherwise.to_owned()))
}

/// Before which operation the page begins, and how many it has at most.
pub(in super::super) fn list_bulk(
    request: pb::ListBulkOperationsRequest,
) -> Result<(Option<(Time, Uuid)>, usize), ApiError> {
    let mut check = Check::default();
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let before = check.page_after(&request.page_token, parse);
    check.finish()?;
    Ok((before, limit))
}

/// The token of the page that begins before this operation.
pub(in super::super) fn bulk_token((time, id): (Time, Uuid)) -> String {
    format!("{}.{id}", time.timestamp_micros())
}

/// Parses a page token; `None` unless it is exactly as [`bulk_token`] writes it.
fn parse(token: &str) -> Option<(Time, Uuid)> {
    let (micros, id) = token.split_once('.')?;
    let place = (DateTime::from_timestamp_micros(micros.parse().ok()?)?, Uuid::try_parse(id).ok()?);
    // No operation began before 1970 or after 9999.
    let is_possible = (0..=253_402_300_799_999_999).contains(&place.0.timestamp_micros());
    (is_possible && bulk_token(place) == token).then_some(place)
}
