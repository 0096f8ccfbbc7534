//! A transaction of the writer: loads and writes with a few statements, however many commands there are.

use std::{fmt::Write as _, sync::LazyLock};

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, SqliteConnection, query::Query, sqlite::SqliteArguments};
use tokio::sync::OwnedMutexGuard;

use super::rows::{self, Columns, EVENT_COLUMNS, JOB_COLUMNS, JOB_FIXED_COLUMNS};
use crate::{
    domain::{
        clock::Time,
        event::JobEvent,
        id::{JobId, OrgId},
        job::Job,
        json::Json,
        status::JobStatus,
    },
    store::{Batch, Changes, Head, Loaded, Needs, StatusCounts, StoreError},
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
        let (head, types) = load_head(&mut self.connection, org, needs).await?;
        let jobs = if needs.jobs.is_empty() && needs.keys.is_empty() {
            Vec::new()
        } else {
            load_jobs(&mut self.connection, org, needs).await?
        };
        Ok(Loaded { head, jobs, types })
    }

    async fn write(&mut self, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
        let Some(head) = changes.head else { return Ok(()) };
        let connection = &mut self.connection;
        UPSERT_JOBS.run(connection, &changes.jobs, bind_job).await?;
        INSERT_PAYLOADS.run(connection, &changes.payloads, |query, row| bind_payload(query, org, row)).await?;
        INSERT_EVENTS.run(connection, &changes.events, |query, event| bind_event(query, event)).await?;
        let counts: Vec<_> = changes.counts.iter().collect();
        ADD_COUNTS
            .run(connection, &counts, |query, (job_type, counts)| bind_counts(query, org, job_type, counts))
            .await?;
        save_head(connection, org, head).await
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { mut slot, mut connection, .. } = *self;
        match sqlx::query("COMMIT").execute(&mut connection).await {
            Ok(_) => {
                *slot = Some(connection);
                Ok(())
            }
            Err(error) => Err(match StoreError::from(error) {
                // The pages did not fit: SQLite has rolled back, and a frame cut short fails its checksum.
                StoreError::Full(reason) => StoreError::Full(reason),
                // Of other failures it can't be told what they left behind: look before running it again.
                other => StoreError::OutcomeUnknown(other.to_string()),
            }),
        }
    }
}

pub(super) const LOAD_HEAD: &str = "/* load_head */ SELECT seq, floor_seq, recorded_at, types,
        (SELECT json_group_array(type) FROM org_counter
         WHERE org_id = $1 AND type IN (SELECT value FROM json_each($2)))
     FROM org_head WHERE org_id = $1";

async fn load_head(
    connection: &mut SqliteConnection,
    org: OrgId,
    needs: &Needs,
) -> Result<(Head, Vec<String>), StoreError> {
    let row = sqlx::query(LOAD_HEAD)
        .bind(org.0)
        .bind(rows::json_text(&needs.types.iter().map(|name| &**name).collect::<Vec<_>>()))
        .fetch_optional(connection)
        .await?;
    let Some(row) = row else {
        return Ok((Head::EMPTY, Vec::new()));
    };
    let mut columns = Columns::of(&row);
    let head = Head {
        seq: columns.get()?,
        floor: columns.get()?,
        recorded_at: columns.optional_time()?,
        types: columns.get()?,
    };
    let types = serde_json::from_str(columns.get()?).map_err(|_| rows::damaged("type"))?;
    Ok((head, types))
}

/// CROSS JOIN keeps SQLite from scanning the org's jobs for the wanted ones.
pub(super) static LOAD_JOBS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_jobs */ WITH wanted (id) AS (
            SELECT unhex(value) FROM json_each($2)
            UNION SELECT id FROM job WHERE org_id = $1 AND idempotency_key IN (SELECT value FROM json_each($3))
        )
        SELECT {}, e.detail_json ->> '$.stage', e.detail_json ->> '$.progress'
        FROM wanted CROSS JOIN job j ON j.org_id = $1 AND j.id = wanted.id
        LEFT JOIN job_event e ON e.org_id = j.org_id AND e.seq = j.last_seq",
        job_columns("j")
    )
});

async fn load_jobs(connection: &mut SqliteConnection, org: OrgId, needs: &Needs) -> Result<Vec<Job>, StoreError> {
    let ids: Vec<_> = needs.jobs.iter().map(|id| id.0.simple().to_string()).collect();
    let found = sqlx::query(AssertSqlSafe(LOAD_JOBS.as_str()))
        .bind(org.0)
        .bind(rows::json_text(&ids))
        .bind(rows::json_text(&needs.keys.iter().map(|key| &**key).collect::<Vec<_>>()))
        .fetch_all(connection)
        .await?;
    found.iter().map(|row| rows::job(&mut Columns::of(row))).collect()
}

