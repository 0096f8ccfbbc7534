//! Erasures: loads the events of jobs that are to be erased, and blanks them.

use sqlx::{AssertSqlSafe, SqliteConnection};
use std::sync::LazyLock;

use super::{
    columns::{Columns, micros},
    error::store_error,
    load::{hex, ids_json},
    set::Set,
    write,
};
use crate::{
    domain::{id::OrgId, job::Job},
    store::{
        Changes, ErasureNeeds, FoundErasures, StoreError, Unblanked, erasure,
        rows::{self, EVENT_COLUMNS, json_text},
    },
};

pub(super) const LEFT: &str =
    "/* unblanked */ SELECT job_id, after_seq, last_seq, since, until, requested_by FROM job_unblanked
    WHERE org_id = $1 AND ($3 OR job_id IN (SELECT unhex(value) FROM json_each($2)))
    ORDER BY job_id IN (SELECT unhex(value) FROM json_each($2)) DESC LIMIT +$4";

/// The events come in the order of the jobs. Only as many are read as may be blanked.
pub(super) static STORED: LazyLock<String> = LazyLock::new(|| {
    let columns = EVENT_COLUMNS.join(", ");
    format!(
        "/* stored_events */ SELECT {columns}, NULL, bytes FROM (
            SELECT f.*, sum(bytes) OVER (ORDER BY place, seq) - bytes AS before FROM (
                SELECT wanted.key AS place, e.* FROM json_each($2) wanted CROSS JOIN job_event e INDEXED BY idx_job_event_job
                    ON e.org_id = $1 AND e.job_id = unhex(wanted.value ->> 0)
                    AND e.seq > wanted.value ->> 1 AND e.seq <= wanted.value ->> 2
                LIMIT +$3) f)
        WHERE before < $4 ORDER BY place, seq"
    )
});

/// Loads what a batch needs. `to_erase` are jobs that are to be erased.
pub(super) async fn load(
    connection: &mut SqliteConnection,
    org: OrgId,
    needs: &ErasureNeeds,
    to_erase: Vec<&Job>,
) -> Result<FoundErasures, StoreError> {
    let (left, most) = (load_left(connection, org, needs).await?, needs.most());
    let wanted = erasure::wanted(to_erase, &left, most);
    if wanted.is_empty() {
        return Ok(FoundErasures { left, ..FoundErasures::default() });
    }
    let named: Vec<_> = wanted.iter().map(|of_job| (hex(of_job.job.0), of_job.after, of_job.last)).collect();
    let query = sqlx::query(AssertSqlSafe(STORED.as_str())).bind(org.0).bind(json_text(&named));
    let found = query.bind(most.events).bind(most.bytes).fetch_all(connection).await.map_err(store_error)?;
    let loaded = found.iter().map(|row| rows::stored_event(&mut Columns::of(row))).collect::<Result<_, _>>()?;
    Ok(FoundErasures { left, events: erasure::by_job(&wanted, loaded, most) })
}

async fn load_left(
    connection: &mut SqliteConnection,
    org: OrgId,
    needs: &ErasureNeeds,
) -> Result<Vec<Unblanked>, StoreError> {
    if needs.jobs.is_empty() && !needs.of_any {
        return Ok(Vec::new());
    }
    let limit = needs.jobs.len() as i64 + i64::from(needs.of_any);
    let query = sqlx::query(LEFT).bind(org.0).bind(ids_json(&needs.jobs)).bind(needs.of_any).bind(limit);
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| rows::unblanked(&mut Columns::of(row))).collect()
}

/// Blanks events, and notes what is left.
pub(super) async fn write(connection: &mut SqliteConnection, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
    let erased: Vec<_> = changes.edited.iter().filter(|edited| edited.is_erased).map(|edited| edited.job).collect();
    if !erased.is_empty() {
        // Now, since a new job of this batch may use the key.
        let sql = "/* erase */ UPDATE job SET idempotency_key = NULL, request_digest = NULL
            WHERE org_id = $1 AND id IN (SELECT unhex(value) FROM json_each($2))";
        let query = sqlx::query(sql).bind(org.0).bind(ids_json(&erased));
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    if !changes.blanked.is_empty() {
        let sql = "/* erase */ DELETE FROM job_result WHERE org_id = $1 AND (job_id, seq) IN (
            SELECT unhex(value ->> 0), CAST(value ->> 1 AS INTEGER) FROM json_each($2))";
        let of_events: Vec<_> = changes.blanked.iter().map(|event| (hex(event.job_id.0), event.seq)).collect();
        let query = sqlx::query(sql).bind(org.0).bind(json_text(&of_events));
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    let mut events = Vec::with_capacity(changes.blanked.len());
    for event in &changes.blanked {
        events.push(write::blank_values(event)?);
    }
    Set::keyed(&write::BLANK_COLUMNS, events, 2).update(connection, "job_event").await?;
    for unblanked in &changes.unblanked {
        let sql = if unblanked.is_done() {
            "/* blanked */ DELETE FROM job_unblanked WHERE org_id = $1 AND job_id = $2"
        } else {
            "/* left */ INSERT INTO job_unblanked (org_id, job_id, after_seq, last_seq, since, until, requested_by)
                VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (org_id, job_id) DO UPDATE SET after_seq = excluded.after_seq"
        };
        let mut query = sqlx::query(sql).bind(org.0).bind(unblanked.job.0);
        if !unblanked.is_done() {
            query = query.bind(unblanked.after).bind(unblanked.last).bind(micros(unblanked.since));
            query = query.bind(micros(unblanked.until)).bind(rows::non_empty(&unblanked.requester));
        }
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(())
}
