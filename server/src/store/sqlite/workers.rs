//! Workers that were heard of.

use std::time::Duration;

use sqlx::{Sqlite, SqlitePool, query::Query, sqlite::SqliteArguments};

use super::{
    columns::{Columns, micros},
    error::store_error,
    load::hex,
};
use crate::{
    domain::{clock::Time, id::OrgId},
    store::{HeardWorker, StoreError, WorkerPage, rows, workers},
};

/// A later time than this from now is one of a clock that was set back since.
const AHEAD: Duration = Duration::from_secs(60);

pub(super) const PAGE: &str = "/* workers */ SELECT id, about, heard_at FROM worker
    WHERE org_id = $1 AND id > $2 AND heard_at BETWEEN $3 AND $5 ORDER BY id LIMIT +$4";

/// Writes workers. A clock that was set back does not keep what was written before.
pub(super) fn note(heard: &[HeardWorker], now: Time) -> Query<'static, Sqlite, SqliteArguments> {
    const SQL: &str = "/* note_workers */ INSERT INTO worker (org_id, id, about, heard_at)
    SELECT unhex(heard.value ->> 0), heard.value ->> 1, heard.value ->> 2, heard.value ->> 3 FROM json_each($1) heard WHERE true
    ON CONFLICT (org_id, id) DO UPDATE SET heard_at = excluded.heard_at,
        about = CASE excluded.about WHEN '' THEN about ELSE excluded.about END";
    let row = |heard: &HeardWorker| {
        (hex(heard.org.0), heard.id.to_string(), workers::about_text(heard), micros(now - heard.silent_for))
    };
    sqlx::query(SQL).bind(rows::json_text(&heard.iter().map(row).collect::<Vec<_>>()))
}

/// Removes those of these orgs that were silent for longer than `known_for`, or were heard of by a clock that was set back.
pub(super) fn forget(orgs: &[OrgId], known_for: Duration, now: Time) -> Query<'static, Sqlite, SqliteArguments> {
    const SQL: &str = "/* forget_workers */ DELETE FROM worker
    WHERE org_id IN (SELECT unhex(value) FROM json_each($1)) AND heard_at NOT BETWEEN $2 AND $3";
    let orgs: Vec<_> = orgs.iter().map(|org| hex(org.0)).collect();
    sqlx::query(SQL).bind(rows::json_text(&orgs)).bind(micros(now - known_for)).bind(micros(now + AHEAD))
}

pub(super) async fn page(
    pool: &SqlitePool,
    org: OrgId,
    after: &str,
    limit: usize,
    known_for: Duration,
    now: Time,
) -> Result<WorkerPage, StoreError> {
    let query = sqlx::query(PAGE).bind(org.0).bind(after).bind(micros(now - known_for)).bind(limit as i64);
    let query = query.bind(micros(now + AHEAD));
    let found = query.fetch_all(pool).await.map_err(store_error)?;
    let workers = found.iter().map(|row| workers::read(&mut Columns::of(row))).collect::<Result<_, _>>()?;
    Ok(WorkerPage { workers, as_of: now })
}
