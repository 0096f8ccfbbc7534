//! What the old database has: its tables, their indexes, and how many rows there are.

use std::collections::HashMap;

use sqlx::AssertSqlSafe;
use uuid::Uuid;

use super::{Source, Table, Way};
use crate::legacy::import::ImportError;

/// A table without these columns is not the old one.
const NEEDED: [(&str, &[&str]); 3] = [
    ("jobs", &["id", "status", "stage", "progress", "result", "error", "created_at", "updated_at"]),
    ("job", &["id", "org_id", "type", "status", "idempotency_key", "created_at", "updated_at"]),
    ("job_event", &["job_id", "ts", "prev_status", "next_status", "detail_json"]),
];

impl Source {
    pub(super) async fn recognise(&mut self, schema: &str) -> Result<(), ImportError> {
        let refuse = |reason: String| Err(ImportError::Source(reason));
        // The catalog lists tables that the role may not read. They are then an error, and not taken for missing.
        let found: Vec<(String, String, String, bool)> = sqlx::query_as(
            "/* recognise */ SELECT c.relname::text, a.attname::text, t.typname::text, a.attnotnull
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
             JOIN pg_type t ON t.oid = a.atttypid
             WHERE n.nspname = $1 AND c.relname IN ('jobs', 'job', 'job_event') AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
        )
        .bind(schema)
        .fetch_all(&mut self.connection)
        .await?;
        let mut tables = Tables::new();
        for (table, column, kind, is_not_null) in &found {
            tables.entry(table).or_default().insert(column, (kind, *is_not_null));
        }
        if tables.get("job").is_some_and(|columns| columns.contains_key("created_seq")) {
            return refuse(format!("schema {schema} is jobledger's own; set --schema to the schema of the old tables"));
        }
        check_columns(schema, &tables).or_else(refuse)?;
        self.tables = [Table::Jobs, Table::Job].into_iter().filter(|table| tables.contains_key(table.name())).collect();
        if self.tables.is_empty() {
            return refuse(format!(
                "schema {schema} has neither a table jobs nor a table job: set --schema to the schema of the old tables"
            ));
        }
        self.has_events = tables.contains_key("job_event");
        if self.tables.contains(&Table::Job) && !self.has_events {
            return refuse(format!("schema {schema} has job without job_event, which has results and histories"));
        }
        self.has_both = self.tables.len() > 1;
        for table in self.tables.clone() {
            let columns = &tables[table.name()];
            let is_whole = |wanted: &[&str]| wanted.iter().all(|column| columns[column].1);
            // Older jobs come first where an index has that order.
            let indexes = self.indexes(table).await?;
            let has = |wanted: &[&str]| {
                let begins = |columns: &Vec<String>| wanted.iter().eq(columns.iter().take(wanted.len()));
                indexes.iter().any(begins)
            };
            let way = if has(&["created_at"]) {
                Way::ByTime
            } else if table == Table::Job && has(&["org_id", "status", "created_at"]) && is_whole(&["org_id", "status"])
            {
                Way::ByStatus
            } else {
                Way::ById
            };
            if way != Way::ById && !is_whole(&["created_at"]) {
                self.ways.push((table, Way::Timeless));
            }
            self.ways.push((table, way));
        }
        self.ways.reverse();
        Ok(())
    }

