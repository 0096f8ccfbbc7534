//! Many rows by one statement, or a few: what all of them have in common is bound once.
//!
//! Most batches create jobs that differ in their orgs, ids and places alone. Those travel as one JSON object, of ids and numbers; what
//! differs in more goes as parameters, in statements of a few sizes, so that each text is prepared once.

use std::{borrow::Cow, fmt::Write as _};

use sqlx::{AssertSqlSafe, SqliteConnection, query::Query, sqlite::SqliteArguments};

use super::error::store_error;
use crate::store::StoreError;

pub(super) type Statement<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Rows that one statement writes at most, where they travel as parameters, and the smaller numbers that make up the rest.
const CHUNKS: [usize; 3] = [64, 8, 1];

/// What a row has in a column.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Int(i64),
    Real(f64),
    Text(Cow<'a, str>),
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    fn bind<'q>(&self, query: Statement<'q>) -> Statement<'q> {
        match self {
            Self::Null => query.bind(None::<i64>),
            Self::Int(value) => query.bind(*value),
            Self::Real(value) => query.bind(*value),
            Self::Text(value) => query.bind(value.to_string()),
            Self::Bytes(value) => query.bind(value.to_vec()),
        }
    }

    /// Null where there is nothing.
    pub(super) fn or_null<T: Into<Self>>(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl From<i64> for Value<'_> {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<i32> for Value<'_> {
    fn from(value: i32) -> Self {
        Self::Int(value.into())
    }
}

impl From<u32> for Value<'_> {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}

impl From<bool> for Value<'_> {
    fn from(value: bool) -> Self {
        Self::Int(value.into())
    }
}

impl From<f64> for Value<'_> {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(value: &'a str) -> Self {
        Self::Text(Cow::Borrowed(value))
    }
}

impl From<String> for Value<'_> {
    fn from(value: String) -> Self {
        Self::Text(Cow::Owned(value))
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    fn from(value: &'a [u8]) -> Self {
        Self::Bytes(value)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Value<'a> {
    fn from(value: &'a [u8; N]) -> Self {
        Self::Bytes(value)
    }
}

/// Where a column's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a parameter of the statement.
    Shared(usize),
    /// With each row, in a column of its own.
    Each(usize),
}

/// Rows of one table.
pub(super) struct Set<'a> {
    columns: Vec<&'static str>,
    rows: Vec<Vec<Value<'a>>>,
    places: Vec<Place>,
    /// The columns whose values are shared, and those that differ.
    shared: Vec<usize>,
    each: Vec<usize>,
}

