//! Retention: finds the finished jobs that it removes, and removes them.

use std::collections::HashMap;

use sqlx::{PgConnection, types::chrono::DateTime};
use uuid::Uuid;

use super::{columns::Columns, connections::arguments, error::store_error, statement::Statement};
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

/// Loads up to `wanted.limit` finished jobs whose retention is over, and when that of the next one is.
pub(super) async fn load_expired(
    connection: &mut PgConnection,
    org: OrgId,
    wanted: &Expired,
    head: &Head,
    now: Time,
) -> Result<(Vec<JobId>, Option<Time>), StoreError> {
    const SQL: &str = "/* load_expired */ SELECT old.id,
            (SELECT min(j.finished_at) FROM jobledger.job j
             WHERE j.org_id = $1 AND j.status = $2 AND j.finished_at IS NOT NULL AND j.finished_at >= $3)
        FROM (VALUES (1)) one LEFT JOIN (
            SELECT j.id FROM jobledger.job j
            WHERE j.org_id = $1 AND j.status = $2 AND j.finished_at IS NOT NULL AND j.finished_at < $3
                AND (j.last_job_seq <= $5 OR j.last_recorded_at < $6)
            ORDER BY j.finished_at LIMIT $4
        ) old ON true";
    let (mut expired, mut next) = (Vec::new(), None);
    for (status, before) in wanted.retention.cutoffs(now) {
        let limit = (wanted.limit - expired.len()) as i64;
        let told_since = told_since(head).max(DateTime::UNIX_EPOCH);
        let arguments = arguments![org.0, status.as_str(), before, limit, wanted.max_history, told_since];
        let query = sqlx::query_with(SQL, arguments);
        for row in query.fetch_all(&mut *connection).await.map_err(store_error)? {
            let mut columns = Columns::of(&row);
            expired.extend(columns.get::<Option<Uuid>>()?.map(JobId));
            if let Some(finished_at) = columns.optional_time()? {
                let expiry = finished_at + (now - before);
                next = Some(next.map_or(expiry, |next: Time| next.min(expiry)));
            }
        }
    }
    Ok((expired, next))
}

/// Loads the milestones of the jobs in `told`: their events in order, without progress and cancel requests.
pub(super) async fn load_histories(
    connection: &mut PgConnection,
    org: OrgId,
    jobs: &[Job],
    told: &[JobId],
) -> Result<HashMap<JobId, Vec<Milestone>>, StoreError> {
    const SQL: &str =
        "/* load_histories */ SELECT e.job_id, e.kind, e.ts, e.recorded_at, e.detail_json ->> 'scheduled_at',
            COALESCE(e.detail_json ? 'past', false)
        FROM unnest($2::uuid[]) WITH ORDINALITY AS wanted (id, n) CROSS JOIN LATERAL (
            SELECT * FROM jobledger.job_event e WHERE e.org_id = $1 AND e.job_id = wanted.id
                AND e.recorded_at >= $3 AND e.recorded_at <= $4 AND e.kind NOT IN ('progress', 'cancel_requested')
            ORDER BY e.seq OFFSET 0
        ) e";
    let mut histories: HashMap<_, Vec<_>> = HashMap::new();
    let (Some(since), Some(until)) = (
        jobs.iter().map(|job| job.created_at).min().filter(|_| !told.is_empty()),
        jobs.iter().map(|job| job.last_recorded_at).max(),
    ) else {
        return Ok(histories);
    };
    let ids: Vec<_> = told.iter().map(|id| id.0).collect();
    let query = sqlx::query_with(SQL, arguments![org.0, ids, since, until]);
    for row in query.fetch_all(connection).await.map_err(store_error)? {
        let (job, milestone) = rows::milestone(&mut Columns::of(&row))?;
        histories.entry(job).or_default().push(milestone);
    }
    Ok(histories)
}

