//! SQLite's column types: ids are blobs, times are microseconds since 1970.

use std::sync::LazyLock;

use chrono::DateTime;
use sqlx::{Decode, Row, Sqlite, Type, ValueRef, sqlite::SqliteRow};
use uuid::Uuid;

use super::error::store_error;
use crate::{
    domain::{clock::Time, json::Json},
    store::{
        StoreError, detail,
        extension::{EXTENSION_AT, EXTENSION_CHARS, NEAR_BYTES, NEAR_RECORDS},
        job_columns::JOB_COLUMNS,
        rows::{self, damaged},
    },
};

/// [`JOB_COLUMNS`] of a table or alias, for a SELECT.
pub(super) fn job_columns(row: &str) -> String {
    let columns: Vec<_> = JOB_COLUMNS.iter().map(|column| format!("{row}.{}", column.name)).collect();
    columns.join(", ")
}

/// Joins the last event `e` of a job `j`. The event may be later than the job's row.
pub(super) const LAST_EVENT: &str = "LEFT JOIN job_event e ON e.org_id = j.org_id AND e.seq = CASE
        WHEN j.finished_at IS NOT NULL THEN j.last_seq
        ELSE (SELECT max(l.seq) FROM job_event l INDEXED BY idx_job_event_job
            WHERE l.org_id = j.org_id AND l.job_id = j.id AND l.seq >= j.last_seq) END AND +e.job_id = j.id";

/// Records `x` with lease extensions, since the last event `e` of a job `j` and beyond the base. Both bounds are one
/// position (`seq`, `n`) in the index: while only heartbeats come, the records of many minutes have the same `seq`.
const RECORDS_SINCE: &str = "FROM org_record x INDEXED BY idx_org_record_extensions
            WHERE x.org_id = j.org_id AND octet_length(x.extensions) > 0 AND (x.seq, x.n) >= (
                SELECT max(e.seq, r.seq), iif(e.seq > r.seq, 0, r.n) FROM org_head h
                CROSS JOIN org_record r ON r.org_id = h.org_id AND r.n > h.base_n
                WHERE h.org_id = j.org_id ORDER BY r.n LIMIT 1)";

/// The last lease extension of a running job `j` since its last event `e`, in a record beyond the base.
pub(super) static EXTENSION: LazyLock<String> = LazyLock::new(|| {
    let at = "instr(x.extensions, lower(hex(j.id)))";
    format!(
        "iif(e.next_status = 'running', (
            SELECT substr(x.extensions, {at} + {EXTENSION_AT}, {EXTENSION_CHARS}) {RECORDS_SINCE} AND {at} > 0
            ORDER BY x.seq DESC, x.n DESC LIMIT 1), NULL)"
    )
});

/// True if finding the extension takes more than [`NEAR_RECORDS`] records or [`NEAR_BYTES`] bytes.
pub(super) static IS_EXTENSION_FAR: LazyLock<String> = LazyLock::new(|| {
    format!(
        "(e.next_status = 'running' AND (SELECT count(*) > {NEAR_RECORDS} OR total(near.bytes) > {NEAR_BYTES} FROM (
            SELECT octet_length(x.extensions) AS bytes {RECORDS_SINCE}
            ORDER BY x.seq DESC, x.n DESC LIMIT {NEAR_RECORDS} + 1) near))"
    )
});

/// The extension, for reads that other reads wait for: `?` if finding it takes too long ([`IS_EXTENSION_FAR`]).
pub(super) static NEAR_EXTENSION: LazyLock<String> =
    LazyLock::new(|| format!("iif({}, '?', {})", *IS_EXTENSION_FAR, *EXTENSION));

/// The columns that [`read_job_over`](crate::store::image::read_job_over) reads, of a job `j` with [`LAST_EVENT`].
pub(super) static JOB_OVER: LazyLock<String> = LazyLock::new(|| job_over(&EXTENSION));

/// The same columns, with this expression for the extension.
pub(super) fn job_over(extension: &str) -> String {
    format!(
        "iif(e.seq > j.last_seq, e.image, NULL), e.next_status, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at, {extension}, {},
        e.detail_json ->> '$.stage', e.detail_json ->> '$.progress'",
        job_columns("j")
    )
}

/// True of a job `j` whose row is behind. Such a job is running.
pub(super) const IS_BEHIND: &str =
    "(j.finished_at IS NULL AND EXISTS (SELECT 1 FROM job_event l INDEXED BY idx_job_event_job
        WHERE l.org_id = j.org_id AND l.job_id = j.id AND l.seq > j.last_seq))";

/// True of a job that may be claimed ([`Job::is_ready`](crate::domain::job::Job::is_ready)). The partial indexes over
/// ready jobs have the same condition. It names no alias, so the statement must read one table of jobs only.
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

    /// True if the next column is null. All columns of an outer join are null where it found nothing.
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

    /// The result is in the event's detail, which is text and keeps it as it was given.
    fn result(&mut self) -> Result<Option<Json>, StoreError> {
        self.optional_text()?.map(detail::result).transpose().map(Option::flatten)
    }

    fn result_beside_detail(&mut self) -> Result<Option<Json>, StoreError> {
        Ok(self.optional_text()?.map(Json::from_trusted))
    }

    fn optional_time(&mut self) -> Result<Option<Time>, StoreError> {
        let micros: Option<i64> = self.get()?;
        micros.map(|micros| DateTime::from_timestamp_micros(micros).ok_or_else(|| damaged("time"))).transpose()
    }
}

pub(super) fn micros(time: Time) -> i64 {
    time.timestamp_micros()
}
