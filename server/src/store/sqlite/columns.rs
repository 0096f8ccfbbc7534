//! SQLite's columns: ids are blobs, times microseconds since 1970.

use chrono::DateTime;
use sqlx::{Decode, Row, Sqlite, Type, ValueRef, sqlite::SqliteRow};
use uuid::Uuid;

use super::error::store_error;
use crate::{
    domain::{clock::Time, json::Json},
    store::{
        StoreError, detail,
        job_columns::JOB_COLUMNS,
        rows::{self, damaged},
    },
};

/// [`JOB_COLUMNS`] of a row, for a SELECT.
pub(super) fn job_columns(row: &str) -> String {
    let columns: Vec<_> = JOB_COLUMNS.iter().map(|column| format!("{row}.{}", column.name)).collect();
    columns.join(", ")
}

/// True of a job that may be claimed ([`Job::is_ready`](crate::domain::job::Job::is_ready)): in a statement on one table of jobs, whose
/// indexes over such jobs have the same condition.
pub(super) const IS_READY: &str = "(status = 'queued' AND due_at IS NULL)";

/// A row, read from left to right.
pub(super) struct Columns<'r> {
    row: &'r SqliteRow,
    next: usize,
}

impl<'r> Columns<'r> {
    pub(super) fn of(row: &'r SqliteRow) -> Self {
        Self { row, next: 0 }
    }

    fn get<T: Decode<'r, Sqlite> + Type<Sqlite>>(&mut self) -> Result<T, StoreError> {
        let index = self.next;
        self.next += 1;
        self.row.try_get(index).map_err(store_error)
    }

    /// True if the next column is null, as all of an outer join's are where it found nothing.
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

    /// In the detail of its event, which is text and keeps it as it was written.
    fn result(&mut self) -> Result<Option<Json>, StoreError> {
        self.optional_text()?.map(detail::result).transpose().map(Option::flatten)
    }

    fn result_beside_detail(&mut self) -> Result<Option<Json>, StoreError> {
        Ok(None)
    }

    fn optional_time(&mut self) -> Result<Option<Time>, StoreError> {
        let micros: Option<i64> = self.get()?;
        micros.map(|micros| DateTime::from_timestamp_micros(micros).ok_or_else(|| damaged("time"))).transpose()
    }
}

pub(super) fn micros(time: Time) -> i64 {
    time.timestamp_micros()
}