/// Loads how many bytes the first `most.events` events of each job take.
pub(super) async fn load_sizes(
    connection: &mut PgConnection,
    org: OrgId,
    jobs: &[&Job],
    most: Most,
) -> Result<HashMap<JobId, i64>, StoreError> {
    const SQL: &str =
        "/* load_sizes */ SELECT wanted.id, of_events.bytes FROM unnest($2::uuid[]) AS wanted (id) CROSS JOIN LATERAL (
            SELECT coalesce(sum(e.bytes), 0)::bigint AS bytes FROM (
                SELECT e.bytes FROM jobledger.job_event e WHERE e.org_id = $1 AND e.job_id = wanted.id
                    AND e.recorded_at >= $3 AND e.recorded_at <= $4 ORDER BY e.seq LIMIT $5) e) of_events";
    let (Some(since), Some(until)) =
        (jobs.iter().map(|job| job.created_at).min(), jobs.iter().map(|job| job.last_recorded_at).max())
    else {
        return Ok(HashMap::new());
    };
    let ids: Vec<_> = jobs.iter().map(|job| job.id.0).collect();
    let query = sqlx::query_with(SQL, arguments![org.0, ids, since, until, most.events]);
    let size = |row| {
        let mut columns = Columns::of(row);
        Ok((JobId(columns.uuid()?), columns.long()?))
    };
    query.fetch_all(connection).await.map_err(store_error)?.iter().map(size).collect()
}

/// Loads the next slice of events of one removed job: as many events as both bounds allow, but at least one. `None` if no
/// removed job has events left.
pub(super) async fn load_slice(
    connection: &mut PgConnection,
    org: OrgId,
    most: Most,
) -> Result<Option<Slice>, StoreError> {
    const REMAINS: &str =
        "/* load_remains */ SELECT r.job_id, r.last_seq, r.since, r.until FROM jobledger.job_remains r
        WHERE r.org_id = $1 LIMIT 1";
    const SLICE: &str = "/* load_slice */ SELECT max(e.seq), coalesce(sum(e.bytes), 0)::bigint FROM (
            SELECT e.seq, e.bytes, sum(e.bytes) OVER (ORDER BY e.seq) - e.bytes AS before FROM (
                SELECT e.seq, e.bytes FROM jobledger.job_event e WHERE e.org_id = $1 AND e.job_id = $2 AND e.seq <= $3
                    AND e.recorded_at >= $4 AND e.recorded_at <= $5 ORDER BY e.seq LIMIT $6) e) e
        WHERE e.before < $7";
    let query = sqlx::query_with(REMAINS, arguments![org.0]);
    let Some(row) = query.fetch_optional(&mut *connection).await.map_err(store_error)? else { return Ok(None) };
    let mut columns = Columns::of(&row);
    let (job, last) = (JobId(columns.uuid()?), columns.long()?);
    let (since, until) = (columns.time()?, columns.time()?);
    let query = sqlx::query_with(SLICE, arguments![org.0, job.0, last, since, until, most.events, most.bytes]);
    let row = query.fetch_one(connection).await.map_err(store_error)?;
    let mut columns = Columns::of(&row);
    let (through, bytes) = (columns.optional_long()?.unwrap_or(last), columns.long()?);
    Ok(Some(Slice { job, through, bytes, is_last: through >= last, since, until }))
}