impl<'a> Set<'a> {
    /// Rows with a value for each of the columns.
    pub(super) fn new(columns: &[&'static str], rows: Vec<Vec<Value<'a>>>) -> Self {
        let (mut shared, mut each) = (Vec::new(), Vec::<usize>::new());
        let place = |column| {
            if rows.windows(2).all(|pair| pair[0][column] == pair[1][column]) {
                shared.push(column);
                return Place::Shared(shared.len());
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
        Self { columns: columns.to_vec(), rows, places, shared, each }
    }

    /// Adds all rows to a table.
    pub(super) async fn insert(&self, connection: &mut SqliteConnection, table: &str) -> Result<(), StoreError> {
        self.run(connection, &format!("/* insert */ INSERT INTO {table}"), &[], "").await
    }

    /// Writes all rows by an INSERT with further columns, all alike, and what follows it.
    pub(super) async fn run(
        &self,
        connection: &mut SqliteConnection,
        into: &str,
        fillers: &[(&str, &str)],
        tail: &str,
    ) -> Result<(), StoreError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.columns.iter().copied().chain(fillers.iter().map(|filler| filler.0)).collect();
        let head = format!("{into} ({})", names.join(", "));
        let select = |value: &dyn Fn(&Place) -> String| {
            let values = self.places.iter().map(value).chain(fillers.iter().map(|filler| filler.1.to_owned()));
            values.collect::<Vec<_>>().join(", ")
        };
        if let Some((ids, number)) = self.ids_and_number() {
            let values = select(&|place| match place {
                Place::Shared(n) => format!("?{n}"),
                Place::Each(n) => match ids.iter().position(|id| *id == self.each[*n]) {
                    Some(0) if ids.len() == 1 => "unhex(v.key)".to_owned(),
                    Some(nth) => format!("unhex(substr(v.key, {}, 32))", nth * 32 + 1),
                    None => "v.value".to_owned(),
                },
            });
            let sql = format!("{head} SELECT {values} FROM json_each(?{}) v WHERE true{tail}", self.shared.len() + 1);
            let query = self.bind_shared(sqlx::query(AssertSqlSafe(sql))).bind(self.object(&ids, number));
            query.execute(connection).await.map_err(store_error)?;
            return Ok(());
        }
        let values = select(&|place| match place {
            Place::Shared(n) => format!("?{n}"),
            Place::Each(n) => format!("v.column{}", n + 1),
        });
        let mut rows = &self.rows[..];
        for size in CHUNKS {
            if rows.len() < size {
                continue;
            }
            let sql = format!("{head} SELECT {values} FROM ({}) v WHERE true{tail}", self.marks(size));
            while rows.len() >= size {
                let (chunk, rest) = rows.split_at(size);
                let mut query = self.bind_shared(sqlx::query(AssertSqlSafe(sql.clone())));
                for row in chunk {
                    query = self.each.iter().fold(query, |query, column| row[*column].bind(query));
                }
                query.execute(&mut *connection).await.map_err(store_error)?;
                rows = rest;
            }
        }
        Ok(())
    }

    fn bind_shared<'q>(&self, query: Statement<'q>) -> Statement<'q> {
        self.shared.iter().fold(query, |query, column| self.rows[0][*column].bind(query))
    }

    /// The columns that differ, if they are one or two ids and at most a number: those can be an object.
    fn ids_and_number(&self) -> Option<(Vec<usize>, Option<usize>)> {
        let is_id =
            |column: &usize| self.rows.iter().all(|row| matches!(row[*column], Value::Bytes(id) if id.len() == 16));
        let is_number = |column: &usize| self.rows.iter().all(|row| matches!(row[*column], Value::Int(_)));
        let (ids, others): (Vec<_>, Vec<_>) = self.each.iter().copied().partition(is_id);
        match (ids.len(), &others[..]) {
            (1 | 2, []) => Some((ids, None)),
            (1 | 2, [number]) if is_number(number) => Some((ids, Some(*number))),
            _ => None,
        }
    }

    /// Ids and numbers as the text of a JSON object, in the order of the rows; ids may come more than once.
    fn object(&self, ids: &[usize], number: Option<usize>) -> String {
        let mut text = String::with_capacity(self.rows.len() * (ids.len() * 32 + 16) + 2);
        text.push('{');
        for (n, row) in self.rows.iter().enumerate() {
            text.push_str(if n == 0 { "\"" } else { ",\"" });
            for id in ids {
                let Value::Bytes(id) = &row[*id] else { continue };
                for byte in *id {
                    text.push(char::from(HEX[usize::from(byte >> 4)]));
                    text.push(char::from(HEX[usize::from(byte & 15)]));
                }
            }
            let number = if let Some(Value::Int(number)) = number.map(|number| &row[number]) { *number } else { 0 };
            write!(text, "\":{number}").expect("writing to a string");
        }
        text.push('}');
        text
    }

    /// `VALUES` of so many rows of what differs, its parameters numbered after those that are shared.
    fn marks(&self, rows: usize) -> String {
        let mut sql = "VALUES ".to_owned();
        let mut next = self.shared.len();
        for row in 0..rows {
            sql.push_str(if row == 0 { "(" } else { ", (" });
            for column in 0..self.each.len() {
                next += 1;
                write!(sql, "{}?{next}", if column == 0 { "" } else { ", " }).expect("writing to a string");
            }
            // Rows that are the same in everything have no column of their own.
            sql.push_str(if self.each.is_empty() { "0)" } else { ")" });
        }
        sql
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";
