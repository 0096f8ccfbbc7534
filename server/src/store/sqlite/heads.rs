//! Writes of a batch to `org_head`, `org_record` and `org_due`.

use std::collections::{BTreeMap, HashMap};

use sqlx::SqliteConnection;

use super::{columns::micros, error::store_error, load::hex, set::Set};
use crate::{
    domain::{clock::Time, id::OrgId},
    store::{
        Changes, Head, NextDue, RecordId, StoreError,
        record::{RECORD_FORMAT, RECORDS_DROPPED, RECORDS_KEPT},
        row_writes::Base,
        rows,
        value::Value,
    },
};

/// What a batch changes in one org, and the head and record that it leaves.
pub(super) struct Written<'a> {
    pub(super) org: OrgId,
    pub(super) changes: &'a Changes,
    /// The log's head after the batch.
    pub(super) head: Head,
    /// The log's last record before the batch.
    pub(super) before: RecordId,
    /// The batch's own record.
    pub(super) record: RecordId,
    /// No row lacks an event or a lease extension up to here.
    pub(super) base: Base,
    /// Images, by the `seq` of the events that they are stored with.
    pub(super) images: HashMap<i64, String>,
    /// Lease extensions, as text for the record.
    pub(super) extensions: Option<String>,
}

impl Written<'_> {
    /// The time of the log's last event; the clock's if the log has none.
    pub(super) fn recorded_at(&self, now: Time) -> Time {
        self.head.recorded_at.unwrap_or(now)
    }
}

/// Writes heads and records. Every `RECORDS_DROPPED / 2` records of an org, it also removes old ones.
pub(super) async fn write(
    connection: &mut SqliteConnection,
    written: &[Written<'_>],
    now: Time,
) -> Result<(), StoreError> {
    let heads = written.iter().map(head_values).collect();
    Set::new(&HEAD_COLUMNS, heads).put(connection, "save_heads", "org_head", OVER_HEAD).await?;
    let records = written.iter().map(|written| record_values(written, now)).collect();
    Set::new(&RECORD_COLUMNS, records).insert(connection, "org_record").await?;
    for Written { org, base, .. } in written.iter().filter(|written| written.record.n % (RECORDS_DROPPED / 2) == 0) {
        let query =
            sqlx::query(DROP_RECORDS).bind(org.0).bind(RECORDS_DROPPED).bind(micros(now - RECORDS_KEPT)).bind(base.n);
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(())
}

const HEAD_COLUMNS: [&str; 14] = [
    "org_id",
    "seq",
    "floor_seq",
    "recorded_at",
    "types",
    "ready_gen",
    "jobs",
    "bytes",
    "org_seq",
    "removals",
    "n",
    "record",
    "base_seq",
    "base_n",
];

const OVER_HEAD: &str = " ON CONFLICT (org_id) DO UPDATE SET seq = excluded.seq, floor_seq = excluded.floor_seq,
    recorded_at = excluded.recorded_at, types = excluded.types, ready_gen = excluded.ready_gen,
    jobs = excluded.jobs, bytes = excluded.bytes, org_seq = excluded.org_seq,
    removals = removals + excluded.removals, n = excluded.n, record = excluded.record,
    base_seq = excluded.base_seq, base_n = excluded.base_n";

fn head_values<'a>(written: &'a Written<'_>) -> Vec<Value<'a>> {
    let Head { seq, floor, recorded_at, types, ready_gen, stock, org_seq } = written.head;
    vec![
        written.org.0.into(),
        seq.into(),
        floor.into(),
        recorded_at.into(),
        types.into(),
        ready_gen.into(),
        stock.jobs.into(),
        stock.bytes.into(),
        org_seq.into(),
        written.changes.is_removing().into(),
        written.record.n.into(),
        written.record.id.into(),
        written.base.seq.into(),
        written.base.n.into(),
    ]
}

/// Writes the base of a batch that only folds rows, and so leaves no record.
pub(super) async fn write_base(connection: &mut SqliteConnection, org: OrgId, base: Base) -> Result<(), StoreError> {
    let query = sqlx::query("/* write_base */ UPDATE org_head SET base_seq = $2, base_n = $3 WHERE org_id = $1");
    query.bind(org.0).bind(base.seq).bind(base.n).execute(connection).await.map(drop).map_err(store_error)
}

const RECORD_COLUMNS: [&str; 10] =
    ["org_id", "n", "id", "prev", "seq", "ready_gen", "recorded_at", "written_at", "format", "extensions"];

fn record_values<'a>(written: &'a Written<'_>, now: Time) -> Vec<Value<'a>> {
    vec![
        written.org.0.into(),
        written.record.n.into(),
        written.record.id.into(),
        written.before.id.into(),
        written.head.seq.into(),
        written.head.ready_gen.into(),
        written.recorded_at(now).into(),
        now.into(),
        i32::from(RECORD_FORMAT).into(),
        written.extensions.as_deref().into(),
    ]
}

const DROP_RECORDS: &str = "/* drop_records */ DELETE FROM org_record WHERE org_id = $1 AND n <= (
    SELECT max(oldest.n) FROM (SELECT n, written_at FROM org_record WHERE org_id = $1 ORDER BY n LIMIT +$2) oldest
    WHERE oldest.written_at < $3) AND n <= $4";

/// Sets when retention next looks at each org. An org's first batch sets it to now.
pub(super) async fn write_retention(
    connection: &mut SqliteConnection,
    changes: &[(OrgId, &Changes)],
    now: Time,
) -> Result<(), StoreError> {
    let retention = changes.iter().filter_map(|(org, changes)| {
        let is_first = changes.first().is_some_and(|event| event.seq == 1);
        let due = changes.next_retention.or(is_first.then_some(now))?;
        Some(vec![org.0.into(), due.into()])
    });
    Set::new(&["org_id", "next_due_at"], retention.collect())
        .put(connection, "save_retention", "org_due", OVER_RETENTION)
        .await
}

/// Sets when the sweep next looks at each org for due jobs.
pub(super) async fn write_due(
    connection: &mut SqliteConnection,
    due: &[(OrgId, Option<NextDue>)],
) -> Result<(), StoreError> {
    let (mut at, mut by) = (BTreeMap::new(), BTreeMap::new());
    for (org, due) in due {
        match due {
            Some(NextDue::At(due)) => _ = at.insert(hex(org.0), due.map(micros)),
            Some(NextDue::By(due)) => _ = by.insert(hex(org.0), Some(micros(*due))),
            None => {}
        }
    }
    for (sql, due) in [(DUE_AT, at), (DUE_BY, by)] {
        if !due.is_empty() {
            sqlx::query(sql).bind(rows::json_text(&due)).execute(&mut *connection).await.map_err(store_error)?;
        }
    }
    Ok(())
}

const OVER_RETENTION: &str = " ON CONFLICT (org_id) DO UPDATE SET next_due_at = excluded.next_due_at";

pub(super) const DUE_AT: &str = "/* due_at */ UPDATE org_due SET work_due_at = wanted.value
    FROM json_each($1) wanted WHERE org_id = unhex(wanted.key)";
pub(super) const DUE_BY: &str = "/* due_by */ UPDATE org_due SET work_due_at = wanted.value
    FROM json_each($1) wanted
    WHERE org_id = unhex(wanted.key) AND (work_due_at IS NULL OR work_due_at > wanted.value)";
