//! The counters and the series, as batches write them.

use std::{
    fmt::Write as _,
    sync::{Arc, LazyLock},
};

use sqlx::{AssertSqlSafe, SqliteConnection};

use super::{
    columns::{Columns, micros},
    error::store_error,
    heads::Written,
    load::hex,
    set::{INSERT, Statement},
};
use crate::{
    domain::{
        clock::Time,
        flow::{Flow, Histogram, Width},
        id::OrgId,
        status::JobStatus,
    },
    store::{
        Bucket, StoreError, Tally,
        rows::{self, Columns as _},
        series::FORGOTTEN_AT_ONCE,
    },
};

/// Adds what batches count and what happened in them, and lets go of what is too old and of types whose last job goes.
pub(super) async fn write(
    connection: &mut SqliteConnection,
    written: &[Written<'_>],
    now: Time,
) -> Result<(), StoreError> {
    let mut tallies = Vec::new();
    for Written { org, changes, .. } in written {
        tallies.extend(changes.tallies.iter().map(|(name, tally)| (*org, name, tally)));
    }
    ADD_COUNTS.run(connection, &tallies, |query, (org, name, tally)| bind_tally(query, *org, name, tally)).await?;
    let mut flows = Vec::new();
    for of_org in written {
        let Written { org, changes, .. } = of_org;
        let recorded_at = of_org.recorded_at(now);
        for (job_type, tally) in changes.tallies.iter().filter(|(_, tally)| !tally.flow.is_empty()) {
            for width in Width::ALL {
                let bucket = Bucket { width, start: width.start(recorded_at), job_type: Arc::clone(job_type) };
                flows.push(Added { org: *org, is_removed: false, bucket, flow: tally.flow.clone() });
            }
        }
        for (bucket, flow) in &changes.removed_flow {
            flows.push(Added { org: *org, is_removed: true, bucket: bucket.clone(), flow: flow.clone() });
        }
    }
    add(connection, &mut flows).await?;
    for Written { org, changes, .. } in written {
        for width in Width::ALL.into_iter().filter(|_| changes.new_minute.is_some()) {
            let query = sqlx::query(FORGET).bind(org.0).bind(width.seconds());
            let query =
                query.bind(changes.new_minute.map(|time| micros(width.kept_since(time)))).bind(FORGOTTEN_AT_ONCE);
            query.execute(&mut *connection).await.map_err(store_error)?;
        }
        forget_types(connection, *org, &changes.forgotten).await?;
    }
    Ok(())
}

/// Removes the counters of types whose last job goes.
async fn forget_types(connection: &mut SqliteConnection, org: OrgId, types: &[Arc<str>]) -> Result<(), StoreError> {
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
        &format!("/* add_counts */ {INSERT} org_counter (org_id, type, {})", names.join(", ")),
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

/// What is added to a bucket of an org's series.
struct Added {
    org: OrgId,
    /// To what retention has taken away, not to what happened.
    is_removed: bool,
    bucket: Bucket,
    flow: Flow,
}

/// Adds to the buckets of the series.
async fn add(connection: &mut SqliteConnection, added: &mut [Added]) -> Result<(), StoreError> {
    // Histograms are added up here: SQL has no sum of arrays. What only creates has none.
    let has_durations = |added: &Added| !(added.flow.waits.is_empty() && added.flow.runs.is_empty());
    let with_durations: Vec<_> = (0..added.len()).filter(|n| has_durations(&added[*n])).collect();
    let name = |Added { org, is_removed, bucket, .. }: &Added| {
        let Bucket { width, start, job_type } = bucket;
        (hex(org.0), width.seconds(), micros(*start), job_type.to_string(), *is_removed as i64)
    };
    let names: Vec<_> = with_durations.iter().map(|n| name(&added[*n])).collect();
    if !names.is_empty() {
        let query = sqlx::query(DURATIONS).bind(rows::json_text(&names));
        for row in query.fetch_all(&mut *connection).await.map_err(store_error)? {
            let mut columns = Columns::of(&row);
            let nth = usize::try_from(columns.long()?).ok().and_then(|n| with_durations.get(n).copied());
            let Flow { waits, runs, .. } = &mut added[nth.ok_or_else(|| rows::damaged("histogram"))?].flow;
            waits.add_all(&histogram(columns.text()?)?);
            runs.add_all(&histogram(columns.text()?)?);
        }
    }
    ADD_SERIES.run(connection, added, |query, added| Ok(bind_bucket(query, added))).await
}

/// Which of the wanted buckets are there, and their histograms.
pub(super) const DURATIONS: &str = "/* durations */ SELECT wanted.key, s.waits, s.runs
    FROM json_each($1) wanted CROSS JOIN org_series s
    ON s.org_id = unhex(wanted.value ->> 0) AND s.width = wanted.value ->> 1 AND s.start = wanted.value ->> 2
        AND s.type = wanted.value ->> 3 AND s.removed = wanted.value ->> 4";

pub(super) fn histogram(text: &str) -> Result<Histogram, StoreError> {
    serde_json::from_str(text).map(Histogram::new).map_err(|_| rows::damaged("histogram"))
}

static ADD_SERIES: LazyLock<Rows> = LazyLock::new(|| {
    let add: Vec<_> = Flow::NAMES.iter().map(|name| format!("{name} = {name} + excluded.{name}")).collect();
    Rows::new(
        &format!(
            "/* add_series */ {INSERT} org_series (org_id, width, start, type, removed, {}, waits, runs)",
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

fn bind_bucket<'q>(query: Statement<'q>, added: &'q Added) -> Statement<'q> {
    let Added { org, is_removed, bucket, flow } = added;
    let query = query.bind(org.0).bind(bucket.width.seconds()).bind(micros(bucket.start)).bind(&*bucket.job_type);
    let query = flow.counts().into_iter().fold(query.bind(*is_removed), |query, count| query.bind(count));
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
