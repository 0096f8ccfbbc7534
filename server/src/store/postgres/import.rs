//! Loads what an earlier import brought, for jobs that are imported again.

use std::collections::HashMap;

use sqlx::PgConnection;

use super::{columns::Columns, connections::arguments, error::store_error};
use crate::{
    domain::{
        clock::Time,
        id::{Digest, JobId, OrgId},
        job::Job,
        transition::Mark,
    },
    store::{StoreError, of_imported, other_than, rows},
};

const LOAD_MARKS: &str = "/* load_marks */ SELECT wanted.id, e.seq, (e.detail_json - 'result')::text
    FROM unnest($2::uuid[], $3::timestamptz[], $4::timestamptz[]) AS wanted (id, since, until) CROSS JOIN LATERAL (
        SELECT e.seq, e.detail_json FROM jobledger.job_event e
        WHERE e.org_id = $1 AND e.job_id = wanted.id AND e.recorded_at >= wanted.since AND e.recorded_at <= wanted.until
            AND e.kind = 'imported'
        ORDER BY e.seq DESC LIMIT 1
    ) e";

const LOAD_PAST: &str = "/* load_past */ SELECT wanted.id, e.ts, e.prev_status, e.next_status
    FROM unnest($2::uuid[], $3::timestamptz[], $4::timestamptz[]) AS wanted (id, since, until) CROSS JOIN LATERAL (
        SELECT * FROM jobledger.job_event e
        WHERE e.org_id = $1 AND e.job_id = wanted.id AND e.recorded_at >= wanted.since AND e.recorded_at <= wanted.until
            AND e.kind <> 'imported' OFFSET 0
    ) e";

/// Loads the last import of each of these jobs that was imported before. If its digest differs from that of the new import,
/// also loads the keys of the job's other events.
pub(super) async fn load_marks(
    connection: &mut PgConnection,
    org: OrgId,
    jobs: &[Job],
    imports: &[(JobId, Digest)],
) -> Result<HashMap<JobId, Mark>, StoreError> {
    let known = of_imported(jobs, imports);
    if known.is_empty() {
        return Ok(HashMap::new());
    }
    // The time range of each job's events, so that no other partition is read.
    let stretches = |wanted: &[&Job]| -> (Vec<_>, Vec<Time>, Vec<Time>) {
        let (ids, times): (Vec<_>, Vec<_>) =
            wanted.iter().map(|job| (job.id.0, (job.created_at, job.last_recorded_at))).unzip();
        let (since, until) = times.into_iter().unzip();
        (ids, since, until)
    };
    let (ids, since, until) = stretches(&known);
    let query = sqlx::query_with(LOAD_MARKS, arguments![org.0, ids, since, until]);
    let found = query.fetch_all(&mut *connection).await.map_err(store_error)?;
    let mut marks = found.iter().map(|row| rows::mark(&mut Columns::of(row))).collect::<Result<HashMap<_, _>, _>>()?;
    let changed = other_than(&marks, imports);
    let changed: Vec<_> = known.into_iter().filter(|job| changed.contains(&job.id)).collect();
    if !changed.is_empty() {
        let (ids, since, until) = stretches(&changed);
        let query = sqlx::query_with(LOAD_PAST, arguments![org.0, ids, since, until]);
        for row in query.fetch_all(connection).await.map_err(store_error)? {
            let (job, key) = rows::past_key(&mut Columns::of(&row))?;
            marks.entry(job).and_modify(|mark| mark.past.push(key));
        }
    }
    Ok(marks)
}
