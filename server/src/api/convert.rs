//! Converts domain values into messages of the contract.

use std::time::Duration;

use jobledger_proto::v1::{self as pb, org_event::Change};

use super::{caller::View, json};
use crate::domain::{
    bulk::{BulkAction, BulkOperation, BulkStatus},
    clock::Time,
    edit::{EditableFields, JobEdit},
    event::{EventKind, JobEvent},
    id::OrgId,
    job::{Job, JobContents, JobRecord},
    job_filter::JobFilter,
    job_type::{Pause, TypeSettings},
    org_event::{OrgChange, OrgEvent},
    status::JobStatus,
};

pub(crate) fn status(status: JobStatus) -> pb::JobStatus {
    match status {
        JobStatus::Queued => pb::JobStatus::Queued,
        JobStatus::Running => pb::JobStatus::Running,
        JobStatus::Succeeded => pb::JobStatus::Succeeded,
        JobStatus::Failed => pb::JobStatus::Failed,
        JobStatus::Canceled => pb::JobStatus::Canceled,
        JobStatus::DeadLetter => pb::JobStatus::DeadLetter,
    }
}

fn kind(kind: EventKind) -> pb::JobEventKind {
    match kind {
        EventKind::Created => pb::JobEventKind::Created,
        EventKind::Claimed => pb::JobEventKind::Claimed,
        EventKind::Started => pb::JobEventKind::Started,
        EventKind::Progress => pb::JobEventKind::Progress,
        EventKind::Succeeded => pb::JobEventKind::Succeeded,
        EventKind::Failed => pb::JobEventKind::Failed,
        EventKind::RetryScheduled => pb::JobEventKind::RetryScheduled,
        EventKind::Released => pb::JobEventKind::Released,
        EventKind::CancelRequested => pb::JobEventKind::CancelRequested,
        EventKind::Canceled => pb::JobEventKind::Canceled,
        EventKind::DeadLettered => pb::JobEventKind::DeadLettered,
        EventKind::Requeued => pb::JobEventKind::Requeued,
        EventKind::Imported => pb::JobEventKind::Imported,
        EventKind::Lost => pb::JobEventKind::Lost,
        EventKind::Edited => pb::JobEventKind::Edited,
        EventKind::Erased => pb::JobEventKind::Erased,
    }
}

pub(super) fn timestamp(time: Time) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.timestamp(), nanos: time.timestamp_subsec_nanos() as i32 }
}

pub(super) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration { seconds: duration.as_secs() as i64, nanos: duration.subsec_nanos() as i32 }
}

/// A job without payload and result.
pub(super) fn job(job: &Job) -> pb::Job {
    let spec = &job.spec;
    let error = job.last_error.as_ref();
    pb::Job {
        id: job.id.to_string(),
        org_id: job.org_id.to_string(),
        r#type: spec.job_type.to_string(),
        status: status(job.status).into(),
        attempt: job.attempt,
        max_attempts: spec.max_attempts,
        priority: spec.priority,
        idempotency_key: spec.idempotency.as_ref().map(|idempotency| idempotency.key.to_string()).unwrap_or_default(),
        requested_by: spec.requested_by.to_string(),
        labels: (*spec.labels).clone(),
        payload: None,
        stage: job.stage.as_ref().map(ToString::to_string),
        progress: job.progress.map(i32::from),
        result: None,
        created_at: Some(timestamp(job.created_at)),
        updated_at: Some(timestamp(job.updated_at)),
        started_at: job.started_at.map(timestamp),
        finished_at: job.finished_at.map(timestamp),
        scheduled_at: job.scheduled_at.map(timestamp),
        lease_expires_at: lease_end(job),
        worker_id: job.lease.as_ref().map(|lease| lease.worker.to_string()).unwrap_or_default(),
        cancel_requested: job.cancel_requested,
        last_error_code: error.map(|error| error.code.to_string()).unwrap_or_default(),
        last_error_message: error.map(|error| error.message.to_string()).unwrap_or_default(),
        etag: job.etag(),
        last_seq: job.last_seq,
        run_timeout: spec.run_timeout.map(duration),
        failures: job.failures,
        lost_attempts: job.lost_attempts,
        max_lost_attempts: spec.max_lost_attempts,
        erased_at: job.erased_at.map(timestamp),
    }
}

/// A job with payload and result.
pub(super) fn job_record(record: &JobRecord) -> pb::Job {
    full_job(&record.job, &record.contents)
}

/// A job with payload and result, which the caller has read apart from it.
pub(super) fn full_job(of: &Job, contents: &JobContents) -> pb::Job {
    pb::Job {
        payload: contents.payload.as_ref().map(json::from_json),
        result: contents.result.as_ref().map(json::from_json),
        ..job(of)
    }
}

/// What a caller may see of a job.
pub(super) fn seen_job(job: pb::Job, view: View) -> pb::Job {
    match view {
        View::Whole => job,
        View::WithoutContents => pb::Job { payload: None, result: None, last_error_message: String::new(), ..job },
    }
}

