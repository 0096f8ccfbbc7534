//! A transaction of the writer: loads and writes with a few statements, however many commands there are.

use std::{collections::HashSet, fmt::Write as _, sync::LazyLock};

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, SqliteConnection, query::Query, sqlite::SqliteArguments};
use tokio::sync::OwnedMutexGuard;

use super::{
    columns::micros,
    error::store_error,
    import::load_marks,
    load::{ids_json, load_due, load_expired, load_head, load_histories, load_jobs, load_ready},
    series,
};
use crate::{
    domain::{
        clock::Time,
        event::JobEvent,
        id::{JobId, OrgId},
        job::Job,
        json::Json,
        status::JobStatus,
    },
    store::{
        Batch, Changes, Head, Loaded, Needs, NextDue, StoreError, detail,
        rows::{self, EVENT_COLUMNS, JOB_COLUMNS, JOB_FIXED_COLUMNS},
        series::told_by_series,
    },
};

/// An open write transaction.
pub(super) struct SqliteBatch {
    slot: OwnedMutexGuard<Option<SqliteConnection>>,
    connection: SqliteConnection,
    now: Time,
}

impl SqliteBatch {
    /// The connection has just begun a transaction; it returns to its slot only by a commit.
    pub(super) fn new(
        slot: OwnedMutexGuard<Option<SqliteConnection>>,
        connection: SqliteConnection,
        now: Time,
    ) -> Self {
        Self { slot, connection, now }
    }
}

#[async_trait]
impl Batch for SqliteBatch {
    fn now(&self) -> Time {
        self.now
    }

    async fn load(&mut self, org: OrgId, needs: &Needs) -> Result<Loaded, StoreError> {
        let connection = &mut self.connection;
        let (head, types) = load_head(connection, org, needs).await?;
        let (expired, next_expiry) = match &needs.expired {
            Some(wanted) => load_expired(connection, org, wanted, self.now).await?,
            None => (Vec::new(), None),
        };
        let (due, next_due) = match needs.due {
            Some(limit) => load_due(connection, org, limit, self.now).await?,
            None => (Vec::new(), None),
        };
        let ids: Vec<_> = needs.jobs.iter().chain(&expired).chain(&due).copied().collect();
        let mut jobs = if ids.is_empty() && needs.keys.is_empty() && needs.requests.is_empty() {
            Vec::new()
        } else {
            load_jobs(connection, org, &ids, &needs.keys, &needs.requests).await?
        };
        if !needs.ready.is_empty() {
            let mut known: HashSet<_> = jobs.iter().map(|job| job.id).collect();
            let ready = load_ready(connection, org, &needs.ready).await?;
            jobs.extend(ready.into_iter().filter(|job| known.insert(job.id)));
        }
        let histories = {
            let told = told_by_series(&head, &jobs, &expired, needs.expired.as_ref());
            load_histories(connection, org, &told).await?
        };
        let marks = load_marks(connection, org, &jobs, &needs.imports).await?;
        Ok(Loaded { head, jobs, types, expired, histories, next_expiry, due, next_due, marks })
    }

    async fn write(&mut self, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
        let connection = &mut self.connection;
        if !changes.is_empty() {
            // First, since a key that goes with its job may be used again by a new one.
            if !changes.removed.is_empty() {
                remove(connection, org, &changes.removed).await?;
            }
            UPSERT_JOBS.run(connection, &changes.created, bind_job).await?;
            UPSERT_JOBS.run(connection, &changes.changed, bind_job).await?;
            INSERT_PAYLOADS.run(connection, &changes.payloads, |query, row| bind_payload(query, org, row)).await?;
            let labels: Vec<_> = changes.created.iter().flat_map(labels).collect();
            INSERT_LABELS.run(connection, &labels, |query, label| Ok(bind_label(query, org, label))).await?;
            INSERT_EVENTS.run(connection, &changes.events, |query, event| bind_event(query, event)).await?;
            series::write(connection, org, changes, self.now).await?;
            if let Some(head) = changes.head {
                save_head(connection, org, head, !changes.removed.is_empty()).await?;
            }
        }
        let is_first = changes.events.first().is_some_and(|event| event.seq == 1);
        if let Some(due) = changes.next_retention.or(is_first.then_some(self.now)) {
            save_retention(connection, org, due).await?;
        }
        if let Some(due) = changes.next_due {
            save_due(connection, org, due).await?;
        }
        Ok(())
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { mut slot, mut connection, .. } = *self;
        match sqlx::query("COMMIT").execute(&mut connection).await {
            Ok(_) => {
                *slot = Some(connection);
                Ok(())
            }
            Err(error) => Err(match store_error(error) {
                // The pages did not fit: SQLite has rolled back, and a frame cut short fails its checksum.
                StoreError::Full(reason) => StoreError::Full(reason),
                // Of other failures it can't be told what they left behind: look before running it again.
                other => StoreError::OutcomeUnknown(other.to_string()),
            }),
        }
    }
}