    /// The columns of each B-tree index that covers the whole table.
    async fn indexes(&mut self, table: Table) -> Result<Vec<Vec<String>>, ImportError> {
        let found: Vec<(Vec<String>,)> = sqlx::query_as(
            "/* indexes */ SELECT (SELECT array_agg(coalesce(a.attname::text, '') ORDER BY k.n)
                FROM unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
                LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.n <= i.indnkeyatts)
             FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
             WHERE i.indrelid = $1::regclass AND i.indpred IS NULL AND i.indisvalid AND m.amname = 'btree'",
        )
        .bind(format!("{}.{}", self.schema, table.name()))
        .fetch_all(&mut self.connection)
        .await?;
        Ok(found.into_iter().map(|(columns,)| columns).collect())
    }

    /// Counts the rows of each status, by the old words.
    pub(in crate::legacy::import) async fn count(&mut self) -> Result<Vec<(Option<String>, u64)>, ImportError> {
        let mut parts = Vec::new();
        for table in &self.tables {
            let (schema, name) = (&self.schema, table.name());
            let mut part = if self.has_both && *table == Table::Job {
                format!(
                    "SELECT CASE WHEN t.updated_at > o.updated_at THEN t.status ELSE o.status END::text AS status
                     FROM {schema}.job o LEFT JOIN {schema}.jobs t ON t.id = o.id"
                )
            } else {
                format!("SELECT o.status::text AS status FROM {schema}.{name} o")
            };
            self.leave_superseded_out(*table, &mut part, "WHERE");
            parts.push(part);
        }
        let sql = format!(
            "/* count */ SELECT status, count(*) FROM ({}) all_rows GROUP BY status",
            parts.join(" UNION ALL ")
        );
        self.begin().await?;
        let found: Vec<(Option<String>, i64)> =
            sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut self.connection).await?;
        self.end().await?;
        Ok(found.into_iter().map(|(status, n)| (status, n.unsigned_abs())).collect())
    }

    /// Rows with an idempotency key that an earlier row has: for each of them the id of the first row.
    pub(in crate::legacy::import) async fn duplicate_keys(&mut self) -> Result<HashMap<Uuid, Uuid>, ImportError> {
        if !self.tables.contains(&Table::Job) {
            return Ok(HashMap::new());
        }
        let is_unique: (bool,) = sqlx::query_as(
            "/* duplicate_keys */ SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = $1::regclass AND i.indisunique
                AND i.indisvalid
                AND coalesce(pg_get_expr(i.indpred, i.indrelid), '') IN ('', '(idempotency_key IS NOT NULL)')
                AND (SELECT array_agg(a.attname::text ORDER BY k.n)
                    FROM unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
                    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) = ARRAY['org_id', 'idempotency_key'])",
        )
        .bind(format!("{}.job", self.schema))
        .fetch_one(&mut self.connection)
        .await?;
        if is_unique.0 {
            return Ok(HashMap::new());
        }
        self.begin().await?;
        let has_key: Vec<(Vec<Uuid>,)> = sqlx::query_as(AssertSqlSafe(format!(
            "/* duplicate_keys */ SELECT array_agg(o.id ORDER BY o.created_at, o.id) FROM {}.job o
             WHERE o.idempotency_key <> '' GROUP BY o.org_id, o.idempotency_key HAVING count(*) > 1",
            self.schema
        )))
        .fetch_all(&mut self.connection)
        .await?;
        self.end().await?;
        let mut others = HashMap::new();
        for (ids,) in has_key {
            others.extend(ids.iter().skip(1).map(|id| (*id, ids[0])));
        }
        Ok(others)
    }
}

/// The columns of each table that was found: their types, and whether they are never null.
type Tables<'a> = HashMap<&'a str, HashMap<&'a str, (&'a str, bool)>>;

/// Refuses tables that lack a column of the old ones, or have it with another type. The error is the reason.
fn check_columns(schema: &str, tables: &Tables<'_>) -> Result<(), String> {
    for (name, columns) in tables {
        let needed = NEEDED.iter().find(|(table, _)| table == name).map_or(&[][..], |(_, columns)| columns);
        let missing: Vec<_> = needed.iter().filter(|column| !columns.contains_key(**column)).copied().collect();
        if !missing.is_empty() {
            return Err(format!("{schema}.{name} is not the old table: it has no {}", missing.join(", ")));
        }
        for (column, (kind, _)) in columns {
            let wanted = match *column {
                "id" | "job_id" | "org_id" => "uuid",
                "ts" | "created_at" | "updated_at" | "started_at" | "finished_at" => "timestamptz",
                _ => continue,
            };
            if *kind != wanted {
                return Err(format!("{schema}.{name}.{column} is a {kind}, not a {wanted}"));
            }
        }
    }
    Ok(())
}
