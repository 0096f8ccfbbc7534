//! Writes of a batch to the counters and the series.

use std::sync::{Arc, LazyLock};

use sqlx::SqliteConnection;

use super::{
    columns::{Columns, micros},
    error::store_error,
    heads::Written,
    load::hex,
    set::Set,
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
        value::Value,
    },
};

/// Adds tallies to counters and series. Removes old buckets, and the counters of types whose last job is removed.
pub(super) async fn write(
    connection: &mut SqliteConnection,
    written: &[Written<'_>],
    now: Time,
) -> Result<(), StoreError> {
    let mut tallies = Vec::new();
    for Written { org, changes, .. } in written {
        tallies.extend(changes.tallies.iter().map(|(name, tally)| tally_values(*org, name, tally)));
    }
    let columns: Vec<_> = ["org_id", "type"].into_iter().chain(counts()).collect();
    Set::plain(&columns, tallies).put(connection, "add_counts", "org_counter", &OVER_COUNTS).await?;
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
        SELECT start FROM org_series WHERE org_id = $1 AND width = $2 AND start < $3 ORDER BY start LIMIT +$4))";

/// The count columns of `org_counter`.
fn counts() -> impl Iterator<Item = &'static str> {
    JobStatus::ALL.map(JobStatus::as_str).into_iter().chain(["scheduled"])
}

static OVER_COUNTS: LazyLock<String> = LazyLock::new(|| {
    let add: Vec<_> = counts().map(|name| format!("{name} = {name} + excluded.{name}")).collect();
    format!(" ON CONFLICT (org_id, type) DO UPDATE SET {}", add.join(", "))
});

fn tally_values<'a>(org: OrgId, job_type: &'a str, tally: &Tally) -> Vec<Value<'a>> {
    let mut values = vec![org.0.into(), job_type.into()];
    values.extend(JobStatus::ALL.map(|status| tally.counts.get(status).into()));
    values.push(tally.scheduled.into());
    values
}

/// A flow to add to one bucket of an org's series.
struct Added {
    org: OrgId,
    /// True: to what retention removed. False: to what happened.
    is_removed: bool,
    bucket: Bucket,
    flow: Flow,
}

async fn add(connection: &mut SqliteConnection, added: &mut [Added]) -> Result<(), StoreError> {
    // Histograms are added here, because SQL can't add arrays. A flow of creates alone has none.
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
    let key = ["org_id", "width", "start", "type", "removed"];
    let columns: Vec<_> = key.into_iter().chain(Flow::NAMES).chain(["waits", "runs"]).collect();
    let rows = added.iter().map(bucket_values).collect();
    Set::plain(&columns, rows).put(connection, "add_series", "org_series", &OVER_SERIES).await
}

/// The histograms of those wanted buckets that exist.
pub(super) const DURATIONS: &str = "/* durations */ SELECT wanted.key, s.waits, s.runs
    FROM json_each($1) wanted CROSS JOIN org_series s
    ON s.org_id = unhex(wanted.value ->> 0) AND s.width = wanted.value ->> 1 AND s.start = wanted.value ->> 2
        AND s.type = wanted.value ->> 3 AND s.removed = wanted.value ->> 4";

pub(super) fn histogram(text: &str) -> Result<Histogram, StoreError> {
    serde_json::from_str(text).map(Histogram::new).map_err(|_| rows::damaged("histogram"))
}

static OVER_SERIES: LazyLock<String> = LazyLock::new(|| {
    let add: Vec<_> = Flow::NAMES.iter().map(|name| format!("{name} = {name} + excluded.{name}")).collect();
    // An empty histogram means that the stored one does not change.
    format!(
        " ON CONFLICT (org_id, width, start, type, removed) DO UPDATE SET {},
            waits = CASE excluded.waits WHEN '[]' THEN waits ELSE excluded.waits END,
            runs = CASE excluded.runs WHEN '[]' THEN runs ELSE excluded.runs END",
        add.join(", ")
    )
});

fn bucket_values(added: &Added) -> Vec<Value<'_>> {
    let Added { org, is_removed, bucket, flow } = added;
    let mut values: Vec<Value<'_>> = vec![
        org.0.into(),
        bucket.width.seconds().into(),
        bucket.start.into(),
        (&*bucket.job_type).into(),
        (*is_removed).into(),
    ];
    values.extend(flow.counts().map(Value::from));
    values.extend([&flow.waits, &flow.runs].map(|sizes| rows::json_text(&sizes.counts()).into()));
    values
}
