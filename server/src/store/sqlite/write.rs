//! What a batch writes of jobs and events.

use std::{collections::BTreeMap, time::Duration};

use sqlx::SqliteConnection;

use super::{
    columns::micros,
    heads::Written,
    set::{Set, Value},
};
use crate::{
    domain::{clock::Time, event::JobEvent, job::Job, status::JobStatus},
    store::{
        Changed, Parts, StoreError, detail,
        rows::{self, EVENT_COLUMNS, JOB_COLUMNS, JOB_FIXED_COLUMNS},
    },
};

/// Writes new jobs, with their payloads and labels.
pub(super) async fn created(connection: &mut SqliteConnection, written: &[Written<'_>]) -> Result<(), StoreError> {
    let jobs = written.iter().flat_map(|written| &written.changes.created);
    Set::new(&JOB_COLUMNS, jobs.clone().map(job_values).collect()).insert(connection, "job").await?;
    let mut payloads = Vec::new();
    for Written { org, changes, .. } in written {
        let org_id = || Value::from(org.0.as_bytes());
        payloads.extend(
            changes
                .payloads
                .iter()
                .map(|(id, payload)| vec![org_id(), id.0.as_bytes().into(), payload.as_str().into()]),
        );
    }
    Set::new(&["org_id", "job_id", "payload"], payloads).insert(connection, "job_payload").await?;
    let labels = jobs.flat_map(labels).map(|(key, value, job)| {
        let (org, id) = (job.org_id.0.as_bytes(), job.id.0.as_bytes());
        vec![org.into(), key.into(), value.into(), job.created_seq.into(), id.into()]
    });
    let columns = ["org_id", "key", "value", "created_seq", "job_id"];
    Set::new(&columns, labels.collect()).insert(connection, "job_label").await
}

/// A job's labels as rows.
pub(super) fn labels(job: &Job) -> impl Iterator<Item = (&str, &str, &Job)> {
    job.spec.labels.iter().map(move |(key, value)| (key.as_str(), value.as_str(), job))
}

/// Writes changed jobs over, those together that have changed in the same parts: an index whose columns are not written is left
/// alone.
pub(super) async fn changed(connection: &mut SqliteConnection, written: &[Written<'_>]) -> Result<(), StoreError> {
    let mut of_parts: BTreeMap<Parts, Vec<&Job>> = BTreeMap::new();
    for Changed { job, parts } in written.iter().flat_map(|written| &written.changes.changed) {
        of_parts.entry(*parts).or_default().push(job);
    }
    for (parts, jobs) in of_parts {
        let is_written =
            |n: &usize| *n < KEY || *n >= JOB_FIXED_COLUMNS && parts.contain(Parts::of_column(JOB_COLUMNS[*n]));
        let written: Vec<_> = (0..JOB_COLUMNS.len()).filter(is_written).collect();
        let names: Vec<_> = written.iter().map(|n| JOB_COLUMNS[*n]).collect();
        let row = |job| {
            let mut values = job_values(job);
            written.iter().map(|n| std::mem::replace(&mut values[*n], Value::Null)).collect()
        };
        let rows = jobs.into_iter().map(row).collect();
        Set::keyed(&names, rows, KEY).update(connection, "job").await?;
    }
    Ok(())
}

/// Writes new events.
pub(super) async fn events(connection: &mut SqliteConnection, written: &[Written<'_>]) -> Result<(), StoreError> {
    let events = written.iter().flat_map(|written| &written.changes.events);
    let rows = events.map(|event| event_values(event)).collect::<Result<Vec<_>, _>>()?;
    Set::new(&EVENT_COLUMNS, rows).insert(connection, "job_event").await
}

/// Columns of a job's key, the first ones.
const KEY: usize = 2;

/// What a job has in [`JOB_COLUMNS`].
fn job_values(job: &Job) -> Vec<Value<'_>> {
    let spec = &job.spec;
    let retry = &spec.retry_policy;
    let idempotency = spec.idempotency.as_ref();
    let error = job.last_error.as_ref();
    let lease = job.lease.as_ref();
    let time = |time: Time| Value::Int(micros(time));
    let span = |span: Duration| Value::Int(span.as_micros() as i64);
    let or_null = |value: Option<Value<'static>>| value.unwrap_or(Value::Null);
    vec![
        job.org_id.0.as_bytes().into(),
        job.id.0.as_bytes().into(),
        (&*spec.job_type).into(),
        spec.max_attempts.into(),
        spec.max_lost_attempts.into(),
        spec.priority.into(),
        Value::or_null(idempotency.map(|idempotency| &*idempotency.key)),
        Value::or_null(idempotency.and_then(|idempotency| idempotency.digest.as_ref()).map(|digest| &digest.0)),
        Value::or_null(rows::non_empty(&spec.requested_by)),
        Value::or_null(rows::labels_json(&spec.labels)),
        span(retry.initial_backoff),
        retry.multiplier.into(),
        span(retry.max_backoff),
        or_null(spec.run_timeout.map(span)),
        spec.payload_bytes.into(),
        time(job.created_at),
        job.created_seq.into(),
        job.status.as_str().into(),
        job.attempt.into(),
        job.failures.into(),
        job.lost_attempts.into(),
        time(job.updated_at),
        or_null(job.started_at.map(time)),
        or_null(job.attempt_started_at.map(time)),
        or_null(job.finished_at.map(time)),
        or_null(job.scheduled_at.map(time)),
        time(job.ready_at),
        job.cancel_requested.into(),
        Value::or_null(job.outcome.as_ref().map(|outcome| &outcome.digest.0)),
        Value::or_null(job.outcome.and_then(|outcome| outcome.epoch)),
        Value::or_null(lease.map(|lease| &*lease.worker)),
        or_null(lease.map(|lease| span(lease.granted))),
        or_null(lease.map(|lease| time(lease.expires_at))),
        Value::or_null(lease.and_then(|lease| lease.request.as_deref())),
        lease.is_some_and(|lease| lease.is_confirmed).into(),
        job.lease_epoch.into(),
        Value::or_null(job.retry_request.as_deref()),
        or_null(job.due_at.map(time)),
        Value::or_null(error.map(|error| &*error.code)),
        Value::or_null(error.map(|error| &*error.message)),
        Value::or_null(job.result_at.map(|at| at.seq)),
        or_null(job.result_at.map(|at| time(at.recorded_at))),
        job.last_job_seq.into(),
        job.last_seq.into(),
        time(job.last_recorded_at),
    ]
}

/// What an event has in [`EVENT_COLUMNS`].
fn event_values(event: &JobEvent) -> Result<Vec<Value<'_>>, StoreError> {
    Ok(vec![
        event.org_id.0.as_bytes().into(),
        event.seq.into(),
        event.job_id.0.as_bytes().into(),
        event.job_seq.into(),
        Value::Int(micros(event.ts)),
        Value::Int(micros(event.recorded_at)),
        event.kind.as_str().into(),
        Value::or_null(event.prev_status.map(JobStatus::as_str)),
        event.next_status.as_str().into(),
        event.attempt.into(),
        Value::or_null(rows::non_empty(&event.actor)),
        (&*event.job_type).into(),
        Value::or_null(detail::write(event, usize::MAX)?),
        Value::or_null(rows::labels_json(&event.labels)),
    ])
}
