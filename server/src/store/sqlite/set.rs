//! Writes many rows with few statements. Values that all rows share are bound once, the others once a row. Statements
//! have a few fixed numbers of rows, so that each text is prepared once.
//!
//! No statement calls a function: see [`INSERT`].

use sqlx::{AssertSqlSafe, SqliteConnection, query::Query, sqlite::SqliteArguments};

use super::{columns::micros, error::store_error};
use crate::store::{StoreError, value::Value};

pub(super) type Statement<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Numbers of rows in one statement. Rows that fill at least half of a size are padded with rows of nulls: each
/// statement costs a round trip to SQLite's thread.
const CHUNKS: [usize; 5] = [256, 64, 16, 4, 1];

/// OR ROLLBACK ends the transaction when a row is refused; the batch would not continue anyway. To undo a single statement,
/// SQLite would keep a copy of each page that it changes. It does the same where a statement calls a function, which may fail.
pub(super) const INSERT: &str = "INSERT OR ROLLBACK INTO";

/// Binds a value: ids are blobs, times microseconds since 1970.
fn bind<'q>(query: Statement<'q>, value: &Value<'_>) -> Statement<'q> {
    match value {
        Value::Null => query.bind(None::<i64>),
        Value::Flag(value) => query.bind(*value),
        Value::Int(value) => query.bind(*value),
        Value::Long(value) => query.bind(*value),
        Value::Double(value) => query.bind(*value),
        Value::Text(value) => query.bind(value.to_string()),
        Value::Bytes(value) => query.bind(value.to_vec()),
        Value::Uuid(value) => query.bind(*value),
        Value::Time(value) => query.bind(micros(*value)),
    }
}

/// Where a column's value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ValueSource {
    /// One parameter of the statement, the same for all rows.
    Shared,
    /// A column of the VALUES, by its index.
    Each(usize),
}

/// Rows of one table.
pub(super) struct Set<'a> {
    columns: Vec<&'static str>,
    rows: Vec<Vec<Value<'a>>>,
    key: usize,
    places: Vec<ValueSource>,
    /// The columns whose values all rows share, and those that get a column in the VALUES.
    shared: Vec<usize>,
    each: Vec<usize>,
    /// Index in `each` of a column that is null in no row. It tells rows from padding; without it, statements are not padded.
    filled: Option<usize>,
}

impl<'a> Set<'a> {
    /// Rows with a value for each of the columns.
    pub(super) fn new(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>) -> Self {
        Self::keyed(columns, rows, 0)
    }

    /// Binds every value with its row, even if all rows share it: for columns that are shared in some batches only,
    /// which would make many texts. The first column must never be null.
    pub(super) fn plain(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>) -> Self {
        let each: Vec<_> = (0..columns.len()).collect();
        let places = each.iter().map(|n| ValueSource::Each(*n)).collect();
        let filled = Some(0);
        Self { columns: columns.to_vec(), rows, key: 0, places, shared: Vec::new(), each, filled }
    }

    /// As [`Set::new`], with the first `key` columns as the key of [`Set::update`].
    pub(super) fn keyed(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>, key: usize) -> Self {
        let (mut shared, mut each) = (Vec::new(), Vec::<usize>::new());
        let place = |column| {
            // With a key column as a parameter, SQLite would walk all rows that have its value.
            if column >= key && rows.windows(2).all(|pair| pair[0][column] == pair[1][column]) {
                shared.push(column);
                return ValueSource::Shared;
            }
            // Columns with equal values share one: a new job's first event is also its last.
            let is_same = |other: &usize| rows.iter().all(|row| row[column] == row[*other]);
            let known = each.iter().position(is_same);
            ValueSource::Each(known.unwrap_or_else(|| {
                each.push(column);
                each.len() - 1
            }))
        };
        let places = (0..columns.len()).map(place).collect();
        let filled = each.iter().position(|column| rows.iter().all(|row| row[*column] != Value::Null));
        Self { columns: columns.to_vec(), rows, key, places, shared, each, filled }
    }

    /// Adds all rows to a table.
    pub(super) async fn insert(&self, connection: &mut SqliteConnection, table: &str) -> Result<(), StoreError> {
        self.put(connection, "insert", table, "").await
    }

