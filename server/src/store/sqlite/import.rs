//! What the database has of jobs that are imported again.

use std::collections::HashMap;

use sqlx::SqliteConnection;

use super::{columns::Columns, error::store_error, load::ids_json};
use crate::{
    domain::{
        id::{Digest, JobId, OrgId},
        job::Job,
        transition::Mark,
    },
    store::{StoreError, of_imported, other_than, rows},
};

pub(super) const LOAD_MARKS: &str = "/* load_marks */ SELECT e.job_id, e.seq, e.detail_json
     FROM json_each($2) wanted CROSS JOIN job_event e ON e.org_id = $1 AND e.seq = (
        SELECT max(i.seq) FROM job_event i INDEXED BY idx_job_event_job
        WHERE i.org_id = $1 AND i.job_id = unhex(wanted.value) AND i.kind = 'imported')";

pub(super) const LOAD_PAST: &str = "/* load_past */ SELECT e.job_id, e.ts, e.prev_status, e.next_status
     FROM json_each($2) wanted
     CROSS JOIN job_event e INDEXED BY idx_job_event_job ON e.org_id = $1 AND e.job_id = unhex(wanted.value)
     WHERE e.kind <> 'imported'";

/// Loads the last `IMPORTED` event of each job that is imported again; if the digest differs, also the job's other events.
pub(super) async fn load_marks(
    connection: &mut SqliteConnection,
    org: OrgId,
    jobs: &[Job],
    imports: &[(JobId, Digest)],
) -> Result<HashMap<JobId, Mark>, StoreError> {
    let known = of_imported(jobs, imports);
    if known.is_empty() {
        return Ok(HashMap::new());
    }
    let query = sqlx::query(LOAD_MARKS).bind(org.0).bind(ids_json(known.iter().map(|job| &job.id)));
    let found = query.fetch_all(&mut *connection).await.map_err(store_error)?;
    let mut marks = found.iter().map(|row| rows::mark(&mut Columns::of(row))).collect::<Result<HashMap<_, _>, _>>()?;
    let changed = other_than(&marks, imports);
    if !changed.is_empty() {
        let query = sqlx::query(LOAD_PAST).bind(org.0).bind(ids_json(&changed));
        for row in query.fetch_all(connection).await.map_err(store_error)? {
            let (job, key) = rows::past_key(&mut Columns::of(&row))?;
            marks.entry(job).and_modify(|mark| mark.past.push(key));
        }
    }
    Ok(marks)
}
