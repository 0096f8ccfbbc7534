//! The old database: only read, in pages of one snapshot each.

use std::{collections::HashMap, fmt::Write as _, str::FromStr, time::Duration};

use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, FromRow, PgConnection,
    postgres::{PgConnectOptions, PgRow},
    types::chrono::{DateTime, Utc},
};
use tokio::time::timeout;
use uuid::Uuid;

use super::ImportError;
use crate::domain::clock::Time;

/// Rows of one page, with their events.
const PAGE_ROWS: i64 = 1_000;
/// What the rows of a page may have of events and of bytes, unless it is a single row.
const PAGE_EVENTS: i64 = 20_000;
const PAGE_BYTES: i64 = 8 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A table that jobs come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Table {
    /// The old table, of one tenant and without events.
    Jobs,
    /// The one of the first migration, with `job_event`.
    Job,
}

impl Table {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Job => "job",
        }
    }

    /// Columns without which it is something else.
    const fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Jobs => &["id", "status", "stage", "progress", "result", "error", "created_at", "updated_at"],
            Self::Job => &["id", "org_id", "type", "status", "created_at", "updated_at"],
        }
    }
}

/// A row of a table, as JSON, with its events.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) table: Table,
    pub(super) id: Uuid,
    pub(super) text: String,
    /// By their time.
    pub(super) events: Vec<String>,
}

/// Some rows, and the time of the snapshot that they are of.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) rows: Vec<Row>,
    pub(super) now: Time,
    /// Rows of `jobs` that `job` has too, which counts.
    pub(super) superseded: u64,
}

/// A way through a table: an order that an index gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Rows without a time of creation.
    Timeless,
    /// By the time of creation.
    ByTime,
    /// By the time of creation within an org, over an index that has the status before it.
    ByStatus,
    /// By id, where no index gives the time of creation.
    ById,
}

/// The last row that was read on a way; at first none.
#[derive(Debug, Clone)]
struct Key {
    org: Uuid,
    /// As PostgreSQL prints it: a time of its may be none of ours.
    created_at: String,
    id: Uuid,
    /// What an order of rows begins with: `>=` before the first.
    after: &'static str,
}

impl Key {
    fn first_of(org: Uuid) -> Self {
        Self { org, created_at: "-infinity".to_owned(), id: Uuid::nil(), after: ">=" }
    }
}

/// The old database.
pub(super) struct Source {
    connection: PgConnection,
    schema: String,
    has_events: bool,
    /// Ids of `job` are left out of `jobs`.
    has_both: bool,
    /// What is still to be read, the last first.
    ways: Vec<(Table, Way)>,
    key: Key,
    tables: Vec<Table>,
}

/// What is read of a row to choose a page: its id, its time of creation, and what it takes.
type Candidate = (Uuid, Option<String>, i64);

impl Source {
    /// Opens it, and looks which of the old tables it has.
    pub(super) async fn open(url: &str, schema: &str) -> Result<Self, ImportError> {
        let unusable = |error: sqlx::Error| ImportError::Source(format!("not a PostgreSQL URL: {error}"));
        let options = PgConnectOptions::from_str(url)
            .map_err(unusable)?
            .disable_statement_logging()
            .application_name("jobledger-import")
            .options([("default_transaction_read_only", "on"), ("TimeZone", "UTC"), ("DateStyle", "ISO")]);
        let host = options.get_host().to_owned();
        let fail = |reason: String| ImportError::Source(format!("can't connect to PostgreSQL at {host}: {reason}"));
        let connected = timeout(CONNECT_TIMEOUT, options.connect()).await;
        let connection = connected.map_err(|_| fail("no answer in time".to_owned()))?;
        let mut source = Self {
            connection: connection.map_err(|error| fail(error.to_string()))?,
            schema: quoted(schema),
            has_events: false,
            has_both: false,
            ways: Vec::new(),
            key: Key::first_of(Uuid::nil()),
            tables: Vec::new(),
        };
        source.recognise(schema).await?;
        Ok(source)
    }

    /// The tables that jobs come from.
    pub(super) fn tables(&self) -> &[Table] {
        &self.tables
    }

