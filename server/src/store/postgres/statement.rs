//! A statement of many parts: a WITH that has a part for each kind of row. Each part takes its rows from arrays, by `unnest`.
//!
//! Columns that belong together travel as single values if they are the same in all rows: most batches create jobs that differ
//! only in ids and positions. There are few such groups of columns, so few texts have to be prepared.

use std::fmt::Write as _;

use sqlx::{Arguments as _, Encode, Postgres, Type, postgres::PgArguments};

use super::connections::not_encoded;
use crate::{
    domain::id::OrgId,
    store::{RecordId, StoreError},
};

/// A statement under construction: parts of a WITH, and their arguments.
pub(super) struct Statement {
    text: String,
    has_parts: bool,
    /// The statement writes nothing unless the logs end where its guard expects.
    is_guarded: bool,
    arguments: PgArguments,
}

/// A column to write.
pub(super) struct Column {
    pub(super) name: &'static str,
    /// The placeholder of its values.
    place: String,
    /// The SQL type of a single value as it is sent.
    sent_as: String,
    /// One value for all rows, instead of an array.
    is_same: bool,
    /// The column whose values this one has too, if it sends none.
    of: Option<&'static str>,
}

impl Column {
    /// The expression for the value in a row.
    pub(super) fn value(&self) -> String {
        let (name, place) = (self.name, &self.place);
        if self.is_same {
            format!("{place}::{}{}", self.sent_as, cast(name))
        } else {
            format!("u.{}{}", self.of.unwrap_or(name), cast(name))
        }
    }

    /// A column with the same values as another.
    pub(super) fn same_as(name: &'static str, of: &'static str) -> Self {
        Self { name, place: String::new(), sent_as: String::new(), is_same: false, of: Some(of) }
    }
}

impl Statement {
    pub(super) fn new(name: &str) -> Self {
        let text = format!("/* {name} */ WITH ");
        Self { text, has_parts: false, is_guarded: false, arguments: PgArguments::default() }
    }

    /// A statement that is a transaction by itself. Its guard names the orgs, locks their heads, and fails unless these are the
    /// last records of their logs. Each part must be an INSERT that waits for [`Statement::guard`], since anything else may
    /// read a table before the guard ran. Returns the clock.
    pub(super) fn resuming(name: &str, last: &[(OrgId, RecordId)]) -> Result<Self, StoreError> {
        let mut statement = Self::new(name);
        let orgs = statement.bind(last.iter().map(|(org, _)| org.0).collect::<Vec<_>>())?;
        let n = statement.bind(last.iter().map(|(_, record)| record.n).collect::<Vec<_>>())?;
        let id = statement.bind(last.iter().map(|(_, record)| record.id).collect::<Vec<_>>())?;
        statement
            .part("guard", format_args!("MATERIALIZED (SELECT jobledger.resume_batch({orgs}, {n}, {id}) AS clock)"));
        statement.is_guarded = true;
        Ok(statement)
    }

    pub(super) fn has_parts(&self) -> bool {
        self.has_parts
    }

    pub(super) fn finish(mut self) -> (String, PgArguments) {
        self.text.push_str(if self.is_guarded { " SELECT clock FROM guard" } else { " SELECT" });
        (self.text, self.arguments)
    }

    /// The guard, to be joined to the rows of a part after `before`. Empty without a guard.
    pub(super) fn guard(&self, before: &str) -> String {
        if self.is_guarded { format!("{before} guard") } else { String::new() }
    }

    pub(super) fn part(&mut self, name: &str, sql: std::fmt::Arguments<'_>) {
        let separator = if self.has_parts { ",\n" } else { "" };
        write!(self.text, "{separator}{name} AS {sql}").expect("writing to a string");
        self.has_parts = true;
    }

    /// Binds a value and returns its placeholder.
    pub(super) fn bind<'q, T: Encode<'q, Postgres> + Type<Postgres>>(
        &mut self,
        value: T,
    ) -> Result<String, StoreError> {
        self.arguments.add(value).map_err(not_encoded)?;
        Ok(format!("${}", self.arguments.len()))
    }

    /// Binds a column as an array.
    pub(super) fn column<'q, R, T>(
        &mut self,
        name: &'static str,
        rows: &'q [R],
        value: impl FnMut(&'q R) -> T,
    ) -> Result<Column, StoreError>
    where
        T: Type<Postgres>,
        Vec<T>: Encode<'q, Postgres> + Type<Postgres>,
    {
        let place = self.bind(rows.iter().map(value).collect::<Vec<_>>())?;
        Ok(Column { name, place, sent_as: T::type_info().to_string(), is_same: false, of: None })
    }

    /// Binds a column of rows that are not empty: as a single value if `is_same`, otherwise as an array.
    pub(super) fn either<'q, R, T>(
        &mut self,
        is_same: bool,
        name: &'static str,
        rows: &'q [R],
        mut value: impl FnMut(&'q R) -> T,
    ) -> Result<Column, StoreError>
    where
        T: Encode<'q, Postgres> + Type<Postgres>,
        Vec<T>: Encode<'q, Postgres> + Type<Postgres>,
    {
        if !is_same {
            return self.column(name, rows, value);
        }
        let place = self.bind(value(&rows[0]))?;
        Ok(Column { name, place, sent_as: T::type_info().to_string(), is_same, of: None })
    }

    /// Adds a part that inserts rows.
    pub(super) fn insert(&mut self, part: &str, table: &str, columns: &[Column]) {
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        let values: Vec<_> = columns.iter().map(Column::value).collect();
        let (names, values, rows) = (names.join(", "), values.join(", "), unnest(columns));
        let guard = self.guard(" CROSS JOIN");
        self.part(part, format_args!("(INSERT INTO jobledger.{table} ({names}) SELECT {values} FROM {rows}{guard})"));
    }
}

/// The columns that travel as arrays, as a table `u`.
pub(super) fn unnest<'a>(columns: impl IntoIterator<Item = &'a Column>) -> String {
    let (mut places, mut names) = (Vec::new(), Vec::new());
    for column in columns.into_iter().filter(|column| !column.is_same && column.of.is_none()) {
        places.push(format!("{}::{}[]", column.place, column.sent_as));
        names.push(column.name);
    }
    format!("unnest({}) AS u ({})", places.join(", "), names.join(", "))
}

/// The cast to the type of the column, if it is sent as another type.
fn cast(column: &str) -> &'static str {
    match column {
        "labels" | "detail_json" | "counts" => "::jsonb",
        "quiet" => "::uuid[]",
        _ => "",
    }
}

/// True if the value is the same in all rows.
pub(super) fn all_same<'q, R, T: PartialEq>(rows: &'q [R], value: impl Fn(&'q R) -> T) -> bool {
    rows.windows(2).all(|pair| value(&pair[0]) == value(&pair[1]))
}