/// What a caller may see of an event.
pub(super) fn seen_event(event: pb::JobEvent, view: View) -> pb::JobEvent {
    match view {
        View::Whole => event,
        View::WithoutContents => {
            let mut edit = event.edit;
            // A payload of which there are few can be found by its digest.
            for fields in edit.iter_mut().flat_map(|edit| [&mut edit.before, &mut edit.after]).flatten() {
                fields.payload_sha256.clear();
            }
            pb::JobEvent { result: None, message: String::new(), error_message: String::new(), edit, ..event }
        }
    }
}

/// The few fields of a job that the answers of batch calls have.
pub(super) fn brief_job(job: &Job) -> pb::Job {
    pb::Job {
        id: job.id.to_string(),
        status: status(job.status).into(),
        attempt: job.attempt,
        created_at: Some(timestamp(job.created_at)),
        etag: job.etag(),
        last_seq: job.last_seq,
        ..pb::Job::default()
    }
}

/// A claimed job with its lease token and the end of its lease.
pub(super) fn lease(record: &JobRecord) -> pb::Lease {
    let token = record.job.lease_token();
    pb::Lease {
        lease_token: token.map(|token| token.to_string()).unwrap_or_default(),
        expires_at: lease_end(&record.job),
        job: Some(job_record(record)),
    }
}

/// The state of a lease after a heartbeat; `None`: it is lost.
pub(super) fn heartbeat(held: Option<&Job>) -> pb::HeartbeatResult {
    pb::HeartbeatResult {
        expires_at: held.and_then(lease_end),
        cancel_requested: held.is_some_and(|job| job.cancel_requested),
        lease_lost: held.is_none(),
        error: None,
    }
}

fn lease_end(job: &Job) -> Option<prost_types::Timestamp> {
    job.lease.as_ref().map(|lease| timestamp(lease.expires_at))
}

pub(super) fn event(event: &JobEvent) -> pb::JobEvent {
    let error = event.error.as_ref();
    pb::JobEvent {
        org_id: event.org_id.to_string(),
        seq: event.seq,
        job_id: event.job_id.to_string(),
        job_seq: event.job_seq,
        ts: Some(timestamp(event.ts)),
        recorded_at: Some(timestamp(event.recorded_at)),
        kind: kind(event.kind).into(),
        prev_status: event.prev_status.map(|prev| status(prev).into()),
        next_status: status(event.next_status).into(),
        attempt: event.attempt,
        actor: event.actor.to_string(),
        job_type: event.job_type.to_string(),
        stage: event.stage.as_ref().map(ToString::to_string),
        progress: event.progress.map(i32::from),
        message: event.message.to_string(),
        result: event.result.as_ref().map(json::from_json),
        error_code: error.map(|error| error.code.to_string()).unwrap_or_default(),
        error_message: error.map(|error| error.message.to_string()).unwrap_or_default(),
        scheduled_at: event.scheduled_at.map(timestamp),
        bulk_operation_id: event.bulk_operation.map(|id| id.to_string()).unwrap_or_default(),
        edit: event.edit.as_deref().map(edit),
    }
}

fn edit(edit: &JobEdit) -> pb::JobEdit {
    pb::JobEdit { fields: names(&edit.after), before: Some(fields(&edit.before)), after: Some(fields(&edit.after)) }
}

/// The names of the fields that are there.
fn names(fields: &EditableFields) -> Vec<String> {
    fields.present().map(|field| field.as_str().to_owned()).collect()
}

fn fields(fields: &EditableFields) -> pb::JobFields {
    pb::JobFields {
        priority: fields.priority.unwrap_or_default(),
        scheduled_at: fields.scheduled_at.flatten().map(timestamp),
        labels: fields.labels.as_deref().cloned().unwrap_or_default(),
        max_attempts: fields.max_attempts.unwrap_or_default(),
        run_timeout: fields.run_timeout.flatten().map(duration),
        payload_bytes: fields.payload.map(|payload| payload.bytes as i32).unwrap_or_default(),
        payload_sha256: fields
            .payload
            .and_then(|payload| payload.digest)
            .map(|digest| digest.to_string())
            .unwrap_or_default(),
    }
}

pub(super) fn pause(pause: &Pause) -> pb::Pause {
    pb::Pause {
        since: Some(timestamp(pause.since)),
        until: pause.until.map(timestamp),
        reason: pause.reason.to_string(),
        actor: pause.actor.to_string(),
    }
}

pub(super) fn type_settings(settings: &TypeSettings) -> pb::JobTypeSettings {
    described(&settings.description)
}

fn described(description: &str) -> pb::JobTypeSettings {
    pb::JobTypeSettings { description: description.to_owned() }
}

