//! Bulk operations.

use std::sync::LazyLock;

use sqlx::{AssertSqlSafe, SqliteConnection, SqlitePool};
use uuid::Uuid;

use super::{
    columns::{Columns, micros},
    error::store_error,
    list::list_in,
    set::Set,
};
use crate::{
    domain::{bulk::BulkOperation, clock::Time, id::OrgId, job::Job},
    store::{
        BulkNeeds, BulkPage, Changes, FoundBulk, StoreError,
        bulk::{self, BULK_COLUMNS, BULK_KEPT, bulk_columns},
    },
};

pub(super) static ONE: LazyLock<String> = LazyLock::new(|| {
    format!("/* bulk_operation */ SELECT {} FROM bulk_operation b WHERE org_id = $1 AND id = $2", bulk_columns("b"))
});

/// The oldest operation under way.
pub(super) static OPEN: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* open_bulk */ SELECT {} FROM bulk_operation b INDEXED BY idx_bulk_operation_open
        WHERE org_id = $1 AND finished_at IS NULL ORDER BY created_at, id LIMIT 1",
        bulk_columns("b")
    )
});

pub(super) static PAGE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* bulk_operations */ SELECT {} FROM bulk_operation b INDEXED BY idx_bulk_operation_begun
        WHERE org_id = $1 AND (created_at, id) < ($2, $3) ORDER BY created_at DESC, id DESC LIMIT +$4",
        bulk_columns("b")
    )
});

pub(super) async fn one(
    connection: &mut SqliteConnection,
    org: OrgId,
    id: Uuid,
) -> Result<Option<BulkOperation>, StoreError> {
    let query = sqlx::query(AssertSqlSafe(ONE.as_str())).bind(org.0).bind(id);
    let found = query.fetch_optional(connection).await.map_err(store_error)?;
    found.map(|row| bulk::read(&mut Columns::of(&row))).transpose()
}

pub(super) async fn page(
    pool: &SqlitePool,
    org: OrgId,
    before: Option<(Time, Uuid)>,
    limit: usize,
) -> Result<BulkPage, StoreError> {
    let (time, id) = before.map_or((i64::MAX, Uuid::max()), |(time, id)| (micros(time), id));
    let query = sqlx::query(AssertSqlSafe(PAGE.as_str())).bind(org.0).bind(time).bind(id).bind(limit as i64 + 1);
    let found = query.fetch_all(pool).await.map_err(store_error)?;
    let operations = found.iter().map(|row| bulk::read(&mut Columns::of(row))).collect::<Result<_, _>>()?;
    Ok(bulk::page(operations, limit))
}

/// Loads what a batch needs, and the jobs of the next step.
pub(super) async fn load(
    connection: &mut SqliteConnection,
    org: OrgId,
    needs: &BulkNeeds,
) -> Result<(FoundBulk, Vec<Job>), StoreError> {
    let (mut found, mut jobs) = (FoundBulk::default(), Vec::new());
    for id in &needs.ids {
        found.operations.extend(one(connection, org, *id).await?);
    }
    if needs.is_counting {
        let sql = "/* count_open_bulk */ SELECT count(*) FROM bulk_operation WHERE org_id = $1 AND finished_at IS NULL";
        let open: i64 = sqlx::query_scalar(sql).bind(org.0).fetch_one(&mut *connection).await.map_err(store_error)?;
        found.open = open.unsigned_abs() as usize;
    }
    if let Some(limit) = needs.step {
        let query = sqlx::query(AssertSqlSafe(OPEN.as_str())).bind(org.0);
        let open = query.fetch_optional(&mut *connection).await.map_err(store_error)?;
        if let Some(open) = open.map(|row| bulk::read(&mut Columns::of(&row))).transpose()? {
            let page = list_in(connection, org, &bulk::step_query(&open, limit)).await?;
            let (step, of_step) = bulk::step(&open, page);
            (found.step, jobs) = (Some(step), of_step);
            if !needs.ids.contains(&open.request.id) {
                found.operations.push(open);
            }
        }
    }
    Ok((found, jobs))
}

/// Writes operations, and removes the oldest finished ones of orgs in which one has begun.
pub(super) async fn write(connection: &mut SqliteConnection, changes: &[(OrgId, &Changes)]) -> Result<(), StoreError> {
    let rows = changes.iter().flat_map(|(org, changes)| changes.bulk.iter().map(|bulk| bulk::values(*org, bulk)));
    Set::plain(&BULK_COLUMNS, rows.collect()).put(connection, "save_bulk", "bulk_operation", OVER_BULK).await?;
    let has_begun = |changes: &Changes| changes.bulk.iter().any(|bulk| bulk.created_at == bulk.updated_at);
    for (org, _) in changes.iter().filter(|(_, changes)| has_begun(changes)) {
        let query = sqlx::query(DROP_BULK).bind(org.0).bind(BULK_KEPT);
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(())
}

const OVER_BULK: &str =
    " ON CONFLICT (org_id, id) DO UPDATE SET updated_at = excluded.updated_at, request = excluded.request,
    finished_at = excluded.finished_at, status = excluded.status, cursor = excluded.cursor, matched = excluded.matched,
    reached = excluded.reached, changed = excluded.changed, unchanged = excluded.unchanged, failed = excluded.failed";

pub(super) const DROP_BULK: &str =
    "/* drop_bulk */ DELETE FROM bulk_operation WHERE org_id = $1 AND finished_at IS NOT NULL
    AND (created_at, id) <= (SELECT created_at, id FROM bulk_operation INDEXED BY idx_bulk_operation_begun
        WHERE org_id = $1 ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET $2)";
