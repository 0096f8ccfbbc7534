//! The old database. It is only read, in pages of one snapshot each.

mod survey;

use std::{collections::HashMap, fmt::Write as _, str::FromStr, time::Duration};

use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection,
    postgres::PgConnectOptions,
    types::chrono::{DateTime, Utc},
};
use tokio::time::timeout;
use uuid::Uuid;

use super::{ImportError, in_words};
use crate::domain::clock::Time;

/// Rows of one page.
const PAGE_ROWS: i64 = 1_000;
/// Events and bytes of the rows of one page, unless it is a single row.
const PAGE_EVENTS: i64 = 20_000;
const PAGE_BYTES: i64 = 8 << 20;
/// Events and bytes of one row. More would take longer than a batch may, or more memory than a lane has.
const ROW_EVENTS: i64 = 50_000;
const ROW_BYTES: i64 = 16 << 20;
/// The session only reads. With row_security off, a row that a policy hides is an error and not silently missing.
const SESSION: [(&str, &str); 2] = [("default_transaction_read_only", "on"), ("row_security", "off")];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// An old table that has jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Table {
    /// The old table of one tenant, without events.
    Jobs,
    /// The table of the first migration, with `job_event`.
    Job,
}

impl Table {
    /// The table's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Job => "job",
        }
    }
}

/// A row as JSON, with its events.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) table: Table,
    pub(super) id: Uuid,
    pub(super) text: String,
    /// Ordered by time. If there are too many, the last of them.
    pub(super) events: Vec<String>,
    /// How many events were left out.
    pub(super) left_out: i64,
    /// Why the row can't be read, if so. `text` then has only the columns that could be.
    pub(super) unreadable: Option<String>,
}

/// Some rows, and the time at which they were read.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) rows: Vec<Row>,
    pub(super) now: Time,
    /// Rows of `jobs` whose ids `job` has too: each pair is imported as one job.
    pub(super) superseded: u64,
}

/// An order in which a table is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// By id, only rows without a `created_at`.
    Timeless,
    ByTime,
    /// By org, then `created_at`, over an index that has the status between the two.
    ByStatus,
    /// By id, since no index has `created_at`.
    ById,
}

/// The last row that was read; at first none.
#[derive(Debug, Clone)]
struct Key {
    org: Uuid,
    /// As PostgreSQL prints it: it has times that Rust's type does not.
    created_at: String,
    id: Uuid,
    /// How the next rows compare to this key: `>=` before the first row, `>` afterwards.
    after: &'static str,
    /// No row came after it.
    is_last: bool,
}

impl Key {
    fn first_of(org: Uuid) -> Self {
        Self { org, created_at: "-infinity".to_owned(), id: Uuid::nil(), after: ">=", is_last: false }
    }
}

pub(super) struct Source {
    connection: PgConnection,
    schema: String,
    has_events: bool,
    /// Both tables exist: rows of `jobs` whose ids are in `job` are skipped.
    has_both: bool,
    /// The tables and orders that are still to be read, the next one last.
    ways: Vec<(Table, Way)>,
    key: Key,
    /// Rows of the next page. Fewer, down to one, after a row could not be read.
    page_rows: i64,
    tables: Vec<Table>,
}

/// Id, `created_at` and bytes of a row, by which a page is chosen.
type Candidate = (Uuid, Option<String>, i64);

