//! Bulk operations.

use std::sync::{Arc, LazyLock};

use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::{
    columns::Columns,
    connections::{Connections, arguments},
    error::store_error,
    list::list_in,
    statement::{Statement, unnest},
    write::Write,
};
use crate::{
    domain::{bulk::BulkOperation, clock::Time, id::OrgId, job::Job},
    store::{
        BulkNeeds, BulkPage, FoundBulk, StoreError,
        bulk::{self, BULK_KEPT, bulk_columns, failed_text, request_text},
    },
};

static ONE: LazyLock<String> = LazyLock::new(|| {
    format!("/* bulk_operation */ SELECT {} FROM jobledger.read_bulk_operation($1, $2) b", bulk_columns("b"))
});

static PAGE: LazyLock<String> = LazyLock::new(|| {
    format!("/* bulk_operations */ SELECT {} FROM jobledger.read_bulk_operations($1, $2, $3, $4) b", bulk_columns("b"))
});

/// Operations by id, and the oldest one under way if that is wanted.
static NEEDED: LazyLock<String> = LazyLock::new(|| {
    let columns = bulk_columns("b");
    format!(
        "/* needed_bulk */ (SELECT false AS is_next, {columns} FROM unnest($2::uuid[]) AS wanted (id)
            CROSS JOIN LATERAL (SELECT * FROM jobledger.bulk_operation b WHERE b.org_id = $1 AND b.id = wanted.id OFFSET 0) b)
        UNION ALL
        (SELECT true, {columns} FROM jobledger.bulk_operation b WHERE $3 AND b.org_id = $1 AND b.finished_at IS NULL
            ORDER BY b.created_at, b.id LIMIT 1)"
    )
});

pub(super) async fn one(readers: &Arc<Connections>, org: OrgId, id: Uuid) -> Result<Option<BulkOperation>, StoreError> {
    let found = readers.fetch(ONE.as_str(), arguments![org.0, id]).await?;
    found.first().map(|row| bulk::read(&mut Columns::of(row))).transpose()
}

pub(super) async fn page(
    readers: &Arc<Connections>,
    org: OrgId,
    before: Option<(Time, Uuid)>,
    limit: usize,
) -> Result<BulkPage, StoreError> {
    let (time, id) = before.unzip();
    let found = readers.fetch(PAGE.as_str(), arguments![org.0, time, id, limit as i64 + 1]).await?;
    let operations = found.iter().map(|row| bulk::read(&mut Columns::of(row))).collect::<Result<_, _>>()?;
    Ok(bulk::page(operations, limit))
}

/// Loads what a batch needs, and the jobs of the next step. `held` are the orgs of the transaction.
pub(super) async fn load(
    connection: &mut PgConnection,
    held: &[OrgId],
    org: OrgId,
    needs: &BulkNeeds,
) -> Result<(FoundBulk, Vec<Job>), StoreError> {
    let (mut found, mut jobs, mut next) = (FoundBulk::default(), Vec::new(), None);
    if !needs.ids.is_empty() || needs.step.is_some() {
        let query =
            sqlx::query_with(AssertSqlSafe(NEEDED.as_str()), arguments![org.0, &needs.ids, needs.step.is_some()]);
        for row in &query.fetch_all(&mut *connection).await.map_err(store_error)? {
            let mut columns = Columns::of(row);
            let is_next = columns.get::<bool>()?;
            let operation = bulk::read(&mut columns)?;
            if is_next {
                next = Some(operation.clone());
            }
            if !found.operations.contains(&operation) {
                found.operations.push(operation);
            }
        }
    }
    if needs.is_counting {
        const SQL: &str = "/* count_open_bulk */ SELECT count(*) FROM jobledger.bulk_operation b
            WHERE b.org_id = $1 AND b.finished_at IS NULL";
        let row = sqlx::query_with(SQL, arguments![org.0]).fetch_one(&mut *connection).await.map_err(store_error)?;
        found.open = Columns::of(&row).get::<i64>()?.unsigned_abs() as usize;
    }
    if let (Some(open), Some(limit)) = (next, needs.step) {
        let page = list_in(connection, org, &bulk::step_query(&open, limit)).await?;
        // The function has named this org alone.
        let sql = "/* name_orgs */ SELECT jobledger.name_orgs($1)";
        let orgs: Vec<_> = held.iter().map(|org| org.0).collect();
        sqlx::query_with(sql, arguments![orgs]).execute(connection).await.map_err(store_error)?;
        let (step, of_step) = bulk::step(&open, page);
        (found.step, jobs) = (Some(step), of_step);
    }
    Ok((found, jobs))
}

impl Statement {
    /// Writes bulk operations, and removes the oldest finished ones of orgs in which one has begun.
    pub(super) fn bulk_operations(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let rows: Vec<_> =
            writes.iter().flat_map(|(log, changes)| changes.bulk.iter().map(move |bulk| (log.org, bulk))).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let columns = [
            self.column("org_id", &rows, |(org, _)| org.0)?,
            self.column("id", &rows, |(_, bulk)| bulk.request.id)?,
            self.column("created_at", &rows, |(_, bulk)| bulk.created_at)?,
            self.column("updated_at", &rows, |(_, bulk)| bulk.updated_at)?,
            self.column("finished_at", &rows, |(_, bulk)| bulk.finished_at)?,
            self.column("status", &rows, |(_, bulk)| bulk.status.as_str())?,
            self.column("request", &rows, |(_, bulk)| request_text(bulk))?,
            self.column("through_seq", &rows, |(_, bulk)| bulk.through_seq)?,
            self.column("cursor", &rows, |(_, bulk)| bulk.cursor)?,
            self.column("matched", &rows, |(_, bulk)| bulk.matched)?,
            self.column("reached", &rows, |(_, bulk)| bulk.reached)?,
            self.column("changed", &rows, |(_, bulk)| bulk.changed)?,
            self.column("unchanged", &rows, |(_, bulk)| bulk.unchanged)?,
            self.column("failed", &rows, |(_, bulk)| failed_text(bulk))?,
        ];
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        let set: Vec<_> = names[3..].iter().map(|name| format!("{name} = excluded.{name}")).collect();
        let (names, set, values) = (names.join(", "), set.join(", "), unnest(&columns));
        self.part(
            "bulk_operations",
            format_args!(
                "(INSERT INTO jobledger.bulk_operation ({names}) SELECT * FROM {values}
                 ON CONFLICT (org_id, id) DO UPDATE SET {set})"
            ),
        );
        let begun: Vec<_> =
            rows.iter().filter(|(_, bulk)| bulk.created_at == bulk.updated_at).map(|(org, _)| org.0).collect();
        if !begun.is_empty() {
            let org = self.bind(begun)?;
            self.part(
                "dropped_bulk",
                format_args!(
                    "(DELETE FROM jobledger.bulk_operation b USING (
                        SELECT DISTINCT u.org_id, last.created_at, last.id FROM unnest({org}::uuid[]) AS u (org_id)
                        CROSS JOIN LATERAL (
                            SELECT l.created_at, l.id FROM jobledger.bulk_operation l WHERE l.org_id = u.org_id
                            ORDER BY l.created_at DESC, l.id DESC LIMIT 1 OFFSET {BULK_KEPT}) last) old
                     WHERE b.org_id = old.org_id AND b.finished_at IS NOT NULL AND (b.created_at, b.id) <= (old.created_at, old.id))"
                ),
            );
        }
        Ok(())
    }
}
