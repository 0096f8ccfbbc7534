//! Writes of a batch to jobs, payloads, labels, events and results.

use std::{collections::HashMap, sync::Arc};

use sqlx::SqliteConnection;

use super::{error::store_error, heads::Written, load::ids_json, set::Set};
use crate::{
    domain::{
        event::JobEvent,
        id::{JobId, OrgId},
        job::Job,
        json::Json,
        status::JobStatus,
    },
    store::{
        Changes, Edited, NewPayload, StoreError, detail,
        job_columns::{JOB_COLUMNS, JobColumn, Varies},
        org_events::{self, ORG_EVENT_COLUMNS},
        rows::{self, EVENT_COLUMNS, json_text},
        settings::{self, SETTING_COLUMNS},
        value::Value,
    },
};

/// Inserts new jobs, with their payloads and labels.
pub(super) async fn created<'a>(
    connection: &mut SqliteConnection,
    written: &'a [Written<'a>],
) -> Result<(), StoreError> {
    let jobs = written.iter().flat_map(|written| &written.changes.created);
    jobs_set(JOB_COLUMNS, jobs.clone(), 0).insert(connection, "job").await?;
    let mut payloads = Vec::new();
    for Written { org, changes, .. } in written {
        let row = |payload: &'a NewPayload| vec![org.0.into(), payload.job.0.into(), payload.json.as_str().into()];
        payloads.extend(changes.large_payloads().map(row));
    }
    Set::new(&["org_id", "job_id", "payload"], payloads).insert(connection, "job_payload").await?;
    insert_labels(connection, jobs).await
}

async fn insert_labels<'a>(
    connection: &mut SqliteConnection,
    jobs: impl Iterator<Item = &'a Job>,
) -> Result<(), StoreError> {
    let labels = jobs.flat_map(labels).map(|(key, value, job)| {
        vec![job.org_id.0.into(), key.into(), value.into(), job.created_seq.into(), job.id.0.into()]
    });
    let columns = ["org_id", "key", "value", "created_seq", "job_id"];
    Set::new(&columns, labels.collect()).insert(connection, "job_label").await
}

/// A job's labels, one item for each row of `job_label`.
pub(super) fn labels(job: &Job) -> impl Iterator<Item = (&str, &str, &Job)> {
    job.spec.labels.iter().map(move |(key, value)| (key.as_str(), value.as_str(), job))
}

/// Overwrites the rows of changed jobs, those of edited ones whole.
pub(super) async fn changed(
    connection: &mut SqliteConnection,
    jobs: &[&Job],
    edited: &HashMap<(OrgId, JobId), &Edited>,
) -> Result<(), StoreError> {
    let (whole, others): (Vec<_>, Vec<_>) =
        jobs.iter().copied().partition(|job| edited.contains_key(&(job.org_id, job.id)));
    for (jobs, are_edited) in [(whole, true), (others, false)] {
        if jobs.is_empty() {
            continue;
        }
        let is_written = |varies| varies == Varies::InLife || are_edited && varies == Varies::ByEdit;
        let columns = JOB_COLUMNS.iter().enumerate().filter(|(n, column)| *n < KEY || is_written(column.changes));
        jobs_set(columns.map(|(_, column)| column), jobs.iter().copied(), KEY).update(connection, "job").await?;
    }
    let labeled = jobs
        .iter()
        .copied()
        .filter(|job| edited.get(&(job.org_id, job.id)).is_some_and(|edited| edited.labels_before.is_some()));
    insert_labels(connection, labeled).await
}

/// Removes payloads and labels that edits replace. The new ones are inserted with those of new jobs.
pub(super) async fn edited(connection: &mut SqliteConnection, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
    let edited = &changes.edited;
    if edited.iter().any(|edited| edited.has_other_payload) {
        let ids = ids_json(edited.iter().filter(|edited| edited.has_other_payload).map(|edited| &edited.job));
        let sql = "/* edited */ DELETE FROM job_payload WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))";
        sqlx::query(sql).bind(org.0).bind(ids).execute(&mut *connection).await.map_err(store_error)?;
    }
    let labels = edited.iter().flat_map(|edited| {
        let before = edited.labels_before.iter().flat_map(|labels| labels.iter());
        before.map(|(key, value)| (key.as_str(), value.as_str(), edited.created_seq))
    });
    remove_labels(connection, org, labels.collect()).await
}

/// Removes labels by key, value and their job's `created_seq`.
pub(super) async fn remove_labels(
    connection: &mut SqliteConnection,
    org: OrgId,
    labels: Vec<(&str, &str, i64)>,
) -> Result<(), StoreError> {
    if labels.is_empty() {
        return Ok(());
    }
    sqlx::query(REMOVE_LABELS).bind(org.0).bind(json_text(&labels)).execute(connection).await.map_err(store_error)?;
    Ok(())
}

/// Without the types of the values SQLite would look up labels by key and value alone.
pub(super) const REMOVE_LABELS: &str = "/* remove_labels */ DELETE FROM job_label
    WHERE org_id = $1 AND (key, value, created_seq) IN (
        SELECT CAST(value ->> 0 AS TEXT), CAST(value ->> 1 AS TEXT), CAST(value ->> 2 AS INTEGER) FROM json_each($2))";