/// Deletes jobs with all that belongs to them.
async fn remove(connection: &mut SqliteConnection, org: OrgId, jobs: &[Job]) -> Result<(), StoreError> {
    let ids = ids_json(jobs.iter().map(|job| &job.id));
    for sql in [
        "/* remove */ DELETE FROM job WHERE org_id = $1 AND id IN (SELECT unhex(value) FROM json_each($2))",
        "/* remove */ DELETE FROM job_payload WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
        "/* remove */ DELETE FROM job_event INDEXED BY idx_job_event_job
            WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
    ] {
        sqlx::query(sql).bind(org.0).bind(&ids).execute(&mut *connection).await.map_err(store_error)?;
    }
    for (key, value, job) in jobs.iter().flat_map(labels) {
        let sql =
            "/* remove */ DELETE FROM job_label WHERE org_id = $1 AND key = $2 AND value = $3 AND created_seq = $4";
        let query = sqlx::query(sql).bind(org.0).bind(key).bind(value).bind(job.created_seq);
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(())
}

async fn save_retention(connection: &mut SqliteConnection, org: OrgId, due: Time) -> Result<(), StoreError> {
    sqlx::query(
        "/* save_retention */ INSERT INTO org_due (org_id, next_due_at) VALUES ($1, $2)
         ON CONFLICT (org_id) DO UPDATE SET next_due_at = excluded.next_due_at",
    )
    .bind(org.0)
    .bind(micros(due))
    .execute(connection)
    .await
    .map_err(store_error)?;
    Ok(())
}

async fn save_due(connection: &mut SqliteConnection, org: OrgId, due: NextDue) -> Result<(), StoreError> {
    let (sql, due) = match due {
        NextDue::At(due) => ("/* save_due */ UPDATE org_due SET work_due_at = $2 WHERE org_id = $1", due),
        NextDue::By(due) => (
            "/* save_due */ UPDATE org_due SET work_due_at = $2
             WHERE org_id = $1 AND (work_due_at IS NULL OR work_due_at > $2)",
            Some(due),
        ),
    };
    sqlx::query(sql).bind(org.0).bind(due.map(micros)).execute(connection).await.map_err(store_error)?;
    Ok(())
}

async fn save_head(
    connection: &mut SqliteConnection,
    org: OrgId,
    head: Head,
    has_removed: bool,
) -> Result<(), StoreError> {
    sqlx::query(
        "/* save_head */ INSERT INTO org_head (org_id, seq, floor_seq, recorded_at, types, ready_gen)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (org_id) DO UPDATE SET seq = excluded.seq, floor_seq = excluded.floor_seq,
            recorded_at = excluded.recorded_at, types = excluded.types, ready_gen = excluded.ready_gen,
            removals = removals + $7",
    )
    .bind(org.0)
    .bind(head.seq)
    .bind(head.floor)
    .bind(head.recorded_at.map(micros))
    .bind(head.types)
    .bind(head.ready_gen)
    .bind(has_removed)
    .execute(connection)
    .await
    .map_err(store_error)?;
    Ok(())
}

pub(super) type Statement<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Rows that one statement writes at most, and the smaller numbers that make up the rest: few texts, so that each is
/// prepared once, and few statements a batch.
const CHUNKS: [usize; 3] = [64, 8, 1];

/// One statement that writes many rows, in a text for each size of [`CHUNKS`].
pub(super) struct Rows([String; CHUNKS.len()]);

impl Rows {
    pub(super) fn new(head: &str, columns: usize, tail: &str) -> Self {
        Self(CHUNKS.map(|rows| {
            let mut sql = format!("{head} VALUES ");
            for row in 0..rows {
                let separator = if row == 0 { "" } else { ", " };
                let marks = vec!["?"; columns].join(", ");
                write!(sql, "{separator}({marks})").expect("writing to a string");
            }
            sql.push_str(tail);
            sql
        }))
    }

    pub(super) async fn run<T>(
        &'static self,
        connection: &mut SqliteConnection,
        mut rows: &[T],
        bind: impl for<'q> Fn(Statement<'q>, &'q T) -> Result<Statement<'q>, StoreError>,
    ) -> Result<(), StoreError> {
        for (size, sql) in CHUNKS.iter().zip(&self.0) {
            while rows.len() >= *size {
                let (chunk, rest) = rows.split_at(*size);
                let mut query = sqlx::query(AssertSqlSafe(sql.as_str()));
                for row in chunk {
                    query = bind(query, row)?;
                }
                query.execute(&mut *connection).await.map_err(store_error)?;
                rows = rest;
            }
        }
        Ok(())
    }
}

static UPSERT_JOBS: LazyLock<Rows> = LazyLock::new(|| {
    let changing = &JOB_COLUMNS[JOB_FIXED_COLUMNS..];
    let set: Vec<_> = changing.iter().map(|column| format!("{column} = excluded.{column}")).collect();
    Rows::new(
        &format!("/* upsert_jobs */ INSERT INTO job ({})", JOB_COLUMNS.join(", ")),
        JOB_COLUMNS.len(),
        &format!(" ON CONFLICT (org_id, id) DO UPDATE SET {}", set.join(", ")),
    )
});

fn bind_job<'q>(query: Statement<'q>, job: &'q Job) -> Result<Statement<'q>, StoreError> {
    let spec = &job.spec;
    let retry = &spec.retry_policy;
    let idempotency = spec.idempotency.as_ref();
    let error = job.last_error.as_ref();
    let lease = job.lease.as_ref();
    Ok(query
        .bind(job.org_id.0)
        .bind(job.id.0)
        .bind(&*spec.job_type)
        .bind(spec.max_attempts)
        .bind(spec.priority)
        .bind(idempotency.map(|idempotency| &*idempotency.key))
        .bind(idempotency.and_then(|idempotency| idempotency.digest.as_ref()).map(|digest| &digest.0[..]))
        .bind(rows::non_empty(&spec.requested_by))
        .bind(rows::labels_json(&spec.labels))
        .bind(retry.initial_backoff.as_micros() as i64)
        .bind(retry.multiplier)
        .bind(retry.max_backoff.as_micros() as i64)
        .bind(spec.run_timeout.map(|timeout| timeout.as_micros() as i64))
        .bind(spec.payload_bytes)
        .bind(micros(job.created_at))
        .bind(job.created_seq)
        .bind(job.status.as_str())
        .bind(job.attempt)
        .bind(job.failures)
        .bind(micros(job.updated_at))
        .bind(job.started_at.map(micros))
        .bind(job.attempt_started_at.map(micros))
        .bind(job.finished_at.map(micros))
        .bind(job.scheduled_at.map(micros))
        .bind(micros(job.ready_at))
        .bind(job.cancel_requested)
        .bind(job.outcome.as_ref().map(|outcome| &outcome.digest.0[..]))
        .bind(job.outcome.and_then(|outcome| outcome.epoch))
        .bind(lease.map(|lease| &*lease.worker))
        .bind(lease.map(|lease| lease.granted.as_micros() as i64))
        .bind(lease.map(|lease| micros(lease.expires_at)))
        .bind(lease.and_then(|lease| lease.request.as_deref()))
        .bind(lease.is_some_and(|lease| lease.is_confirmed))
        .bind(job.lease_epoch)
        .bind(job.retry_request.as_deref())
        .bind(job.due_at.map(micros))
        .bind(error.map(|error| &*error.code))
        .bind(error.map(|error| &*error.message))
        .bind(job.result_at.map(|at| at.seq))
        .bind(job.result_at.map(|at| micros(at.recorded_at)))
        .bind(job.last_job_seq)
        .bind(job.last_seq)
        .bind(micros(job.last_recorded_at)))
}

static INSERT_PAYLOADS: LazyLock<Rows> =
    LazyLock::new(|| Rows::new("/* insert_payloads */ INSERT INTO job_payload (org_id, job_id, payload)", 3, ""));

fn bind_payload<'q>(query: Statement<'q>, org: OrgId, row: &'q (JobId, Json)) -> Result<Statement<'q>, StoreError> {
    Ok(query.bind(org.0).bind(row.0.0).bind(row.1.as_str()))
}

/// A job's labels as rows.
fn labels(job: &Job) -> impl Iterator<Item = (&str, &str, &Job)> {
    job.spec.labels.iter().map(move |(key, value)| (key.as_str(), value.as_str(), job))
}

static INSERT_LABELS: LazyLock<Rows> = LazyLock::new(|| {
    Rows::new("/* insert_labels */ INSERT INTO job_label (org_id, key, value, created_seq, job_id)", 5, "")
});

fn bind_label<'q>(query: Statement<'q>, org: OrgId, (key, value, job): &'q (&str, &str, &Job)) -> Statement<'q> {
    query.bind(org.0).bind(*key).bind(*value).bind(job.created_seq).bind(job.id.0)
}

static INSERT_EVENTS: LazyLock<Rows> = LazyLock::new(|| {
    let head = format!("/* insert_events */ INSERT INTO job_event ({})", EVENT_COLUMNS.join(", "));
    Rows::new(&head, EVENT_COLUMNS.len(), "")
});

fn bind_event<'q>(query: Statement<'q>, event: &'q JobEvent) -> Result<Statement<'q>, StoreError> {
    Ok(query
        .bind(event.org_id.0)
        .bind(event.seq)
        .bind(event.job_id.0)
        .bind(event.job_seq)
        .bind(micros(event.ts))
        .bind(micros(event.recorded_at))
        .bind(event.kind.as_str())
        .bind(event.prev_status.map(JobStatus::as_str))
        .bind(event.next_status.as_str())
        .bind(event.attempt)
        .bind(rows::non_empty(&event.actor))
        .bind(&*event.job_type)
        .bind(detail::write(event)?)
        .bind(rows::labels_json(&event.labels)))
}