    /// Adds all rows to a table. `name` opens the statement, `tail` ends it.
    pub(super) async fn put(
        &self,
        connection: &mut SqliteConnection,
        name: &str,
        table: &str,
        tail: &str,
    ) -> Result<(), StoreError> {
        let values: Vec<_> = (0..self.columns.len()).map(|column| self.value(column)).collect();
        let (columns, values) = (self.columns.join(", "), values.join(", "));
        let is_row = self.filled.map_or_else(|| "true".to_owned(), |n| format!("v.column{} IS NOT NULL", n + 1));
        let sql = |rows: &str| {
            format!("/* {name} */ {INSERT} {table} ({columns}) SELECT {values} FROM ({rows}) v WHERE {is_row}{tail}")
        };
        self.run(connection, sql).await
    }

    /// Updates the table's rows by their keys.
    pub(super) async fn update(&self, connection: &mut SqliteConnection, table: &str) -> Result<(), StoreError> {
        self.run(connection, |rows| self.update_sql(table, rows)).await
    }

    fn update_sql(&self, table: &str, rows: &str) -> String {
        let is = |column| format!("{} = {}", self.columns[column], self.value(column));
        let set: Vec<_> = (self.key..self.columns.len()).map(is).collect();
        let of_row: Vec<_> = (0..self.key).map(|column| format!("{table}.{}", is(column))).collect();
        let (set, of_row) = (set.join(", "), of_row.join(" AND "));
        format!("/* update */ UPDATE OR ROLLBACK {table} SET {set} FROM ({rows}) v WHERE {of_row}")
    }

    /// The SQL expression for a column's value.
    fn value(&self, column: usize) -> String {
        match self.places[column] {
            ValueSource::Shared => "?".to_owned(),
            ValueSource::Each(n) => format!("v.column{}", n + 1),
        }
    }

    /// Runs a statement for all rows. `sql` builds its text from the VALUES of some of them.
    async fn run(&self, connection: &mut SqliteConnection, sql: impl Fn(&str) -> String) -> Result<(), StoreError> {
        let mut rows = &self.rows[..];
        for size in CHUNKS {
            let least = if self.filled.is_some() { size.div_ceil(2) } else { size };
            if rows.len() < least {
                continue;
            }
            let sql = sql(&self.marks(size));
            while !rows.is_empty() && rows.len() >= least {
                let (chunk, rest) = rows.split_at(size.min(rows.len()));
                let mut query = self.bind_shared(sqlx::query(AssertSqlSafe(sql.clone())));
                for row in chunk {
                    query = self.each.iter().fold(query, |query, column| bind(query, &row[*column]));
                }
                for _ in 0..(size - chunk.len()) * self.each.len() {
                    query = bind(query, &Value::Null);
                }
                query.execute(&mut *connection).await.map_err(store_error)?;
                rows = rest;
            }
        }
        Ok(())
    }

    fn bind_shared<'q>(&self, query: Statement<'q>) -> Statement<'q> {
        self.shared.iter().fold(query, |query, column| bind(query, &self.rows[0][*column]))
    }

    /// The VALUES of this many rows. Parameters are not numbered: SQLite takes numbers for names, and sqlx would look
    /// each name up. So the shared parameters must stand before these, once each, in the order of their columns.
    fn marks(&self, rows: usize) -> String {
        // VALUES needs a column, even if the rows are the same in all columns.
        let row = if self.each.is_empty() {
            "(0)".to_owned()
        } else {
            format!("({})", vec!["?"; self.each.len()].join(", "))
        };
        format!("VALUES {}", vec![row; rows].join(", "))
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{ConnectOptions as _, Row as _, sqlite::SqliteConnectOptions};

    use super::*;
    use crate::store::sqlite::migrations;

    #[tokio::test]
    async fn rows_are_written_over_by_their_keys() {
        let mut connection = SqliteConnectOptions::new().in_memory(true).connect().await.unwrap();
        migrations::prepare(&mut connection, true).await.unwrap();
        let row = |id: &'static [u8; 1]| vec![Value::Bytes(b"o"), Value::Bytes(id), Value::Long(1)];
        for rows in [vec![row(b"1")], vec![row(b"1"), row(b"2")]] {
            let set = Set::keyed(&["org_id", "id", "attempt"], rows, 2);
            let sql = set.update_sql("job", &set.marks(set.rows.len()));
            let steps =
                sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}"))).fetch_all(&mut connection).await;
            let steps: Vec<String> = steps.unwrap().iter().map(|step| step.get("detail")).collect();
            let by_key = "SEARCH job USING PRIMARY KEY (org_id=? AND id=?)";
            assert!(steps.iter().any(|step| step == by_key), "{sql}\n{steps:#?}");
        }
    }
}
