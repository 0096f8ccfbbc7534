//! `bulk_operation`: rows of bulk operations, the same for both databases.

use std::{collections::BTreeMap, sync::Arc};

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    JobPage, ListOrder, ListQuery, StoreError,
    detail::FieldsText,
    rows::{Columns, damaged, json_text},
    value::Value,
};
use crate::domain::{
    bulk::{BulkAction, BulkOperation, BulkRequest, BulkStatus},
    clock::Time,
    id::{JobId, OrgId},
    job::Job,
    job_filter::JobFilter,
    status::JobStatus,
};

/// The columns of `bulk_operation`, in the order in which they are written and, without `org_id`, read.
pub(super) const BULK_COLUMNS: [&str; 14] = [
    "org_id",
    "id",
    "created_at",
    "updated_at",
    "finished_at",
    "status",
    "request",
    "through_seq",
    "cursor",
    "matched",
    "reached",
    "changed",
    "unchanged",
    "failed",
];

/// Finished operations that an org keeps.
pub(super) const BULK_KEPT: i64 = 1_000;

/// [`BULK_COLUMNS`] of a table or alias, without `org_id`.
pub(super) fn bulk_columns(row: &str) -> String {
    BULK_COLUMNS[1..].iter().map(|name| format!("{row}.{name}")).collect::<Vec<_>>().join(", ")
}

/// What a batch needs of bulk operations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BulkNeeds {
    /// Operations by id.
    pub ids: Vec<Uuid>,
    /// How many are under way.
    pub is_counting: bool,
    /// The next step of the oldest one under way, with at most this many jobs.
    pub step: Option<usize>,
}

/// What the database has of [`BulkNeeds`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FoundBulk {
    /// The operations that were asked for.
    pub operations: Vec<BulkOperation>,
    /// How many are under way.
    pub open: usize,
    /// The next step.
    pub step: Option<BulkStep>,
}

impl FoundBulk {
    /// True if the next step erases this job.
    pub(super) fn erases(&self, job: JobId) -> bool {
        let Some(step) = &self.step else { return false };
        let is_of = |operation: &&BulkOperation| operation.request.id == step.operation;
        let erases =
            |operation: &BulkOperation| operation.status == BulkStatus::Running && operation.request.action.erases();
        self.operations.iter().find(is_of).is_some_and(erases) && step.jobs.contains(&job)
    }
}

/// The next step of a bulk operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BulkStep {
    /// The operation.
    pub operation: Uuid,
    /// The jobs that matched when this was read, by `created_seq`.
    pub jobs: Vec<JobId>,
    /// The cursor after them. `None`: there are no more.
    pub next: Option<i64>,
}

/// A page of bulk operations, the newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct BulkPage {
    /// The operations.
    pub operations: Vec<BulkOperation>,
    /// The `before` of the next page, `None` at the end.
    pub next: Option<(Time, Uuid)>,
}

/// What was asked for, in JSON. Times are microseconds since 1970. Absent values are left out.
#[derive(Serialize, Deserialize)]
struct RequestText {
    action: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    actor: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_count: Option<i64>,
    /// In hexadecimal digits.
    digest: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    statuses: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    types: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requested_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_after: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_before: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idempotency_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_after: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_before: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    edit: Option<FieldsText>,
}

impl RequestText {
    fn of(operation: &BulkOperation) -> Self {
        let BulkRequest { action, edit, filter, reason, is_dry_run, expected_count, digest, .. } = &operation.request;
        let micros = |time: Option<Time>| time.map(|time| time.timestamp_micros());
        Self {
            action: action.as_str().to_owned(),
            reason: reason.to_string(),
            actor: operation.actor.to_string(),
            dry_run: *is_dry_run,
            expected_count: *expected_count,
            digest: digest.to_string(),
            statuses: filter.statuses.iter().map(|status| status.as_str().to_owned()).collect(),
            types: filter.types.clone(),
            labels: filter.labels.clone(),
            requested_by: filter.requested_by.clone(),
            created_after: micros(filter.created_after),
            created_before: micros(filter.created_before),
            idempotency_key: filter.idempotency_key.clone(),
            error_code: filter.error_code.clone(),
            worker: filter.worker.clone(),
            finished_after: micros(filter.finished_after),
            finished_before: micros(filter.finished_before),
            edit: (!edit.is_empty()).then(|| FieldsText::of(edit)),
        }
    }