pub(super) fn org_event(event: &OrgEvent) -> pb::OrgEvent {
    pb::OrgEvent {
        org_id: event.org_id.to_string(),
        seq: event.seq,
        ts: Some(timestamp(event.ts)),
        recorded_at: Some(timestamp(event.recorded_at)),
        actor: event.actor.to_string(),
        change: Some(change(&event.change)),
    }
}

fn change(change: &OrgChange) -> Change {
    match change {
        OrgChange::TypePaused { job_type, pause: paused, before } => Change::JobTypePaused(pb::JobTypePaused {
            r#type: job_type.to_string(),
            pause: Some(pause(paused)),
            previous: before.as_ref().map(pause),
        }),
        OrgChange::TypeResumed { job_type, pause: ended } => {
            Change::JobTypeResumed(pb::JobTypeResumed { r#type: job_type.to_string(), pause: Some(pause(ended)) })
        }
        OrgChange::TypeUpdated { job_type, before, after } => Change::JobTypeUpdated(pb::JobTypeUpdated {
            r#type: job_type.to_string(),
            before: Some(described(before)),
            after: Some(described(after)),
        }),
        OrgChange::BulkStarted { id, action: what, reason, is_dry_run } => {
            Change::BulkOperationStarted(pb::BulkOperationStarted {
                operation_id: id.to_string(),
                action: action(*what).into(),
                reason: reason.to_string(),
                dry_run: *is_dry_run,
            })
        }
        OrgChange::BulkEnded { id, status, matched, changed } => Change::BulkOperationEnded(pb::BulkOperationEnded {
            operation_id: id.to_string(),
            status: bulk_status(*status).into(),
            matched: *matched,
            changed: *changed,
        }),
        OrgChange::TypeReset { job_type, description, pause: ended } => Change::JobTypeDeleted(pb::JobTypeDeleted {
            r#type: job_type.to_string(),
            before: Some(described(description)),
            pause: ended.as_ref().map(pause),
        }),
    }
}

fn action(action: BulkAction) -> pb::BulkAction {
    match action {
        BulkAction::Cancel => pb::BulkAction::Cancel,
        BulkAction::Retry => pb::BulkAction::Retry,
        BulkAction::Update => pb::BulkAction::Update,
        BulkAction::Erase => pb::BulkAction::Erase,
        BulkAction::CancelAndErase => pb::BulkAction::CancelAndErase,
    }
}

fn bulk_status(status: BulkStatus) -> pb::BulkStatus {
    match status {
        BulkStatus::Counting => pb::BulkStatus::Counting,
        BulkStatus::Running => pb::BulkStatus::Running,
        BulkStatus::Succeeded => pb::BulkStatus::Succeeded,
        BulkStatus::Refused => pb::BulkStatus::Refused,
        BulkStatus::Stopped => pb::BulkStatus::Stopped,
    }
}

fn filter(filter: &JobFilter) -> pb::JobFilter {
    pb::JobFilter {
        statuses: filter.statuses.iter().map(|of| status(*of).into()).collect(),
        types: filter.types.clone(),
        labels: filter.labels.clone(),
        requested_by: filter.requested_by.clone().unwrap_or_default(),
        created_after: filter.created_after.map(timestamp),
        created_before: filter.created_before.map(timestamp),
        idempotency_key: filter.idempotency_key.clone().unwrap_or_default(),
        error_code: filter.error_code.clone().unwrap_or_default(),
        worker_id: filter.worker.clone().unwrap_or_default(),
        finished_after: filter.finished_after.map(timestamp),
        finished_before: filter.finished_before.map(timestamp),
    }
}

pub(super) fn bulk_operation(org: OrgId, operation: &BulkOperation) -> pb::BulkOperation {
    let request = &operation.request;
    let failure = |(reason, count): (&String, &i64)| pb::BulkFailure { reason: reason.clone(), count: *count };
    pb::BulkOperation {
        id: request.id.to_string(),
        org_id: org.to_string(),
        action: action(request.action).into(),
        filter: Some(filter(&request.filter)),
        reason: request.reason.to_string(),
        actor: operation.actor.to_string(),
        dry_run: request.is_dry_run,
        expected_count: request.expected_count,
        status: bulk_status(operation.status).into(),
        through_seq: operation.through_seq,
        matched: operation.matched,
        reached: operation.reached,
        changed: operation.changed,
        unchanged: operation.unchanged,
        failed: operation.failed.iter().map(failure).collect(),
        no_longer_matching: operation.no_longer_matching(),
        created_at: Some(timestamp(operation.created_at)),
        updated_at: Some(timestamp(operation.updated_at)),
        finished_at: operation.finished_at.map(timestamp),
        update: (!request.edit.is_empty()).then(|| changes(&request.edit)),
    }
}

fn changes(edit: &EditableFields) -> pb::JobChanges {
    let pb::JobFields { priority, scheduled_at, labels, max_attempts, run_timeout, .. } = fields(edit);
    let update_mask = Some(prost_types::FieldMask { paths: names(edit) });
    pb::JobChanges { update_mask, priority, scheduled_at, labels, max_attempts, run_timeout }
}