/// Inserts new events, and their large results.
pub(super) async fn events(connection: &mut SqliteConnection, written: &[Written<'_>]) -> Result<(), StoreError> {
    let mut rows = Vec::new();
    for Written { changes, images, .. } in written {
        let payloads = changes.small_payloads();
        for event in &changes.events {
            let mut values = event_values(event)?;
            values.push(payloads.get(&event.seq).map(|payload| payload.as_str()).into());
            values.push((event.weight() as i64).into());
            values.push(images.get(&event.seq).map(String::as_str).into());
            rows.push(values);
        }
    }
    let columns: Vec<_> = EVENT_COLUMNS.into_iter().chain(["payload", "bytes", "image"]).collect();
    Set::new(&columns, rows).insert(connection, "job_event").await?;
    let results = written.iter().flat_map(|written| large_results(written.changes)).map(|(event, result)| {
        vec![event.org_id.0.into(), event.job_id.0.into(), event.seq.into(), result.as_str().into()]
    });
    Set::new(&["org_id", "job_id", "seq", "result"], results.collect()).insert(connection, "job_result").await
}

/// The columns of an event that an erasure overwrites, after its key.
pub(super) const BLANK_COLUMNS: [&str; 8] =
    ["org_id", "seq", "actor", "detail_json", "labels", "payload", "image", "bytes"];

/// The values of [`BLANK_COLUMNS`].
pub(super) fn blank_values(event: &JobEvent) -> Result<Vec<Value<'_>>, StoreError> {
    Ok(vec![
        event.org_id.0.into(),
        event.seq.into(),
        rows::non_empty(&event.actor).into(),
        detail::write(event, 0)?.into(),
        rows::labels_json(&event.labels).into(),
        Value::Null,
        Value::Null,
        (event.weight() as i64).into(),
    ])
}

/// Inserts new org events and removes old ones, and overwrites the settings that have changed.
pub(super) async fn org_events(
    connection: &mut SqliteConnection,
    changes: &[(OrgId, &Changes)],
) -> Result<(), StoreError> {
    let added = changes.iter().flat_map(|(_, changes)| &changes.org_events).map(|event| org_events::values(event));
    let columns: Vec<_> = ORG_EVENT_COLUMNS.into_iter().chain(["bytes"]).collect();
    Set::plain(&columns, added.collect()).insert(connection, "org_event").await?;
    let changed = changes.iter().flat_map(|(org, changes)| {
        let set = changes.settings.iter().filter(|(_, settings)| !settings.is_default());
        set.map(|(name, of_type)| settings::values(*org, name, of_type))
    });
    Set::plain(&SETTING_COLUMNS, changed.collect()).put(connection, "save_settings", "org_type", OVER_SETTINGS).await?;
    for (org, changes) in changes {
        if let Some(outdated) = changes.removed_org_events {
            let sql = "/* remove_org_events */ DELETE FROM org_event WHERE org_id = $1 AND seq <= $2";
            sqlx::query(sql).bind(org.0).bind(outdated.last).execute(&mut *connection).await.map_err(store_error)?;
        }
        for (name, _) in changes.settings.iter().filter(|(_, settings)| settings.is_default()) {
            let sql = "/* reset_type */ DELETE FROM org_type WHERE org_id = $1 AND type = $2";
            sqlx::query(sql).bind(org.0).bind(&**name).execute(&mut *connection).await.map_err(store_error)?;
        }
    }
    Ok(())
}

const OVER_SETTINGS: &str = " ON CONFLICT (org_id, type) DO UPDATE SET description = excluded.description,
    pause = excluded.pause, changed_seq = excluded.changed_seq";

/// The largest result, in bytes, that is stored with its event. Reads of events of at most this size skip `job_result`.
pub(super) const MAX_SMALL_RESULT: usize = 512;

/// Results that get rows of their own.
fn large_results(changes: &Changes) -> impl Iterator<Item = (&JobEvent, &Json)> {
    let result = |event: &'_ Arc<JobEvent>| event.result.as_ref().is_some_and(|result| result.len() > MAX_SMALL_RESULT);
    changes
        .events
        .iter()
        .filter(move |event| result(event))
        .filter_map(|event| Some((&**event, event.result.as_ref()?)))
}

/// The first columns of [`JOB_COLUMNS`] are a job's key.
const KEY: usize = 2;

/// These columns of some jobs. The first `key` of them are the key.
fn jobs_set<'a>(
    columns: impl IntoIterator<Item = &'static JobColumn>,
    jobs: impl Iterator<Item = &'a Job>,
    key: usize,
) -> Set<'a> {
    let columns: Vec<_> = columns.into_iter().collect();
    let names: Vec<_> = columns.iter().map(|column| column.name).collect();
    let row = |job| columns.iter().map(|column| (column.value)(job)).collect();
    Set::keyed(&names, jobs.map(row).collect(), key)
}

/// The values of [`EVENT_COLUMNS`].
fn event_values(event: &JobEvent) -> Result<Vec<Value<'_>>, StoreError> {
    Ok(vec![
        event.org_id.0.into(),
        event.seq.into(),
        event.job_id.0.into(),
        event.job_seq.into(),
        event.ts.into(),
        event.recorded_at.into(),
        event.kind.as_str().into(),
        event.prev_status.map(JobStatus::as_str).into(),
        event.next_status.as_str().into(),
        event.attempt.into(),
        rows::non_empty(&event.actor).into(),
        (&*event.job_type).into(),
        detail::write(event, MAX_SMALL_RESULT)?.into(),
        rows::labels_json(&event.labels).into(),
    ])
}
