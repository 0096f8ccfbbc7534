//! Retention: finding expired jobs, and removing jobs with their events.

use std::collections::HashMap;

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::{
    columns::{Columns, micros},
    error::store_error,
    load::ids_json,
    write,
};
use crate::{
    domain::{
        clock::Time,
        flow::Milestone,
        id::{JobId, OrgId},
        job::Job,
    },
    store::{
        Changes, Expired, Head, Most, Slice, StoreError,
        rows::{self, Columns as _},
        told_since,
    },
};

pub(super) const LOAD_EXPIRED: &str = "/* load_expired */ SELECT id FROM job
     WHERE org_id = $1 AND status = $2 AND finished_at IS NOT NULL AND finished_at < $3
        AND (last_job_seq <= $5 OR last_recorded_at < $6)
     ORDER BY finished_at LIMIT +$4";
pub(super) const LOAD_NEXT_EXPIRY: &str = "/* load_next_expiry */ SELECT min(finished_at) FROM job
     WHERE org_id = $1 AND status = $2 AND finished_at IS NOT NULL AND finished_at >= $3";

/// The jobs that may be removed, and when the next finished job expires.
pub(super) async fn load_expired(
    connection: &mut SqliteConnection,
    org: OrgId,
    wanted: &Expired,
    head: &Head,
    now: Time,
) -> Result<(Vec<JobId>, Option<Time>), StoreError> {
    let (mut expired, mut next) = (Vec::new(), None);
    for (status, before) in wanted.retention.cutoffs(now) {
        let found: Vec<Uuid> = sqlx::query_scalar(LOAD_EXPIRED)
            .bind(org.0)
            .bind(status.as_str())
            .bind(micros(before))
            .bind((wanted.limit - expired.len()) as i64)
            .bind(wanted.max_history)
            .bind(micros(told_since(head)))
            .fetch_all(&mut *connection)
            .await
            .map_err(store_error)?;
        expired.extend(found.into_iter().map(JobId));
        let row = sqlx::query(LOAD_NEXT_EXPIRY)
            .bind(org.0)
            .bind(status.as_str())
            .bind(micros(before))
            .fetch_one(&mut *connection)
            .await
            .map_err(store_error)?;
        if let Some(finished_at) = Columns::of(&row).optional_time()? {
            let expiry = finished_at + (now - before);
            next = Some(next.map_or(expiry, |next: Time| next.min(expiry)));
        }
    }
    Ok((expired, next))
}

pub(super) const LOAD_HISTORIES: &str =
    "/* load_histories */ SELECT e.job_id, e.kind, e.ts, e.recorded_at, e.detail_json ->> '$.scheduled_at',
        json_type(e.detail_json, '$.past') IS NOT NULL
     FROM json_each($2) wanted
     CROSS JOIN job_event e INDEXED BY idx_job_event_job ON e.org_id = $1 AND e.job_id = unhex(wanted.value)
     WHERE e.kind NOT IN ('progress', 'cancel_requested')";

/// The milestones of some jobs, from which retention computes the flow that the log loses.
pub(super) async fn load_histories(
    connection: &mut SqliteConnection,
    org: OrgId,
    told: &[JobId],
) -> Result<HashMap<JobId, Vec<Milestone>>, StoreError> {
    let mut histories: HashMap<_, Vec<_>> = HashMap::new();
    if told.is_empty() {
        return Ok(histories);
    }
    let query = sqlx::query(LOAD_HISTORIES).bind(org.0).bind(ids_json(told));
    for row in query.fetch_all(connection).await.map_err(store_error)? {
        let (job, milestone) = rows::milestone(&mut Columns::of(&row))?;
        histories.entry(job).or_default().push(milestone);
    }
    Ok(histories)
}

/// The bytes of each job's first `$3` events.
pub(super) const LOAD_SIZES: &str = "/* load_sizes */ SELECT unhex(wanted.value), (SELECT ifnull(sum(bytes), 0) FROM (
        SELECT e.bytes FROM job_event e INDEXED BY idx_job_event_job
        WHERE e.org_id = $1 AND e.job_id = unhex(wanted.value) LIMIT +$3))
    FROM json_each($2) wanted";

/// The bytes of the events of some jobs, at most `most.events` of each.
pub(super) async fn load_sizes(
    connection: &mut SqliteConnection,
    org: OrgId,
    jobs: &[&Job],
    most: Most,
) -> Result<HashMap<JobId, i64>, StoreError> {
    if jobs.is_empty() {
        return Ok(HashMap::new());
    }
    let ids = ids_json(jobs.iter().map(|job| &job.id));
    let query = sqlx::query_as::<_, (Uuid, i64)>(LOAD_SIZES);
    let found = query.bind(org.0).bind(ids).bind(most.events).fetch_all(connection).await.map_err(store_error)?;
    Ok(found.into_iter().map(|(id, bytes)| (JobId(id), bytes)).collect())
}

/// The last `seq` and the bytes of a removed job's next events: as many as fit both bounds, at least one.
pub(super) const LOAD_SLICE: &str = "/* load_slice */ SELECT max(seq), ifnull(sum(bytes), 0) FROM (
        SELECT seq, bytes, sum(bytes) OVER (ORDER BY seq) - bytes AS before FROM (
            SELECT e.seq, e.bytes FROM job_event e INDEXED BY idx_job_event_job
            WHERE e.org_id = $1 AND e.job_id = $2 AND e.seq <= $3 ORDER BY e.seq LIMIT +$4))
    WHERE before < $5";

