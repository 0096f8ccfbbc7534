//! Erasures: loads the events of jobs that are to be erased, and blanks them.

use sqlx::PgConnection;

use super::{
    columns::Columns,
    connections::arguments,
    error::store_error,
    statement::{Column, Statement, unnest},
    write::MAX_DETAIL_RESULT,
};
use crate::{
    domain::{id::OrgId, job::Job},
    store::{
        Changes, ErasureNeeds, FoundErasures, StoreError, Unblanked, detail, erasure,
        rows::{self, labels_json, non_empty},
    },
};

/// Loads what a batch needs. `to_erase` are jobs that are to be erased.
pub(super) async fn load(
    connection: &mut PgConnection,
    org: OrgId,
    needs: &ErasureNeeds,
    to_erase: Vec<&Job>,
) -> Result<FoundErasures, StoreError> {
    const STORED: &str =
        "/* stored_events */ SELECT e.org_id, e.seq, e.job_id, e.job_seq, e.ts, e.recorded_at, e.kind, e.prev_status,
            e.next_status, e.attempt, e.actor, e.job_type, (e.detail_json - 'result')::text, e.labels::text, NULL::text, e.bytes::bigint
        FROM (
            SELECT f.*, sum(f.bytes) OVER (ORDER BY f.place, f.seq) - f.bytes AS before FROM (
                SELECT wanted.place, e.*
                FROM unnest($2::uuid[], $3::bigint[], $4::bigint[], $5::timestamptz[], $6::timestamptz[])
                    WITH ORDINALITY AS wanted (id, after, last, since, until, place)
                CROSS JOIN LATERAL (
                    SELECT * FROM jobledger.job_event e WHERE e.org_id = $1 AND e.job_id = wanted.id
                        AND e.seq > wanted.after AND e.seq <= wanted.last
                        AND e.recorded_at >= wanted.since AND e.recorded_at <= wanted.until
                    ORDER BY e.seq LIMIT $7) e
                ORDER BY wanted.place, e.seq LIMIT $7) f) e
        WHERE e.before < $8 ORDER BY e.place, e.seq";
    let (left, most) = (load_left(connection, org, needs).await?, needs.most());
    let wanted = erasure::wanted(to_erase, &left, most);
    if wanted.is_empty() {
        return Ok(FoundErasures { left, ..FoundErasures::default() });
    }
    let ids: Vec<_> = wanted.iter().map(|of_job| of_job.job.0).collect();
    let (after, last): (Vec<_>, Vec<_>) = wanted.iter().map(|of_job| (of_job.after, of_job.last)).unzip();
    let (since, until): (Vec<_>, Vec<_>) = wanted.iter().map(|of_job| (of_job.since, of_job.until)).unzip();
    let arguments = arguments![org.0, ids, after, last, since, until, most.events, most.bytes];
    let found = sqlx::query_with(STORED, arguments).fetch_all(connection).await.map_err(store_error)?;
    let loaded = found.iter().map(|row| rows::stored_event(&mut Columns::of(row))).collect::<Result<_, _>>()?;
    Ok(FoundErasures { left, events: erasure::by_job(&wanted, loaded, most) })
}

async fn load_left(
    connection: &mut PgConnection,
    org: OrgId,
    needs: &ErasureNeeds,
) -> Result<Vec<Unblanked>, StoreError> {
    const LEFT: &str =
        "/* unblanked */ SELECT u.job_id, u.after_seq, u.last_seq, u.since, u.until, u.requested_by FROM jobledger.job_unblanked u
        WHERE u.org_id = $1 AND ($2 OR u.job_id = ANY ($3)) ORDER BY u.job_id = ANY ($3) DESC LIMIT $4";
    if needs.jobs.is_empty() && !needs.of_any {
        return Ok(Vec::new());
    }
    let ids: Vec<_> = needs.jobs.iter().map(|id| id.0).collect();
    let limit = ids.len() as i64 + i64::from(needs.of_any);
    let query = sqlx::query_with(LEFT, arguments![org.0, needs.of_any, ids, limit]);
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| rows::unblanked(&mut Columns::of(row))).collect()
}