/// Removes the remaining events of removed jobs that are about to be imported again. Returns their size in bytes.
pub(super) async fn clear(connection: &mut PgConnection, org: OrgId, ids: &[JobId]) -> Result<i64, StoreError> {
    const REMAINS: &str = "/* clear */ DELETE FROM jobledger.job_remains r WHERE r.org_id = $1 AND r.job_id = ANY ($2)
        RETURNING r.job_id";
    const EVENTS: &str = "/* clear */ WITH gone AS (
            DELETE FROM jobledger.job_event e WHERE e.org_id = $1 AND e.job_id = ANY ($2) RETURNING e.bytes)
        SELECT coalesce(sum(gone.bytes), 0)::bigint FROM gone";
    if ids.is_empty() {
        return Ok(0);
    }
    let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
    let query = sqlx::query_with(REMAINS, arguments![org.0, ids]);
    let found = query.fetch_all(&mut *connection).await.map_err(store_error)?;
    let ids = found.iter().map(|row| Columns::of(row).uuid()).collect::<Result<Vec<_>, _>>()?;
    if ids.is_empty() {
        return Ok(0);
    }
    let query = sqlx::query_with(EVENTS, arguments![org.0, ids]);
    Columns::of(&query.fetch_one(connection).await.map_err(store_error)?).long()
}

impl Statement {
    /// Removes a slice of the events of a removed job, and with the last slice its row in `job_remains`.
    pub(super) fn removed_slice(&mut self, org: &str, changes: &Changes) -> Result<(), StoreError> {
        let Some(slice) = &changes.removed_slice else { return Ok(()) };
        let (job, through) = (self.bind(slice.job.0)?, self.bind(slice.through)?);
        let (since, until) = (self.bind(slice.since)?, self.bind(slice.until)?);
        self.part(
            "removed_slice",
            format_args!(
                "(DELETE FROM jobledger.job_event WHERE org_id = {org} AND job_id = {job} AND seq <= {through}
                    AND recorded_at >= {since} AND recorded_at <= {until})"
            ),
        );
        if slice.is_last {
            self.part(
                "removed_remains",
                format_args!("(DELETE FROM jobledger.job_remains WHERE org_id = {org} AND job_id = {job})"),
            );
        }
        Ok(())
    }

    /// Removes jobs with their payloads, labels and events. Jobs in `changes.remaining` keep their events for later slices, and
    /// get a row in `job_remains`.
    pub(super) fn removed_jobs(&mut self, org: &str, changes: &Changes) -> Result<(), StoreError> {
        let jobs = &changes.removed;
        let ids = self.bind(jobs.iter().map(|job| job.id.0).collect::<Vec<_>>())?;
        // The time range of their events, so that no other partition is read.
        let since = self.bind(jobs.iter().map(|job| job.created_at).min())?;
        let until = self.bind(jobs.iter().map(|job| job.last_recorded_at).max())?;
        let labels = self.label_columns(&jobs.iter().collect::<Vec<_>>())?;
        self.part(
            "removed_jobs",
            format_args!("(DELETE FROM jobledger.job WHERE org_id = {org} AND id = ANY ({ids}::uuid[]))"),
        );
        self.part(
            "removed_payloads",
            format_args!("(DELETE FROM jobledger.job_payload WHERE org_id = {org} AND job_id = ANY ({ids}::uuid[]))"),
        );
        let (remaining, gone): (Vec<_>, Vec<_>) = jobs.iter().partition(|job| changes.remaining.contains(&job.id));
        let ids = self.bind(gone.iter().map(|job| job.id.0).collect::<Vec<_>>())?;
        self.part(
            "removed_events",
            format_args!(
                "(DELETE FROM jobledger.job_event WHERE org_id = {org} AND job_id = ANY ({ids}::uuid[])
                    AND recorded_at >= {since}::timestamptz AND recorded_at <= {until}::timestamptz)"
            ),
        );
        if !remaining.is_empty() {
            let columns = [
                self.org_column(&remaining, |job| job.org_id)?,
                self.column("job_id", &remaining, |job| job.id.0)?,
                self.column("last_seq", &remaining, |job| job.last_seq)?,
                self.column("since", &remaining, |job| job.created_at)?,
                self.column("until", &remaining, |job| job.last_recorded_at)?,
            ];
            self.insert("remains", "job_remains", &columns);
        }
        if let Some(columns) = labels {
            self.gone_labels(org, &columns);
        }
        Ok(())
    }
}