/// The next events to remove of a job that is already gone; `None` if no such job has events left.
pub(super) async fn load_slice(
    connection: &mut SqliteConnection,
    org: OrgId,
    most: Most,
) -> Result<Option<Slice>, StoreError> {
    const REMAINS: &str =
        "/* load_remains */ SELECT job_id, last_seq, since, until FROM job_remains WHERE org_id = $1 LIMIT 1";
    let Some(row) = sqlx::query(REMAINS).bind(org.0).fetch_optional(&mut *connection).await.map_err(store_error)?
    else {
        return Ok(None);
    };
    let mut columns = Columns::of(&row);
    let (job, last) = (JobId(columns.uuid()?), columns.long()?);
    let (since, until) = (columns.time()?, columns.time()?);
    let query = sqlx::query_as::<_, (Option<i64>, i64)>(LOAD_SLICE);
    let query = query.bind(org.0).bind(job.0).bind(last).bind(most.events).bind(most.bytes);
    let (through, bytes) = query.fetch_one(connection).await.map_err(store_error)?;
    let through = through.unwrap_or(last);
    Ok(Some(Slice { job, through, bytes, is_last: through >= last, since, until }))
}

/// Removes what is left of removed jobs, which are about to be imported again. Returns the bytes freed.
pub(super) async fn clear(connection: &mut SqliteConnection, org: OrgId, ids: &[JobId]) -> Result<i64, StoreError> {
    const BYTES: &str =
        "/* clear */ SELECT ifnull(sum(e.bytes), 0) FROM (SELECT DISTINCT value FROM json_each($2)) wanted
        CROSS JOIN job_remains r ON r.org_id = $1 AND r.job_id = unhex(wanted.value)
        CROSS JOIN job_event e INDEXED BY idx_job_event_job ON e.org_id = $1 AND e.job_id = r.job_id";
    if ids.is_empty() {
        return Ok(0);
    }
    let query = sqlx::query_scalar(BYTES).bind(org.0).bind(ids_json(ids));
    let bytes = query.fetch_one(&mut *connection).await.map_err(store_error)?;
    for sql in [
        "/* clear */ DELETE FROM job_result
            WHERE org_id = $1 AND job_id IN (SELECT r.job_id FROM json_each($2) wanted
                CROSS JOIN job_remains r ON r.org_id = $1 AND r.job_id = unhex(wanted.value))",
        "/* clear */ DELETE FROM job_event INDEXED BY idx_job_event_job
            WHERE org_id = $1 AND job_id IN (SELECT r.job_id FROM json_each($2) wanted
                CROSS JOIN job_remains r ON r.org_id = $1 AND r.job_id = unhex(wanted.value))",
        "/* clear */ DELETE FROM job_remains WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
    ] {
        sqlx::query(sql).bind(org.0).bind(ids_json(ids)).execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(bytes)
}

/// Removes jobs with all their rows (events of `changes.remaining` stay for later), and a slice of a gone job's events.
pub(super) async fn remove(connection: &mut SqliteConnection, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
    if let Some(slice) = &changes.removed_slice {
        remove_slice(connection, org, slice).await?;
    }
    let jobs = &changes.removed;
    if jobs.is_empty() {
        return Ok(());
    }
    let ids = ids_json(jobs.iter().map(|job| &job.id));
    for sql in [
        "/* remove */ DELETE FROM job WHERE org_id = $1 AND id IN (SELECT unhex(value) FROM json_each($2))",
        "/* remove */ DELETE FROM job_payload WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
    ] {
        sqlx::query(sql).bind(org.0).bind(&ids).execute(&mut *connection).await.map_err(store_error)?;
    }
    let (remaining, gone): (Vec<_>, Vec<_>) = jobs.iter().partition(|job| changes.remaining.contains(&job.id));
    let sql = "/* remove */ DELETE FROM job_event INDEXED BY idx_job_event_job
        WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))";
    let gone = ids_json(gone.iter().map(|job| &job.id));
    for sql in [
        sql,
        "/* remove */ DELETE FROM job_result WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
    ] {
        sqlx::query(sql).bind(org.0).bind(&gone).execute(&mut *connection).await.map_err(store_error)?;
    }
    for job in remaining {
        let sql =
            "/* remain */ INSERT INTO job_remains (org_id, job_id, last_seq, since, until) VALUES ($1, $2, $3, $4, $5)";
        let query = sqlx::query(sql).bind(org.0).bind(job.id.0).bind(job.last_seq);
        let query = query.bind(micros(job.created_at)).bind(micros(job.last_recorded_at));
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    let labels = jobs.iter().flat_map(write::labels).map(|(key, value, job)| (key, value, job.created_seq));
    write::remove_labels(connection, org, labels.collect()).await
}

async fn remove_slice(connection: &mut SqliteConnection, org: OrgId, slice: &Slice) -> Result<(), StoreError> {
    for sql in [
        "/* remove_slice */ DELETE FROM job_event INDEXED BY idx_job_event_job
            WHERE org_id = $1 AND job_id = $2 AND seq <= $3",
        "/* remove_slice */ DELETE FROM job_result WHERE org_id = $1 AND job_id = $2 AND seq <= $3",
    ] {
        let query = sqlx::query(sql).bind(org.0).bind(slice.job.0).bind(slice.through);
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    if slice.is_last {
        let sql = "/* remove_slice */ DELETE FROM job_remains WHERE org_id = $1 AND job_id = $2";
        let query = sqlx::query(sql).bind(org.0).bind(slice.job.0);
        query.execute(connection).await.map_err(store_error)?;
    }
    Ok(())
}