    async fn recognise(&mut self, schema: &str) -> Result<(), ImportError> {
        let found: Vec<(String, String, String)> = sqlx::query_as(
            "/* recognise */ SELECT table_name::text, column_name::text, udt_name::text FROM information_schema.columns
             WHERE table_schema = $1 AND table_name IN ('jobs', 'job', 'job_event')",
        )
        .bind(schema)
        .fetch_all(&mut self.connection)
        .await?;
        let mut columns: HashMap<&str, HashMap<&str, &str>> = HashMap::new();
        for (table, column, kind) in &found {
            columns.entry(table).or_default().insert(column, kind);
        }
        if columns.get("job").is_some_and(|columns| columns.contains_key("created_seq")) {
            return Err(ImportError::Source(format!(
                "schema {schema} is jobledger's own; --schema names that of the old tables"
            )));
        }
        for table in [Table::Jobs, Table::Job] {
            let Some(columns) = columns.get(table.name()) else { continue };
            let missing: Vec<_> = table.needs().iter().filter(|name| !columns.contains_key(**name)).copied().collect();
            if !missing.is_empty() {
                let (name, missing) = (table.name(), missing.join(", "));
                return Err(ImportError::Source(format!("{schema}.{name} is not the old table: it has no {missing}")));
            }
            for (column, kind) in [("id", "uuid"), ("created_at", "timestamptz"), ("updated_at", "timestamptz")] {
                if columns[column] != kind {
                    let (name, found) = (table.name(), columns[column]);
                    return Err(ImportError::Source(format!("{schema}.{name}.{column} is a {found}, not a {kind}")));
                }
            }
            self.tables.push(table);
        }
        if self.tables.is_empty() {
            return Err(ImportError::Source(format!(
                "schema {schema} has neither a table jobs nor a table job: --schema names that of the old tables"
            )));
        }
        self.has_events = columns.contains_key("job_event");
        self.has_both = self.tables.len() > 1;
        for table in self.tables.clone() {
            // A job that was created long ago comes first, as far as an index tells.
            let leading = self.indexes(table).await?;
            let has = |wanted: &[&str]| {
                let begins = |columns: &Vec<String>| wanted.iter().eq(columns.iter().take(wanted.len()));
                leading.iter().any(begins)
            };
            let way = if has(&["created_at"]) {
                Way::ByTime
            } else if table == Table::Job && has(&["org_id", "status", "created_at"]) {
                Way::ByStatus
            } else {
                Way::ById
            };
            if way != Way::ById {
                self.ways.push((table, Way::Timeless));
            }
            self.ways.push((table, way));
        }
        self.ways.reverse();
        Ok(())
    }