impl Source {
    /// Connects, and finds which of the old tables there are.
    pub(super) async fn open(url: &str, schema: &str) -> Result<Self, ImportError> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            // Not repeated: the text may have a password.
            return Err(ImportError::Source("expected postgres://USER@HOST/NAME".to_owned()));
        }
        let unusable = |error: sqlx::Error| ImportError::Source(format!("not a PostgreSQL URL: {error}"));
        let options = PgConnectOptions::from_str(url)
            .map_err(unusable)?
            .disable_statement_logging()
            .application_name("jobledger-import")
            .options(SESSION);
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
            page_rows: PAGE_ROWS,
            tables: Vec::new(),
        };
        source.recognise(schema).await?;
        Ok(source)
    }

    pub(super) fn tables(&self) -> &[Table] {
        &self.tables
    }

    fn leave_superseded_out(&self, table: Table, sql: &mut String, before: &str) {
        if self.has_both && table == Table::Jobs {
            let schema = &self.schema;
            write!(sql, " {before} NOT EXISTS (SELECT FROM {schema}.job n WHERE n.id = o.id)")
                .expect("writing to a string");
        }
    }

    /// Reads the next page in one snapshot; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Page>, ImportError> {
        loop {
            let Some((table, way)) = self.ways.last().copied() else { return Ok(None) };
            self.begin().await?;
            let page = self.read(table, way).await;
            self.end().await?;
            match page {
                Ok(Some(page)) => {
                    self.page_rows = PAGE_ROWS.min(self.page_rows * 2);
                    return Ok(Some(page));
                }
                // Smaller pages separate a row that can't be read from the others.
                Err(error) if self.page_rows > 1 && is_of_rows(&error) => self.page_rows = (self.page_rows / 8).max(1),
                Err(error) if is_of_rows(&error) => return self.unreadable(table, way, error).await.map(Some),
                Err(error) => return Err(error.into()),
                Ok(None) => {
                    self.ways.pop();
                    self.key = Key::first_of(Uuid::nil());
                }
            }
        }
    }

    /// Begins a snapshot. The settings are sent each time, since a pooler may not keep those of the connection.
    async fn begin(&mut self) -> Result<(), ImportError> {
        sqlx::raw_sql(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL row_security = off; SET LOCAL TimeZone = 'UTC';
             SET LOCAL DateStyle = 'ISO'; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0;
             SET LOCAL idle_in_transaction_session_timeout = 0",
        )
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    async fn end(&mut self) -> Result<(), ImportError> {
        sqlx::raw_sql("COMMIT").execute(&mut self.connection).await?;
        Ok(())
    }

    async fn read(&mut self, table: Table, way: Way) -> sqlx::Result<Option<Page>> {
        let bytes = match table {
            Table::Jobs => "coalesce(octet_length(o.result::text), 0) + coalesce(octet_length(o.error), 0)",
            Table::Job => "coalesce(octet_length(to_jsonb(o) ->> 'last_error_message'), 0)",
        };
        let mut candidates = if self.key.is_last { Vec::new() } else { self.candidates(table, way, bytes).await? };
        while candidates.is_empty() {
            if way != Way::ByStatus || !self.next_org().await? {
                return Ok(None);
            }
            candidates = self.candidates(table, way, bytes).await?;
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
            for row in &mut page.rows {
                let (n, _) = of_events.get(&row.id).copied().unwrap_or_default();
                row.left_out = n - row.events.len() as i64;
            }
        }
        if let Some(last) = candidates.get(n - 1) {
            // Rows that are added now come with the next run. Otherwise the import might never end.
            let is_last = n == candidates.len() && (n as i64) < self.page_rows;
            self.go_on_after(last, is_last);
        }
        Ok(Some(page))
    }

    fn go_on_after(&mut self, (id, created_at, _): &Candidate, is_last: bool) {
        let created_at = created_at.clone().unwrap_or_default();
        self.key = Key { created_at, id: *id, after: ">", org: self.key.org, is_last };
    }

    /// A page of the next row alone, which caused `error`: its id and the columns that can be read.
    async fn unreadable(&mut self, table: Table, way: Way, error: sqlx::Error) -> Result<Page, ImportError> {
        let Some(row) = self.candidates(table, way, "0").await?.pop() else { return Err(error.into()) };
        let mut columns = Map::from_iter([("id".to_owned(), row.0.to_string().into())]);
        for name in ["status", "org_id"].into_iter().take(if table == Table::Job { 2 } else { 1 }) {
            let sql = format!(
                "/* unreadable */ SELECT o.{name}::text FROM {}.{} o WHERE o.id = $1",
                self.schema,
                table.name()
            );
            let read = sqlx::query_scalar(AssertSqlSafe(sql)).bind(row.0).fetch_one(&mut self.connection).await;
            columns.insert(name.to_owned(), read.unwrap_or(None::<String>).into());
        }
        let (now,): (DateTime<Utc>,) =
            sqlx::query_as("/* unreadable */ SELECT clock_timestamp()").fetch_one(&mut self.connection).await?;
        self.go_on_after(&row, false);
        let rows = vec![Row {
            table,
            id: row.0,
            text: Value::Object(columns).to_string(),
            events: Vec::new(),
            left_out: 0,
            unreadable: Some(in_words(&error)),
        }];
        Ok(Page { rows, now, superseded: 0 })
    }

    /// The ids and sizes of the next rows in an order.
    async fn candidates(&mut self, table: Table, way: Way, bytes: &str) -> sqlx::Result<Vec<Candidate>> {
        let from = format!("{}.{}", self.schema, table.name());
        let columns = format!("o.id, o.created_at::text AS created_at, ({bytes})::bigint AS bytes");
        let after = self.key.after;
        let sql = match way {
            Way::Timeless => format!("{columns} FROM {from} o WHERE o.created_at IS NULL AND o.id {after} $1 ORDER BY o.id"),
            Way::ById => format!("{columns} FROM {from} o WHERE o.id {after} $1 ORDER BY o.id"),
            Way::ByTime => format!(
                "{columns} FROM {from} o WHERE (o.created_at, o.id) {after} ($3::timestamptz, $1) ORDER BY o.created_at, o.id"
            ),
            // Finds the org's statuses by index skips, takes the first rows of each, and merges them.
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
        let mut query = sqlx::query_as(AssertSqlSafe(sql)).bind(self.key.id).bind(self.page_rows);
        if matches!(way, Way::ByTime | Way::ByStatus) {
            query = query.bind(&self.key.created_at);
        }
        if way == Way::ByStatus {
            query = query.bind(self.key.org);
        }
        query.fetch_all(&mut self.connection).await
    }

    /// Moves on to the next org; false after the last.
    async fn next_org(&mut self) -> sqlx::Result<bool> {
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

    async fn count_events(&mut self, ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, (i64, i64)>> {
        let sql = format!(
            "/* count_events */ SELECT e.job_id, count(*), coalesce(sum(octet_length(e.detail_json::text)), 0)::bigint
             FROM {}.job_event e WHERE e.job_id = ANY ($1) GROUP BY e.job_id",
            self.schema
        );
        let found: Vec<(Uuid, i64, i64)> =
            sqlx::query_as(AssertSqlSafe(sql)).bind(ids).fetch_all(&mut self.connection).await?;
        Ok(found.into_iter().map(|(job, n, bytes)| (job, (n, bytes))).collect())
    }

    /// Reads rows as JSON, in the order of `ids`.
    async fn fetch(&mut self, table: Table, ids: &[Uuid]) -> sqlx::Result<Page> {
        let schema = &self.schema;
        // If the row of `jobs` with the same id was changed later, its state wins. A row of `job` without events takes
        // from it what else only events have.
        let (row, twin) = if self.has_both && table == Table::Job {
            (
                format!(
                    "to_jsonb(o) || CASE WHEN t.updated_at > o.updated_at THEN jsonb_build_object('of_jobs', true,
                        'status', t.status, 'stage', t.stage, 'progress', t.progress, 'result', t.result, 'error', t.error,
                        'updated_at', t.updated_at, 'finished_at', NULL, 'last_error_code', NULL, 'last_error_message', NULL)
                     WHEN t.id IS NOT NULL AND NOT EXISTS (SELECT FROM {schema}.job_event e WHERE e.job_id = o.id)
                     THEN jsonb_build_object('of_jobs', true, 'stage', t.stage, 'progress', t.progress, 'result', t.result,
                        'error', coalesce(o.last_error_message, t.error)) ELSE '{{}}' END"
                ),
                format!("LEFT JOIN {schema}.jobs t ON t.id = o.id"),
            )
        } else {
            ("to_jsonb(o)".to_owned(), String::new())
        };
        let mut sql = format!(
            "/* fetch */ SELECT o.id, ({row})::text FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, n)
             JOIN {schema}.{} o ON o.id = wanted.id {twin}",
            table.name()
        );
        self.leave_superseded_out(table, &mut sql, "WHERE");
        sql.push_str(" ORDER BY wanted.n");
        let found: Vec<(Uuid, String)> =
            sqlx::query_as(AssertSqlSafe(sql)).bind(ids).fetch_all(&mut self.connection).await?;
        let (now,): (DateTime<Utc>,) =
            sqlx::query_as("/* fetch */ SELECT clock_timestamp()").fetch_one(&mut self.connection).await?;
        let superseded = (ids.len() - found.len().min(ids.len())) as u64;
        let rows = found
            .into_iter()
            .map(|(id, text)| Row { table, id, text, events: Vec::new(), left_out: 0, unreadable: None })
            .collect();
        Ok(Page { rows, now, superseded })
    }

    /// Reads events as JSON, of each row by time. Drops the oldest of a row that has too many.
    async fn fetch_events(&mut self, ids: &[Uuid], rows: &mut [Row]) -> sqlx::Result<()> {
        let sql = format!(
            "/* fetch_events */ SELECT e.job_id, e.text FROM (
                SELECT e.job_id, e.ts, to_jsonb(e) ->> 'id' AS id, to_jsonb(e)::text AS text, row_number() OVER last AS n,
                    sum(coalesce(octet_length(e.detail_json::text), 0)) OVER last AS bytes
                FROM {}.job_event e WHERE e.job_id = ANY ($1)
                WINDOW last AS (PARTITION BY e.job_id ORDER BY e.ts DESC, to_jsonb(e) ->> 'id' DESC)
             ) e WHERE e.n = 1 OR e.n <= {ROW_EVENTS} AND e.bytes <= {ROW_BYTES} ORDER BY e.job_id, e.ts, e.id",
            self.schema
        );
        let places: HashMap<_, _> = rows.iter().enumerate().map(|(n, row)| (row.id, n)).collect();
        let found: Vec<(Uuid, String)> =
            sqlx::query_as(AssertSqlSafe(sql)).bind(ids).fetch_all(&mut self.connection).await?;
        for (job, text) in found {
            if let Some(place) = places.get(&job) {
                rows[*place].events.push(text);
            }
        }
        Ok(())
    }

    pub(super) async fn close(self) {
        // A courtesy: the server sees the closed socket anyway.
        let _ = self.connection.close().await;
    }
}

impl Row {
    /// The row as JSON, for the report.
    pub(super) fn raw(&self) -> Option<&RawValue> {
        serde_json::from_str(&self.text).ok()
    }
}

/// True of errors that a row causes: invalid text, a value that is too long, or damaged data.
fn is_of_rows(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(said) => {
            said.code().is_some_and(|code| ["22", "54", "XX"].iter().any(|class| code.starts_with(class)))
        }
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => true,
        _ => false,
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
