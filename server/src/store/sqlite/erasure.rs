//! Erasures: loads the events of jobs that are to be erased, and blanks them.

use sqlx::{AssertSqlSafe, SqliteConnection};
use std::sync::LazyLock;

use super::{
    columns::{Columns, micros},
    error::store_error,
    load::{hex, ids_json},
    set::Set,
    write,
};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::Job,
    },
    store::{
        Changes, ErasureNeeds, FoundErasures, StoreError, StoredEvent, Unblanked,
        erasure::{self, BLANKED},
        rows::{self, Columns as _, EVENT_COLUMNS, json_text},
    },
};

pub(super) const LEFT: &str =
    "/* unblanked */ SELECT job_id, after_seq, last_seq, since, until, requested_by FROM job_unblanked
    WHERE org_id = $1 AND ($2 IS NULL OR job_id IN (SELECT unhex(value) FROM json_each($2))) LIMIT +$3";

/// The events come in the order of the jobs. Only as many are read as may be blanked.
pub(super) static STORED: LazyLock<String> = LazyLock::new(|| {
    let columns = EVENT_COLUMNS.join(", ");
    format!(
        "/* stored_events */ SELECT {columns}, NULL, bytes FROM (
            SELECT f.*, sum(bytes) OVER (ORDER BY place, seq) - bytes AS before FROM (
                SELECT wanted.key AS place, e.* FROM json_each($2) wanted CROSS JOIN job_event e INDEXED BY idx_job_event_job
                    ON e.org_id = $1 AND e.job_id = unhex(wanted.value ->> 0)
                    AND e.seq > wanted.value ->> 1 AND e.seq <= wanted.value ->> 2
                LIMIT +$3) f)
        WHERE before < $4 ORDER BY place, seq"
    )
});

/// Loads what a batch needs. `to_erase` are jobs that are to be erased.
pub(super) async fn load(
    connection: &mut SqliteConnection,
    org: OrgId,
    needs: &ErasureNeeds,
    to_erase: Vec<&Job>,
) -> Result<FoundErasures, StoreError> {
    let left = load_left(connection, org, needs).await?;
    let wanted = erasure::wanted(to_erase, &left);
    if wanted.is_empty() {
        return Ok(FoundErasures { left, ..FoundErasures::default() });
    }
    let named: Vec<_> = wanted.iter().map(|of_job| (hex(of_job.job.0), of_job.after, of_job.last)).collect();
    let query = sqlx::query(AssertSqlSafe(STORED.as_str())).bind(org.0).bind(json_text(&named));
    let found = query.bind(BLANKED.events).bind(BLANKED.bytes).fetch_all(connection).await.map_err(store_error)?;
    let stored = |row| {
        let mut columns = Columns::of(row);
        Ok(StoredEvent { event: rows::event(&mut columns)?, bytes: columns.long()? })
    };
    let loaded = found.iter().map(stored).collect::<Result<_, StoreError>>()?;
    Ok(FoundErasures { left, events: erasure::by_job(&wanted, loaded) })
}

async fn load_left(
    connection: &mut SqliteConnection,
    org: OrgId,
    needs: &ErasureNeeds,
) -> Result<Vec<Unblanked>, StoreError> {
    if needs.jobs.is_empty() && !needs.of_any {
        return Ok(Vec::new());
    }
    let (of_jobs, limit) = if needs.of_any { (None, 1) } else { (Some(ids_json(&needs.jobs)), -1) };
    let query = sqlx::query(LEFT).bind(org.0).bind(of_jobs).bind(limit);
    let unblanked = |row| {
        let mut columns = Columns::of(row);
        Ok(Unblanked {
            job: JobId(columns.uuid()?),
            after: columns.long()?,
            last: columns.long()?,
            since: columns.time()?,
            until: columns.time()?,
            requester: columns.text()?.into(),
        })
    };
    query.fetch_all(connection).await.map_err(store_error)?.iter().map(unblanked).collect()
}

/// Blanks events, and notes what is left. A job's large results all go with its first events.
pub(super) async fn write(connection: &mut SqliteConnection, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
    let erased: Vec<_> = changes.edited.iter().filter(|edited| edited.is_erased).map(|edited| edited.job).collect();
    if !erased.is_empty() {
        for sql in [
            // Now, since a new job of this batch may use the key.
            "/* erase */ UPDATE job SET idempotency_key = NULL, request_digest = NULL
                WHERE org_id = $1 AND id IN (SELECT unhex(value) FROM json_each($2))",
            "/* erase */ DELETE FROM job_result WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
        ] {
            let query = sqlx::query(sql).bind(org.0).bind(ids_json(&erased));
            query.execute(&mut *connection).await.map_err(store_error)?;
        }
    }
    let mut events = Vec::with_capacity(changes.blanked.len());
    for event in &changes.blanked {
        events.push(write::blank_values(event)?);
    }
    Set::keyed(&write::BLANK_COLUMNS, events, 2).update(connection, "job_event").await?;
    for unblanked in &changes.unblanked {
        let sql = if unblanked.is_done() {
            "/* blanked */ DELETE FROM job_unblanked WHERE org_id = $1 AND job_id = $2"
        } else {
            "/* left */ INSERT INTO job_unblanked (org_id, job_id, after_seq, last_seq, since, until, requested_by)
                VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (org_id, job_id) DO UPDATE SET after_seq = excluded.after_seq"
        };
        let mut query = sqlx::query(sql).bind(org.0).bind(unblanked.job.0);
        if !unblanked.is_done() {
            query = query.bind(unblanked.after).bind(unblanked.last).bind(micros(unblanked.since));
            query = query.bind(micros(unblanked.until)).bind(rows::non_empty(&unblanked.requester));
        }
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(())
}