/// [`JOB_COLUMNS`] of a table alias, for a SELECT.
pub(super) fn job_columns(alias: &str) -> String {
    JOB_COLUMNS.map(|column| format!("{alias}.{column}")).join(", ")
}

async fn save_head(connection: &mut SqliteConnection, org: OrgId, head: Head) -> Result<(), StoreError> {
    sqlx::query(
        "/* save_head */ INSERT INTO org_head (org_id, seq, floor_seq, recorded_at, types) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (org_id) DO UPDATE SET seq = excluded.seq, floor_seq = excluded.floor_seq,
            recorded_at = excluded.recorded_at, types = excluded.types",
    )
    .bind(org.0)
    .bind(head.seq)
    .bind(head.floor)
    .bind(head.recorded_at.map(rows::micros))
    .bind(head.types)
    .execute(connection)
    .await?;
    Ok(())
}

type Statement<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Rows that one statement writes at most, and the smaller numbers that make up the rest: few texts, so that each is
/// prepared once, and few statements a batch.
const CHUNKS: [usize; 3] = [64, 8, 1];

/// One statement that writes many rows, in a text for each size of [`CHUNKS`].
struct Rows([String; CHUNKS.len()]);

impl Rows {
    fn new(head: &str, columns: usize, tail: &str) -> Self {
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

    async fn run<T>(
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
                query.execute(&mut *connection).await?;
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
    Ok(query
        .bind(job.org_id.0)
        .bind(job.id.0)
        .bind(&*spec.job_type)
        .bind(spec.max_attempts)
        .bind(spec.priority)
        .bind(idempotency.map(|idempotency| &*idempotency.key))
        .bind(idempotency.map(|idempotency| &idempotency.digest.0[..]))
        .bind(rows::non_empty(&spec.requested_by))
        .bind(rows::labels_json(&spec.labels))
        .bind(retry.initial_backoff.as_micros() as i64)
        .bind(retry.multiplier)
        .bind(retry.max_backoff.as_micros() as i64)
        .bind(rows::micros(job.created_at))
        .bind(job.status.as_str())
        .bind(job.attempt)
        .bind(job.failures)
        .bind(rows::micros(job.updated_at))
        .bind(job.started_at.map(rows::micros))
        .bind(job.attempt_started_at.map(rows::micros))
        .bind(job.finished_at.map(rows::micros))
        .bind(job.scheduled_at.map(rows::micros))
        .bind(rows::micros(job.ready_at))
        .bind(job.cancel_requested)
        .bind(job.outcome.as_ref().map(|digest| &digest.0[..]))
        .bind(error.map(|error| &*error.code))
        .bind(error.map(|error| &*error.message))
        .bind(job.result_seq)
        .bind(job.last_job_seq)
        .bind(job.last_seq))
}

static INSERT_PAYLOADS: LazyLock<Rows> =
    LazyLock::new(|| Rows::new("/* insert_payloads */ INSERT INTO job_payload (org_id, job_id, payload)", 3, ""));

fn bind_payload<'q>(query: Statement<'q>, org: OrgId, row: &'q (JobId, Json)) -> Result<Statement<'q>, StoreError> {
    Ok(query.bind(org.0).bind(row.0.0).bind(row.1.as_str()))
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
        .bind(rows::micros(event.ts))
        .bind(rows::micros(event.recorded_at))
        .bind(event.kind.as_str())
        .bind(event.prev_status.map(JobStatus::as_str))
        .bind(event.next_status.as_str())
        .bind(event.attempt)
        .bind(rows::non_empty(&event.actor))
        .bind(&*event.job_type)
        .bind(rows::detail_json(event)?))
}

static ADD_COUNTS: LazyLock<Rows> = LazyLock::new(|| {
    let add: Vec<_> = JobStatus::ALL.iter().map(|status| format!("{status} = {status} + excluded.{status}")).collect();
    let columns = JobStatus::ALL.map(JobStatus::as_str).join(", ");
    Rows::new(
        &format!("/* add_counts */ INSERT INTO org_counter (org_id, type, {columns})"),
        2 + JobStatus::ALL.len(),
        &format!(" ON CONFLICT (org_id, type) DO UPDATE SET {}", add.join(", ")),
    )
});

fn bind_counts<'q>(
    query: Statement<'q>,
    org: OrgId,
    job_type: &'q str,
    counts: &StatusCounts,
) -> Result<Statement<'q>, StoreError> {
    let query = query.bind(org.0).bind(job_type);
    Ok(JobStatus::ALL.into_iter().fold(query, |query, status| query.bind(counts.get(status))))
}
