//! Lists of columns for SELECTs, and rows that are read from left to right.

use sqlx::{Decode, Postgres, Row, Type, ValueRef, postgres::PgRow, types::chrono::DateTime, types::chrono::Utc};
use uuid::Uuid;

use super::error::store_error;
use crate::{
    domain::{clock::Time, json::Json},
    store::{StoreError, job_columns::JOB_COLUMNS, rows},
};

/// The [`JOB_COLUMNS`] of a row, for a SELECT. JSON is selected as text.
pub(super) fn job_columns(row: &str) -> String {
    let column = |name| if name == "labels" { format!("{row}.labels::text") } else { format!("{row}.{name}") };
    let columns: Vec<_> = JOB_COLUMNS.iter().map(|job| column(job.name)).collect();
    columns.join(", ")
}

/// The columns of a `jobledger.found_job` that [`read_job_over`](crate::store::image::read_job_over) reads, for a SELECT.
pub(super) fn job_over(row: &str) -> String {
    let event =
        ["status", "attempt", "ts", "job_seq", "seq", "recorded_at"].map(|column| format!("{row}.event_{column}"));
    format!(
        "CASE WHEN {row}.event_seq > {row}.last_seq THEN {row}.event_image END, {}, {row}.extension, {}, {row}.stage, {row}.progress",
        event.join(", "),
        job_columns(row)
    )
}

/// A row, and the position of its next column.
pub(super) struct Columns<'r> {
    row: &'r PgRow,
    next: usize,
}

impl<'r> Columns<'r> {
    pub(super) fn of(row: &'r PgRow) -> Self {
        Self { row, next: 0 }
    }

    pub(super) fn get<T: Decode<'r, Postgres> + Type<Postgres>>(&mut self) -> Result<T, StoreError> {
        let index = self.next;
        self.next += 1;
        self.row.try_get(index).map_err(store_error)
    }

    /// True if the next column is null. If an outer join found nothing, all of its columns are.
    pub(super) fn peek_is_null(&self) -> Result<bool, StoreError> {
        Ok(self.row.try_get_raw(self.next).map_err(store_error)?.is_null())
    }
}

impl<'r> rows::Columns<'r> for Columns<'r> {
    fn uuid(&mut self) -> Result<Uuid, StoreError> {
        self.get()
    }

    fn flag(&mut self) -> Result<bool, StoreError> {
        self.get()
    }

    fn optional_flag(&mut self) -> Result<Option<bool>, StoreError> {
        self.get()
    }

    fn int(&mut self) -> Result<i32, StoreError> {
        self.get()
    }

    fn optional_int(&mut self) -> Result<Option<i32>, StoreError> {
        self.get()
    }

    fn long(&mut self) -> Result<i64, StoreError> {
        self.get()
    }

    fn optional_long(&mut self) -> Result<Option<i64>, StoreError> {
        self.get()
    }

    fn double(&mut self) -> Result<f64, StoreError> {
        self.get()
    }

    fn optional_text(&mut self) -> Result<Option<&'r str>, StoreError> {
        self.get()
    }

    fn optional_bytes(&mut self) -> Result<Option<&'r [u8]>, StoreError> {
        self.get()
    }

    /// The result as it was given, from a text column of its own: `jsonb` prints numbers at full length.
    fn result(&mut self) -> Result<Option<Json>, StoreError> {
        Ok(self.optional_text()?.map(Json::from_trusted))
    }

    fn result_beside_detail(&mut self) -> Result<Option<Json>, StoreError> {
        self.result()
    }

    fn optional_time(&mut self) -> Result<Option<Time>, StoreError> {
        self.get::<Option<DateTime<Utc>>>()
    }
}
