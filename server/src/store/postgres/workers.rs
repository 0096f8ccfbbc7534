//! Workers that were heard of.

use std::{sync::Arc, time::Duration};

use super::{
    columns::Columns,
    connections::{Connections, arguments},
};
use crate::{
    domain::id::OrgId,
    store::{
        HeardWorker, StoreError, WorkerPage,
        rows::{Columns as _, damaged},
        workers::{about_text, read},
    },
};

fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

/// Writes workers, and removes those of their orgs that were silent for longer than `known_for`.
pub(super) async fn note(
    connections: &Arc<Connections>,
    heard: &[HeardWorker],
    orgs: &[OrgId],
    known_for: Duration,
) -> Result<(), StoreError> {
    const SQL: &str = "/* note_workers */ SELECT jobledger.note_workers($1, $2, $3, $4, $5, $6)";
    let of: Vec<_> = heard.iter().map(|heard| heard.org.0).collect();
    let ids: Vec<_> = heard.iter().map(|heard| heard.id.to_string()).collect();
    let abouts: Vec<_> = heard.iter().map(about_text).collect();
    let ages: Vec<_> = heard.iter().map(|heard| micros(heard.silent_for)).collect();
    let orgs: Vec<_> = orgs.iter().map(|org| org.0).collect();
    connections.fetch(SQL, arguments![orgs, of, ids, abouts, ages, micros(known_for)]).await.map(drop)
}

/// Without workers there is a row with the clock alone.
pub(super) async fn page(
    readers: &Arc<Connections>,
    org: OrgId,
    after: &str,
    limit: usize,
    known_for: Duration,
) -> Result<WorkerPage, StoreError> {
    const SQL: &str = "/* workers */ SELECT clock.now, w.id IS NOT NULL, w.id, w.about, w.heard_at
        FROM (SELECT clock_timestamp() AS now) clock LEFT JOIN jobledger.read_workers($1, $2, $3, $4) w ON true";
    let found = readers.fetch(SQL, arguments![org.0, after.to_owned(), micros(known_for), limit as i64]).await?;
    let (mut workers, mut as_of) = (Vec::with_capacity(found.len()), None);
    for row in &found {
        let mut columns = Columns::of(row);
        as_of = Some(columns.time()?);
        if columns.flag()? {
            workers.push(read(&mut columns)?);
        }
    }
    Ok(WorkerPage { workers, as_of: as_of.ok_or_else(|| damaged("clock"))? })
}