impl Statement {
    /// Blanks events, frees the keys of erased jobs, and notes which events are left.
    pub(super) fn erased(&mut self, org: &str, changes: &Changes) -> Result<(), StoreError> {
        let erased: Vec<_> =
            changes.edited.iter().filter(|edited| edited.is_erased).map(|edited| edited.job.0).collect();
        if !erased.is_empty() {
            let ids = self.bind(erased)?;
            self.part(
                "freed_keys",
                format_args!(
                    "(UPDATE jobledger.job SET idempotency_key = NULL, request_digest = NULL
                     WHERE org_id = {org} AND id = ANY ({ids}::uuid[]))"
                ),
            );
        }
        self.blanked_events(org, changes)?;
        let (done, left): (Vec<_>, Vec<_>) = changes.unblanked.iter().partition(|unblanked| unblanked.is_done());
        if !done.is_empty() {
            let ids = self.bind(done.iter().map(|unblanked| unblanked.job.0).collect::<Vec<_>>())?;
            self.part(
                "all_blanked",
                format_args!(
                    "(DELETE FROM jobledger.job_unblanked WHERE org_id = {org} AND job_id = ANY ({ids}::uuid[]))"
                ),
            );
        }
        if !left.is_empty() {
            let columns = [
                self.column("job_id", &left, |unblanked| unblanked.job.0)?,
                self.column("after_seq", &left, |unblanked| unblanked.after)?,
                self.column("last_seq", &left, |unblanked| unblanked.last)?,
                self.column("since", &left, |unblanked| unblanked.since)?,
                self.column("until", &left, |unblanked| unblanked.until)?,
                self.column("requested_by", &left, |unblanked| non_empty(&unblanked.requester))?,
            ];
            let rows = unnest(&columns);
            self.part(
                "left_unblanked",
                format_args!(
                    "(INSERT INTO jobledger.job_unblanked (org_id, job_id, after_seq, last_seq, since, until, requested_by)
                     SELECT {org}, u.* FROM {rows}
                     ON CONFLICT (org_id, job_id) DO UPDATE SET after_seq = excluded.after_seq)"
                ),
            );
        }
        Ok(())
    }

    fn blanked_events(&mut self, org: &str, changes: &Changes) -> Result<(), StoreError> {
        let events = &changes.blanked;
        if events.is_empty() {
            return Ok(());
        }
        let details =
            events.iter().map(|event| detail::write(event, MAX_DETAIL_RESULT)).collect::<Result<Vec<_>, _>>()?;
        let columns = [
            self.column("seq", events, |event| event.seq)?,
            self.column("recorded_at", events, |event| event.recorded_at)?,
            self.column("actor", events, |event| non_empty(&event.actor))?,
            self.column("detail_json", &details, Option::as_deref)?,
            self.column("labels", events, |event| labels_json(&event.labels))?,
            self.column("bytes", events, |event| i32::try_from(event.weight()).unwrap_or(i32::MAX))?,
        ];
        let (rows, names): (_, Vec<_>) = (unnest(&columns), columns.iter().map(|column| column.name).collect());
        let values: Vec<_> = columns.iter().map(Column::value).collect();
        let set: Vec<_> = names[2..].iter().map(|name| format!("{name} = excluded.{name}")).collect();
        let (names, values, set) = (names.join(", "), values.join(", "), set.join(", "));
        // All of these rows exist, so none is inserted: see `overwritten_jobs`.
        self.part(
            "blanked_events",
            format_args!(
                "(INSERT INTO jobledger.job_event (org_id, job_id, job_seq, attempt, kind, next_status, job_type, {names})
                 SELECT {org}, {org}, 0, 0, '', '', '', {values} FROM {rows}
                 WHERE EXISTS (SELECT FROM jobledger.job_event e
                    WHERE e.org_id = {org} AND e.seq = u.seq AND e.recorded_at = u.recorded_at)
                 ON CONFLICT (org_id, seq, recorded_at) DO UPDATE SET {set}, result = NULL, payload = NULL, image = NULL)"
            ),
        );
        Ok(())
    }
}
