//! The counters and the series, as batches write them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, LazyLock},
};

use sqlx::{AssertSqlSafe, SqliteConnection};

use super::{
    columns::{Columns, micros},
    error::store_error,
    set::Statement,
};
use crate::{
    domain::{
        clock::Time,
        flow::{Flow, Histogram, Width},
        id::OrgId,
        status::JobStatus,
    },
    store::{
        Bucket, Changes, StoreError, Tally,
        rows::{self, Columns as _},
        series::FORGOTTEN_AT_ONCE,
    },
};

pub(super) async fn write(
    connection: &mut SqliteConnection,
    org: OrgId,
    changes: &Changes,
    now: Time,
) -> Result<(), StoreError> {
    let tallies: Vec<_> = changes.tallies.iter().collect();
    ADD_COUNTS.run(connection, &tallies, |query, (job_type, tally)| bind_tally(query, org, job_type, tally)).await?;
    let recorded_at = changes.head.and_then(|head| head.recorded_at).unwrap_or(now);
    let mut happened = BTreeMap::new();
    for (job_type, tally) in changes.tallies.iter().filter(|(_, tally)| !tally.flow.is_empty()) {
        for width in Width::ALL {
            let bucket = Bucket { width, start: width.start(recorded_at), job_type: Arc::clone(job_type) };
            happened.insert(bucket, tally.flow.clone());
        }
    }
    add(connection, org, false, happened).await?;
    add(connection, org, true, changes.removed_flow.clone()).await?;
    if let Some(time) = changes.new_minute {
        for width in Width::ALL {
            let query = sqlx::query(FORGET).bind(org.0).bind(width.seconds()).bind(micros(width.kept_since(time)));
            query.bind(FORGOTTEN_AT_ONCE).execute(&mut *connection).await.map_err(store_error)?;
        }
    }
    Ok(())
}

/// Removes the counters of types whose last job goes.
pub(super) async fn forget_types(
    connection: &mut SqliteConnection,
    org: OrgId,
    types: &[Arc<str>],
) -> Result<(), StoreError> {
    if types.is_empty() {
        return Ok(());
    }
    let sql =
        "/* forget_types */ DELETE FROM org_counter WHERE org_id = $1 AND type IN (SELECT value FROM json_each($2))";
    let names: Vec<_> = types.iter().map(|name| &**name).collect();
    let query = sqlx::query(sql).bind(org.0).bind(rows::json_text(&names));
    query.execute(connection).await.map_err(store_error)?;
    Ok(())
}

const FORGET: &str = "/* forget */ DELETE FROM org_series WHERE org_id = $1 AND width = $2 AND start <= (
    SELECT max(start) FROM (
        SELECT start FROM org_series WHERE org_id = $1 AND width = $2 AND start < $3 ORDER BY start LIMIT $4))";

static ADD_COUNTS: LazyLock<Rows> = LazyLock::new(|| {
    let names: Vec<_> = JobStatus::ALL.map(JobStatus::as_str).into_iter().chain(["scheduled"]).collect();
    let add: Vec<_> = names.iter().map(|name| format!("{name} = {name} + excluded.{name}")).collect();
    Rows::new(
        &format!("/* add_counts */ INSERT INTO org_counter (org_id, type, {})", names.join(", ")),
        2 + names.len(),
        &format!(" ON CONFLICT (org_id, type) DO UPDATE SET {}", add.join(", ")),
    )
});

fn bind_tally<'q>(
    query: Statement<'q>,
    org: OrgId,
    job_type: &'q str,
    tally: &Tally,
) -> Result<Statement<'q>, StoreError> {
    let query = query.bind(org.0).bind(job_type);
    let query = JobStatus::ALL.into_iter().fold(query, |query, status| query.bind(tally.counts.get(status)));
    Ok(query.bind(tally.scheduled))
}

/// Adds to the buckets of the series.
async fn add(
    connection: &mut SqliteConnection,
    org: OrgId,
    removed: bool,
    mut flows: BTreeMap<Bucket, Flow>,
) -> Result<(), StoreError> {
    for (bucket, flow) in &mut flows {
        // Histograms are added up here: SQL has no sum of arrays. What only creates has none.
        if !(flow.waits.is_empty() && flow.runs.is_empty()) {
            let stored = durations(connection, org, removed, bucket).await?;
            flow.waits.add_all(&stored.0);
            flow.runs.add_all(&stored.1);
        }
    }
    let rows: Vec<_> = flows.iter().collect();
    ADD_SERIES.run(connection, &rows, |query, (bucket, flow)| Ok(bind_bucket(query, org, removed, bucket, flow))).await
}

const DURATIONS: &str = "/* durations */ SELECT waits, runs FROM org_series
    WHERE org_id = $1 AND width = $2 AND start = $3 AND type = $4 AND removed = $5";

async fn durations(
    connection: &mut SqliteConnection,
    org: OrgId,
    removed: bool,
    bucket: &Bucket,
) -> Result<(Histogram, Histogram), StoreError> {
    let query = sqlx::query(DURATIONS).bind(org.0).bind(bucket.width.seconds()).bind(micros(bucket.start));
    let query = query.bind(&*bucket.job_type).bind(removed);
    let Some(row) = query.fetch_optional(connection).await.map_err(store_error)? else { return Ok(Default::default()) };
    let mut columns = Columns::of(&row);
    Ok((histogram(columns.text()?)?, histogram(columns.text()?)?))
}

pub(super) fn histogram(text: &str) -> Result<Histogram, StoreError> {
    serde_json::from_str(text).map(Histogram::new).map_err(|_| rows::damaged("histogram"))
}

static ADD_SERIES: LazyLock<Rows> = LazyLock::new(|| {
    let add: Vec<_> = Flow::NAMES.iter().map(|name| format!("{name} = {name} + excluded.{name}")).collect();
    Rows::new(
        &format!(
            "/* add_series */ INSERT INTO org_series (org_id, width, start, type, removed, {}, waits, runs)",
            Flow::NAMES.join(", ")
        ),
        5 + Flow::NAMES.len() + 2,
        // An empty one stands for none that is new.
        &format!(
            " ON CONFLICT (org_id, width, start, type, removed) DO UPDATE SET {},
                waits = CASE excluded.waits WHEN '[]' THEN waits ELSE excluded.waits END,
                runs = CASE excluded.runs WHEN '[]' THEN runs ELSE excluded.runs END",
            add.join(", ")
        ),
    )
});

fn bind_bucket<'q>(query: Statement<'q>, org: OrgId, removed: bool, bucket: &'q Bucket, flow: &Flow) -> Statement<'q> {
    let query = query.bind(org.0).bind(bucket.width.seconds()).bind(micros(bucket.start)).bind(&*bucket.job_type);
    let query = flow.counts().into_iter().fold(query.bind(removed), |query, count| query.bind(count));
    query.bind(rows::json_text(&flow.waits.counts())).bind(rows::json_text(&flow.runs.counts()))
}

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
                query.execute(&mut *connection).await.map_err(store_error)?;
                rows = rest;
            }
        }
        Ok(())
    }
}
