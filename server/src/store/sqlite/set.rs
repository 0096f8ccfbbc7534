//! Many rows by one statement, or a few: what all of them have in common is bound once, what differs goes as further parameters, in
//! statements of a few sizes, so that each text is prepared once.
//!
//! No statement calls a function: see [`INSERT`].

use sqlx::{AssertSqlSafe, SqliteConnection, query::Query, sqlite::SqliteArguments};

use super::{columns::micros, error::store_error};
use crate::store::{StoreError, value::Value};

pub(super) type Statement<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Rows that one statement writes at most, and the smaller numbers that make up the rest. What is more than half of one of them is
/// filled up with rows of nothing: each statement takes its way to SQLite's thread and back.
const CHUNKS: [usize; 5] = [256, 64, 16, 4, 1];

/// How rows are added: one that is refused ends the transaction, which nobody would go on with. To be able to undo a statement alone,
/// SQLite would keep a copy of each page that it changes; and so it does where a function is called, which may fail.
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

/// Where a column's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a parameter of the statement.
    Shared,
    /// With each row, in a column of its own.
    Each(usize),
}

/// Rows of one table.
pub(super) struct Set<'a> {
    columns: Vec<&'static str>,
    rows: Vec<Vec<Value<'a>>>,
    key: usize,
    places: Vec<Place>,
    /// The columns whose values are shared, and those that differ.
    shared: Vec<usize>,
    each: Vec<usize>,
    /// One of the latter that no row lacks: what tells rows from those of nothing.
    filled: Option<usize>,
}

impl<'a> Set<'a> {
    /// Rows with a value for each of the columns.
    pub(super) fn new(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>) -> Self {
        Self::keyed(columns, rows, 0)
    }

    /// Rows whose first column is never null, with whatever they have in common bound for each: where that differs from batch to batch,
    /// texts would be many.
    pub(super) fn plain(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>) -> Self {
        let each: Vec<_> = (0..columns.len()).collect();
        let places = each.iter().map(|n| Place::Each(*n)).collect();
        let filled = Some(0);
        Self { columns: columns.to_vec(), rows, key: 0, places, shared: Vec::new(), each, filled }
    }

    /// The same of which so many of the first columns are those of a key.
    pub(super) fn keyed(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>, key: usize) -> Self {
        let (mut shared, mut each) = (Vec::new(), Vec::<usize>::new());
        let place = |column| {
            // A part of the key that is known beforehand would have SQLite walk all that have it, and look for the rows.
            if column >= key && rows.windows(2).all(|pair| pair[0][column] == pair[1][column]) {
                shared.push(column);
                return Place::Shared;
            }
            // A job's first event is its last: two columns of the same numbers.
            let is_same = |other: &usize| rows.iter().all(|row| row[column] == row[*other]);
            let known = each.iter().position(is_same);
            Place::Each(known.unwrap_or_else(|| {
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

    /// Adds all rows to a table, with what follows in the INSERT.
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

    /// Writes all rows over those of a table that have the same key.
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

    /// What stands for a column's value in a statement.
    fn value(&self, column: usize) -> String {
        match self.places[column] {
            Place::Shared => "?".to_owned(),
            Place::Each(n) => format!("v.column{}", n + 1),
        }
    }

    /// Runs a statement on all rows, which is told those that it takes.
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

    /// `VALUES` of so many rows of what differs. Parameters have no numbers, which SQLite would take for names, and sqlx look for the name of
    /// each: those that are shared stand before these, once each, in the order of their columns.
    fn marks(&self, rows: usize) -> String {
        // Rows that are the same in everything have no column of their own.
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