    fn read(self, id: Uuid) -> Result<(BulkRequest, Arc<str>), StoreError> {
        let odd = || damaged("bulk operation");
        let time = |micros: Option<i64>| {
            micros.map(|micros| DateTime::from_timestamp_micros(micros).ok_or_else(odd)).transpose()
        };
        let statuses = self.statuses.iter().map(|name| JobStatus::parse(name).ok_or_else(odd));
        let filter = JobFilter {
            statuses: statuses.collect::<Result<_, _>>()?,
            types: self.types,
            labels: self.labels,
            requested_by: self.requested_by,
            created_after: time(self.created_after)?,
            created_before: time(self.created_before)?,
            idempotency_key: self.idempotency_key,
            error_code: self.error_code,
            worker: self.worker,
            finished_after: time(self.finished_after)?,
            finished_before: time(self.finished_before)?,
        };
        let request = BulkRequest {
            id,
            action: BulkAction::parse(&self.action).ok_or_else(odd)?,
            edit: self.edit.map(FieldsText::read).transpose()?.unwrap_or_default(),
            filter,
            reason: self.reason.into(),
            is_dry_run: self.dry_run,
            expected_count: self.expected_count,
            digest: self.digest.parse().map_err(|()| odd())?,
        };
        Ok((request, self.actor.into()))
    }
}

/// The values of [`BULK_COLUMNS`].
pub(super) fn values(org: OrgId, operation: &BulkOperation) -> Vec<Value<'_>> {
    vec![
        org.0.into(),
        operation.request.id.into(),
        operation.created_at.into(),
        operation.updated_at.into(),
        operation.finished_at.into(),
        operation.status.as_str().into(),
        request_text(operation).into(),
        operation.through_seq.into(),
        operation.cursor.into(),
        operation.matched.into(),
        operation.reached.into(),
        operation.changed.into(),
        operation.unchanged.into(),
        failed_text(operation).into(),
    ]
}

pub(super) fn request_text(operation: &BulkOperation) -> String {
    json_text(&RequestText::of(operation))
}

pub(super) fn failed_text(operation: &BulkOperation) -> String {
    json_text(&operation.failed)
}

/// Reads [`BULK_COLUMNS`] without `org_id`.
pub(super) fn read<'r>(columns: &mut impl Columns<'r>) -> Result<BulkOperation, StoreError> {
    let odd = |_| damaged("bulk operation");
    let id = columns.uuid()?;
    let (created_at, updated_at, finished_at) = (columns.time()?, columns.time()?, columns.optional_time()?);
    let status = BulkStatus::parse(columns.text()?).ok_or_else(|| damaged("bulk operation"))?;
    let (request, actor) = serde_json::from_str::<RequestText>(columns.text()?).map_err(odd)?.read(id)?;
    Ok(BulkOperation {
        request,
        actor,
        status,
        through_seq: columns.long()?,
        cursor: columns.long()?,
        matched: columns.long()?,
        reached: columns.long()?,
        changed: columns.long()?,
        unchanged: columns.long()?,
        failed: serde_json::from_str(columns.text()?).map_err(odd)?,
        created_at,
        updated_at,
        finished_at,
    })
}

/// The query of the next step: of the jobs that an operation counts, or acts on.
pub(super) fn step_query(operation: &BulkOperation, limit: usize) -> ListQuery {
    let limit = if operation.status == BulkStatus::Counting { COUNTED_PER_REACHED * limit } else { limit };
    let after = operation.cursor;
    ListQuery { after, is_step: true, ..ListQuery::first(operation.filter(), ListOrder::OldestFirst, limit) }
}

/// So many jobs are counted in about the time in which one is acted on.
const COUNTED_PER_REACHED: usize = 10;

/// The step of an operation for which this page was read, and the jobs to act on. Jobs that are merely counted are not needed.
pub(super) fn step(operation: &BulkOperation, page: JobPage) -> (BulkStep, Vec<Job>) {
    let JobPage { mut jobs, next, .. } = page;
    let is_through = jobs.last().is_some_and(|last| last.created_seq > operation.through_seq)
        || next.is_some_and(|next| next >= operation.through_seq);
    jobs.retain(|job| job.created_seq <= operation.through_seq);
    let ids = jobs.iter().map(|job| job.id).collect();
    let step = BulkStep { operation: operation.request.id, jobs: ids, next: next.filter(|_| !is_through) };
    (step, if operation.status == BulkStatus::Counting { Vec::new() } else { jobs })
}

/// The page of these operations, which are one more than the limit if there are more.
pub(super) fn page(mut operations: Vec<BulkOperation>, limit: usize) -> BulkPage {
    let is_cut = operations.len() > limit;
    operations.truncate(limit);
    let next = operations.last().filter(|_| is_cut).map(|last| (last.created_at, last.request.id));
    BulkPage { operations, next }
}