    /// The columns of each whole index of a table, in their order.
    async fn indexes(&mut self, table: Table) -> Result<Vec<Vec<String>>, ImportError> {
        let found: Vec<(Vec<String>,)> = sqlx::query_as(
            "/* indexes */ SELECT (SELECT array_agg(coalesce(a.attname::text, '') ORDER BY k.n)
                FROM unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
                LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum)
             FROM pg_index i WHERE i.indrelid = $1::regclass AND i.indpred IS NULL AND i.indisvalid",
        )
        .bind(format!("{}.{}", self.schema, table.name()))
        .fetch_all(&mut self.connection)
        .await?;
        Ok(found.into_iter().map(|(columns,)| columns).collect())
    }

    /// How many rows there are of each status, by their words.
    pub(super) async fn count(&mut self) -> Result<Vec<(Option<String>, u64)>, ImportError> {
        let mut parts = Vec::new();
        for table in &self.tables {
            let mut part = format!("SELECT o.status::text AS status FROM {}.{} o", self.schema, table.name());
            self.leave_superseded_out(*table, &mut part, "WHERE");
            parts.push(part);
        }
        let sql = format!(
            "/* count */ SELECT status, count(*) FROM ({}) all_rows GROUP BY status",
            parts.join(" UNION ALL ")
        );
        let found: Vec<(Option<String>, i64)> =
            sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut self.connection).await?;
        Ok(found.into_iter().map(|(status, n)| (status, n.unsigned_abs())).collect())
    }

    /// Keys that more than one row has: the id of the first such row by each of the others.
    pub(super) async fn duplicate_keys(&mut self) -> Result<HashMap<Uuid, Uuid>, ImportError> {
        if !self.tables.contains(&Table::Job) {
            return Ok(HashMap::new());
        }
        let is_unique: (bool,) = sqlx::query_as(
            "/* duplicate_keys */ SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = $1::regclass AND i.indisunique
                AND i.indisvalid AND (SELECT array_agg(a.attname::text ORDER BY k.n)
                    FROM unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
                    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum) = ARRAY['org_id', 'idempotency_key'])",
        )
        .bind(format!("{}.job", self.schema))
        .fetch_one(&mut self.connection)
        .await?;
        if is_unique.0 {
            return Ok(HashMap::new());
        }
        let has_key: Vec<(Vec<Uuid>,)> = sqlx::query_as(AssertSqlSafe(format!(
            "/* duplicate_keys */ SELECT array_agg(o.id ORDER BY o.created_at, o.id) FROM {}.job o
             WHERE o.idempotency_key <> '' GROUP BY o.org_id, o.idempotency_key HAVING count(*) > 1",
            self.schema
        )))
        .fetch_all(&mut self.connection)
        .await?;
        let mut others = HashMap::new();
        for (ids,) in has_key {
            others.extend(ids.iter().skip(1).map(|id| (*id, ids[0])));
        }
        Ok(others)
    }

    fn leave_superseded_out(&self, table: Table, sql: &mut String, before: &str) {
        if self.has_both && table == Table::Jobs {
            let schema = &self.schema;
            write!(sql, " {before} NOT EXISTS (SELECT FROM {schema}.job n WHERE n.id = o.id)")
                .expect("writing to a string");
        }
    }

    /// The next page, of one snapshot; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Page>, ImportError> {
        loop {
            let Some((table, way)) = self.ways.last().copied() else { return Ok(None) };
            sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").execute(&mut self.connection).await?;
            let page = self.read(table, way).await;
            let ended = sqlx::raw_sql("COMMIT").execute(&mut self.connection).await;
            let page = page?;
            ended?;
            match page {
                Some(page) => return Ok(Some(page)),
                None => {
                    self.ways.pop();
                    self.key = Key::first_of(Uuid::nil());
                }
            }
        }
    }

    async fn read(&mut self, table: Table, way: Way) -> Result<Option<Page>, ImportError> {
        let mut candidates = self.candidates(table, way).await?;
        while candidates.is_empty() {
            if way != Way::ByStatus || !self.next_org().await? {
                return Ok(None);
            }
            candidates = self.candidates(table, way).await?;
        }
        let ids: Vec<_> = candidates.iter().map(|(id, ..)| *id).collect();
        let of_events =
            if table == Table::Job && self.has_events { self.count_events(&ids).await? } else { HashMap::new() };
        let (mut events, mut bytes) = (0, 0);
        let fits = |(id, _, own_bytes): &&Candidate| {
            let (n, size) = of_events.get(id).copied().unwrap_or_default();
            events += n;
            bytes += size + own_bytes;
            events <= PAGE_EVENTS && bytes <= PAGE_BYTES
        };
        let n = candidates.iter().take_while(fits).count().max(1);
        let ids = &ids[..n];
        let mut page = self.fetch(table, ids).await?;
        if !of_events.is_empty() {
            self.fetch_events(ids, &mut page.rows).await?;
        }
        if let Some((id, created_at, _)) = candidates.get(n - 1) {
            self.key =
                Key { created_at: created_at.clone().unwrap_or_default(), id: *id, after: ">", org: self.key.org };
        }
        Ok(Some(page))
    }

    /// The next rows on a way, by their ids, with what they take.
    async fn candidates(&mut self, table: Table, way: Way) -> Result<Vec<Candidate>, ImportError> {
        let from = format!("{}.{}", self.schema, table.name());
        let bytes = match table {
            Table::Jobs => "coalesce(octet_length(o.result::text), 0) + coalesce(octet_length(o.error), 0)",
            Table::Job => "coalesce(octet_length(to_jsonb(o) ->> 'last_error_message'), 0)",
        };
        let columns = format!("o.id, o.created_at::text AS created_at, ({bytes})::bigint AS bytes");
        let after = self.key.after;
        let sql = match way {
            Way::Timeless => format!("{columns} FROM {from} o WHERE o.created_at IS NULL AND o.id {after} $1 ORDER BY o.id"),
            Way::ById => format!("{columns} FROM {from} o WHERE o.id {after} $1 ORDER BY o.id"),
            Way::ByTime => format!(
                "{columns} FROM {from} o WHERE (o.created_at, o.id) {after} ($3::timestamptz, $1) ORDER BY o.created_at, o.id"
            ),
            // The statuses that there are, from one place in the index to the next, and of each the first rows.
            Way::ByStatus => format!(
                "page.id, page.created_at::text AS created_at, page.bytes FROM (
                    WITH RECURSIVE found (status) AS (
                        (SELECT s.status FROM {from} s WHERE s.org_id = $4 ORDER BY s.status LIMIT 1)
                        UNION ALL SELECT (SELECT s.status FROM {from} s WHERE s.org_id = $4 AND s.status > found.status
                            ORDER BY s.status LIMIT 1) FROM found WHERE found.status IS NOT NULL
                    )
                    SELECT c.* FROM found CROSS JOIN LATERAL (
                        SELECT o.id, o.created_at, ({bytes})::bigint AS bytes FROM {from} o
                        WHERE o.org_id = $4 AND o.status = found.status AND (o.created_at, o.id) {after} ($3::timestamptz, $1)
                        ORDER BY o.created_at, o.id LIMIT $2
                    ) c
                ) page ORDER BY page.created_at, page.id"
            ),
        };
        let sql = format!("/* candidates */ SELECT {sql} LIMIT $2");
        let mut query = sqlx::query_as(AssertSqlSafe(sql)).bind(self.key.id).bind(PAGE_ROWS);
        if matches!(way, Way::ByTime | Way::ByStatus) {
            query = query.bind(&self.key.created_at);
        }
        if way == Way::ByStatus {
            query = query.bind(self.key.org);
        }
        Ok(query.fetch_all(&mut self.connection).await?)
    }

    /// Goes on to the next org; false after the last.
    async fn next_org(&mut self) -> Result<bool, ImportError> {
        let sql = format!(
            "/* next_org */ SELECT o.org_id FROM {}.job o WHERE o.org_id > $1 ORDER BY o.org_id LIMIT 1",
            self.schema
        );
        let next: Option<(Uuid,)> =
            sqlx::query_as(AssertSqlSafe(sql)).bind(self.key.org).fetch_optional(&mut self.connection).await?;
        let Some((org,)) = next else { return Ok(false) };
        self.key = Key::first_of(org);
        Ok(true)
    }

    async fn count_events(&mut self, ids: &[Uuid]) -> Result<HashMap<Uuid, (i64, i64)>, ImportError> {
        let sql = format!(
            "/* count_events */ SELECT e.job_id, count(*), coalesce(sum(octet_length(e.detail_json::text)), 0)::bigint
             FROM {}.job_event e WHERE e.job_id = ANY ($1) GROUP BY e.job_id",
            self.schema
        );
        let found: Vec<(Uuid, i64, i64)> =
            sqlx::query_as(AssertSqlSafe(sql)).bind(ids).fetch_all(&mut self.connection).await?;
        Ok(found.into_iter().map(|(job, n, bytes)| (job, (n, bytes))).collect())
    }

    /// Rows as JSON, in the order of their ids' places.
    async fn fetch(&mut self, table: Table, ids: &[Uuid]) -> Result<Page, ImportError> {
        let mut sql = format!(
            "/* fetch */ SELECT o.id, to_jsonb(o)::text FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, n)
             JOIN {}.{} o ON o.id = wanted.id",
            self.schema,
            table.name()
        );
        self.leave_superseded_out(table, &mut sql, "WHERE");
        sql.push_str(" ORDER BY wanted.n");
        let found: Vec<(Uuid, String)> =
            sqlx::query_as(AssertSqlSafe(sql)).bind(ids).fetch_all(&mut self.connection).await?;
        let (now,): (DateTime<Utc>,) =
            sqlx::query_as("/* fetch */ SELECT clock_timestamp()").fetch_one(&mut self.connection).await?;
        let superseded = (ids.len() - found.len().min(ids.len())) as u64;
        let rows = found.into_iter().map(|(id, text)| Row { table, id, text, events: Vec::new() }).collect();
        Ok(Page { rows, now, superseded })
    }

    async fn fetch_events(&mut self, ids: &[Uuid], rows: &mut [Row]) -> Result<(), ImportError> {
        let sql = format!(
            "/* fetch_events */ SELECT e.job_id, to_jsonb(e)::text FROM {}.job_event e
             WHERE e.job_id = ANY ($1) ORDER BY e.job_id, e.ts, to_jsonb(e) ->> 'id'",
            self.schema
        );
        let places: HashMap<_, _> = rows.iter().enumerate().map(|(n, row)| (row.id, n)).collect();
        let found: Vec<PgRow> = sqlx::query(AssertSqlSafe(sql)).bind(ids).fetch_all(&mut self.connection).await?;
        for row in &found {
            let (job, text) = <(Uuid, String)>::from_row(row)?;
            if let Some(place) = places.get(&job) {
                rows[*place].events.push(text);
            }
        }
        Ok(())
    }

    pub(super) async fn close(self) {
        // Said as a courtesy: the server sees the end of the socket anyway.
        let _ = self.connection.close().await;
    }
}

impl Row {
    /// The row as it is written down for those who mend it.
    pub(super) fn raw(&self) -> Option<&RawValue> {
        serde_json::from_str(&self.text).ok()
    }
}

/// A name as SQL has it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
