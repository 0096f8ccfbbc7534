//! What a batch loads before it decides: a statement for each kind of thing.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, LazyLock},
    time::Duration,
};

use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::{
    columns::{Columns, job_columns, job_over},
    connections::arguments,
    error::store_error,
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
        lease::LONGEST_LEASE,
        status::JobStatus,
        transition::LONGEST_GRACE,
    },
    store::{
        Differs, HeldBy, ReadyJob, RecordId, StoreError,
        image::{DIFFERS, read_job_over},
        job_columns::{JOB_COLUMNS, read_job},
        row_writes::Base,
        rows::{self, Columns as _},
        state::{Extended, Lacks, OrgState},
        window::{ALL_TYPES, Short},
    },
};

pub(super) type Of<T> = (OrgId, T);

/// Splits rows into a column of orgs and a column of values.
fn columns_of<T, U>(rows: &[Of<T>], value: impl Fn(&T) -> U) -> (Vec<Uuid>, Vec<U>) {
    rows.iter().map(|(org, row)| (org.0, value(row))).unzip()
}

/// The first row has the types that exist, with their orgs. Each other row is a job.
///
/// OFFSET 0 makes PostgreSQL look each row up by its whole key. Without it, a plan made while the tables are empty walks an
/// org's rows to find the wanted ones, and PostgreSQL keeps that plan until the tables are analysed.
static LOAD_JOBS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_jobs */ WITH wanted (org_id, id) AS MATERIALIZED (
            SELECT * FROM unnest($1::uuid[], $2::uuid[])
            UNION SELECT wanted.org_id, j.id FROM unnest($3::uuid[], $4::text[]) AS wanted (org_id, key) CROSS JOIN LATERAL (
                SELECT j.id FROM jobledger.job j WHERE j.org_id = wanted.org_id AND j.idempotency_key = wanted.key OFFSET 0) j
            UNION SELECT wanted.org_id, j.id
            FROM unnest($5::uuid[], $6::text[], $7::text[], $8::bigint[]) AS wanted (org_id, worker, request, most) CROSS JOIN LATERAL (
                SELECT j.id FROM jobledger.job j
                WHERE j.org_id = wanted.org_id AND j.lease_request = wanted.request AND j.lease_worker = wanted.worker
                LIMIT wanted.most) j
        ), known AS MATERIALIZED (
            SELECT wanted.org_id, wanted.type FROM unnest($9::uuid[], $10::text[]) AS wanted (org_id, type) CROSS JOIN LATERAL (
                SELECT FROM jobledger.org_counter c WHERE c.org_id = wanted.org_id AND c.type = wanted.type OFFSET 0) c
        )
        SELECT (SELECT array_agg(known.org_id) FROM known), (SELECT array_agg(known.type) FROM known), {}, NULL, NULL, NULL
        UNION ALL
        SELECT NULL, NULL, {}, e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer, e.seq IS NOT NULL
        FROM wanted
        CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = wanted.org_id AND j.id = wanted.id OFFSET 0) j
        LEFT JOIN LATERAL (
            SELECT e.seq, e.detail_json FROM jobledger.job_event e
            WHERE e.org_id = j.org_id AND e.job_id = j.id AND e.seq = j.last_seq AND e.recorded_at = j.last_recorded_at OFFSET 0) e ON true",
        vec!["NULL"; JOB_COLUMNS.len()].join(", "),
        job_columns("j")
    )
});

/// The names by which [`load_jobs`] finds jobs and types.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) jobs: Vec<Of<JobId>>,
    pub(super) keys: Vec<Of<Arc<str>>>,
    pub(super) held: Vec<Of<HeldBy>>,
    pub(super) types: Vec<Of<Arc<str>>>,
}

impl Names {
    fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.keys.is_empty() && self.held.is_empty() && self.types.is_empty()
    }
}

/// Loads the jobs that have any of these names, each once, and the types that exist.
pub(super) async fn load_jobs(
    connection: &mut PgConnection,
    names: &Names,
) -> Result<(Vec<Job>, HashSet<Of<Arc<str>>>), StoreError> {
    let (mut jobs, mut types) = (Vec::new(), HashSet::new());
    if names.is_empty() {
        return Ok((jobs, types));
    }
    let text = |text: &Arc<str>| text.to_string();
    let (job_orgs, ids) = columns_of(&names.jobs, |id| id.0);
    let (key_orgs, keys) = columns_of(&names.keys, text);
    let (held_orgs, workers) = columns_of(&names.held, |held| held.worker.to_string());
    let (_, requests) = columns_of(&names.held, |held| held.request.to_string());
    let (_, limits) = columns_of(&names.held, |held| held.limit as i64);
    let (type_orgs, wanted) = columns_of(&names.types, text);
    let arguments = arguments![job_orgs, ids, key_orgs, keys, held_orgs, workers, requests, limits, type_orgs, wanted];
    let query = sqlx::query_with(AssertSqlSafe(LOAD_JOBS.as_str()), arguments);
    for row in &query.fetch_all(connection).await.map_err(store_error)? {
        let mut columns = Columns::of(row);
        let (orgs, found): (Option<Vec<Uuid>>, Option<Vec<String>>) = (columns.get()?, columns.get()?);
        if columns.peek_is_null()? {
            let found = orgs.unwrap_or_default().into_iter().zip(found.unwrap_or_default());
            types = found.map(|(org, name)| (OrgId(org), Arc::from(name))).collect();
        } else {
            jobs.push(rows::job_of_log(&mut columns)?);
        }
    }
    Ok((jobs, types))
}

/// The jobs of an org that are due by their rows, and when the next of the other jobs is.
pub(super) type Due = (Vec<(Time, JobId)>, Option<Time>);

/// Loads the due jobs of each org, up to its limit, those that were due first.
pub(super) async fn load_due(
    connection: &mut PgConnection,
    wanted: &[Of<usize>],
    now: Time,
) -> Result<HashMap<OrgId, Due>, StoreError> {
    const SQL: &str = "/* load_due */ SELECT wanted.org_id, due.due_at, due.id, next.due_at
        FROM unnest($1::uuid[], $2::bigint[]) AS wanted (org_id, most)
        CROSS JOIN LATERAL (SELECT min(j.due_at) AS due_at FROM jobledger.job j
            WHERE j.org_id = wanted.org_id AND j.due_at IS NOT NULL AND j.due_at > $3) next
        LEFT JOIN LATERAL (SELECT j.due_at, j.id FROM jobledger.job j
            WHERE j.org_id = wanted.org_id AND j.due_at IS NOT NULL AND j.due_at <= $3
            ORDER BY j.due_at LIMIT wanted.most) due ON true";
    let mut found: HashMap<_, Due> = HashMap::new();
    if wanted.is_empty() {
        return Ok(found);
    }
    let (orgs, limits) = columns_of(wanted, |limit| *limit as i64);
    let query = sqlx::query_with(SQL, arguments![orgs, limits, now]);
    for row in &query.fetch_all(connection).await.map_err(store_error)? {
        let mut columns = Columns::of(row);
        let (jobs, next) = found.entry(OrgId(columns.uuid()?)).or_default();
        let (at, id) = (columns.optional_time()?, columns.get::<Option<Uuid>>()?.map(JobId));
        jobs.extend(at.zip(id));
        *next = columns.optional_time()?;
    }
    Ok(found)
}

/// An org for which no current state is cached: its base, and an older state with the record that it was made at, if cached.
pub(super) struct Behind {
    pub(super) org: OrgId,
    pub(super) base: Base,
    pub(super) known: Option<(RecordId, OrgState)>,
}

static READ_UNFOLDED: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* read_unfolded */ SELECT org, is_known, quiet, extended_n, extended_at, first_seq, first_recorded_at, first_prev_status = 'queued',
             {}, {}
         FROM jobledger.read_unfolded($1, $2, $3, $4, $5, $6) r",
        DIFFERS.replace("e.image", "(r.found).event_image"),
        job_over("(r.found)")
    )
});

/// Loads the states of these orgs: the jobs whose rows are behind, or a cached state with what has changed since its record.
pub(super) async fn load_unfolded(
    connection: &mut PgConnection,
    behind: Vec<Behind>,
) -> Result<HashMap<OrgId, OrgState>, StoreError> {
    let mut found: HashMap<OrgId, OrgState> = HashMap::with_capacity(behind.len());
    if behind.is_empty() {
        return Ok(found);
    }
    let column = |value: fn(&Behind) -> i64| behind.iter().map(value).collect::<Vec<_>>();
    let orgs: Vec<_> = behind.iter().map(|behind| behind.org.0).collect();
    let (base_seqs, base_ns) = (column(|behind| behind.base.seq), column(|behind| behind.base.n));
    let numbers = column(|behind| behind.known.as_ref().map_or(0, |(record, _)| record.n));
    let records = column(|behind| behind.known.as_ref().map_or(0, |(record, _)| record.id));
    let seqs = column(|behind| behind.known.as_ref().map_or(0, |(_, state)| state.head));
    let arguments = arguments![orgs, base_seqs, base_ns, numbers, records, seqs];
    let query = sqlx::query_with(AssertSqlSafe(READ_UNFOLDED.as_str()), arguments);
    let rows = query.fetch_all(connection).await.map_err(store_error)?;
    let mut behind: HashMap<_, _> = behind.into_iter().map(|behind| (behind.org, behind)).collect();
    for row in &rows {
        let mut columns = Columns::of(row);
        let org = OrgId(columns.uuid()?);
        let (is_known, quiet) = (columns.get::<Option<bool>>()?, columns.get::<Option<Vec<Uuid>>>()?);
        if let Some(is_known) = is_known {
            let asked = behind.remove(&org);
            let known = asked.filter(|_| is_known).and_then(|asked| Some((asked.base, asked.known?.1)));
            let state = found.entry(org).or_default();
            if let Some((base, known)) = known {
                let quiet: Vec<_> = quiet.unwrap_or_default().into_iter().map(JobId).collect();
                *state = known;
                state.forget(base, &quiet);
            }
            continue;
        }
        let (n, at) = (columns.optional_long()?, columns.optional_time()?);
        let (seq, recorded_at) = (columns.optional_long()?, columns.optional_time()?);
        let lacks = Lacks::of(seq, recorded_at, columns.optional_flag()?);
        let differs = Differs::of_number(columns.optional_int()?);
        found.entry(org).or_default().set(read_job_over(&mut columns)?, lacks, Extended::of(n, at), differs);
    }
    Ok(found)
}

pub(super) async fn load_misdated(
    connection: &mut PgConnection,
    org: OrgId,
    (limit, by): (usize, Duration),
    now: Time,
) -> Result<Vec<JobId>, StoreError> {
    const SQL: &str =
        "/* load_misdated */ SELECT j.id FROM jobledger.job j WHERE j.org_id = $1 AND j.due_at IS NOT NULL AND (
            j.status = 'running' AND j.lease_expires_at > $2 + j.lease_granted * interval '1 microsecond'
                AND (j.updated_at > $2 OR j.lease_expires_at > $2 + $3 * interval '1 second')
            OR j.status = 'running' AND j.due_at > $5 * interval '1 second' + greatest($2, least(j.lease_expires_at,
                least(j.attempt_started_at, $2) + j.run_timeout * interval '1 microsecond'))
            OR j.status = 'queued' AND j.attempt > 0 AND j.updated_at > $2
                AND j.due_at > $2 + (j.scheduled_at - j.updated_at)
        ) LIMIT $4";
    let by = by.min(LONGEST_LEASE).as_secs_f64();
    let arguments = arguments![org.0, now, by, limit as i64, LONGEST_GRACE.as_secs_f64()];
    let found = sqlx::query_with(SQL, arguments).fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| Ok(JobId(Columns::of(row).uuid()?))).collect()
}

/// Loads jobs that are leased to claims with a `request_id`, up to `limit` for each org.
pub(super) async fn load_all_held(
    connection: &mut PgConnection,
    orgs: &[OrgId],
    limit: usize,
) -> Result<Vec<Of<JobId>>, StoreError> {
    const SQL: &str = "/* load_all_held */ SELECT wanted.org_id, j.id FROM unnest($1::uuid[]) AS wanted (org_id) CROSS JOIN LATERAL (
            SELECT j.id FROM jobledger.job j WHERE j.org_id = wanted.org_id AND j.lease_request IS NOT NULL LIMIT $2) j";
    let orgs: Vec<_> = orgs.iter().map(|org| org.0).collect();
    let found =
        sqlx::query_with(SQL, arguments![orgs, limit as i64]).fetch_all(connection).await.map_err(store_error)?;
    let held = |row| {
        let mut columns = Columns::of(row);
        Ok((OrgId(columns.uuid()?), JobId(columns.uuid()?)))
    };
    found.iter().map(held).collect()
}

/// Loads how many jobs each of these types has: the counter, and the records that are not folded.
pub(super) async fn load_populations(
    connection: &mut PgConnection,
    org: OrgId,
    types: &BTreeSet<Arc<str>>,
) -> Result<HashMap<Arc<str>, i64>, StoreError> {
    const SQL: &str = "/* load_populations */ SELECT wanted.type, c.jobs + coalesce(added.jobs, 0)
        FROM unnest($2::text[]) AS wanted (type)
        CROSS JOIN LATERAL (
            SELECT c.queued + c.running + c.succeeded + c.failed + c.canceled + c.dead_letter AS jobs
            FROM jobledger.org_counter c WHERE c.org_id = $1 AND c.type = wanted.type OFFSET 0) c
        CROSS JOIN LATERAL (
            SELECT sum(counted.jobs::bigint)::bigint AS jobs
            FROM (SELECT h.n FROM jobledger.org_head h WHERE h.org_id = $1) head
            CROSS JOIN LATERAL (SELECT r.counts FROM jobledger.org_record r WHERE r.org_id = $1 AND r.n > head.n OFFSET 0) r
            CROSS JOIN LATERAL jsonb_array_elements_text(r.counts -> wanted.type) WITH ORDINALITY AS counted (jobs, place)
            WHERE counted.place <= $3) added";
    if types.is_empty() {
        return Ok(HashMap::new());
    }
    let types: Vec<_> = types.iter().map(|name| name.to_string()).collect();
    let query = sqlx::query_with(SQL, arguments![org.0, types, JobStatus::ALL.len() as i64]);
    let population = |row| {
        let mut columns = Columns::of(row);
        Ok((columns.text()?.into(), columns.long()?))
    };
    query.fetch_all(connection).await.map_err(store_error)?.iter().map(population).collect()
}

/// Loads ready jobs in claim order, a list for each element of `wanted`.
pub(super) async fn load_ready(
    connection: &mut PgConnection,
    wanted: &[Of<Short>],
) -> Result<Vec<Vec<ReadyJob>>, StoreError> {
    let mut found = vec![Vec::new(); wanted.len()];
    let (of_all, of_types): (Vec<_>, Vec<_>) =
        wanted.iter().enumerate().partition(|(_, (_, short))| *short.name == **ALL_TYPES);
    for (sql, wanted) in [(&LOAD_READY, of_types), (&LOAD_ALL_READY, of_all)] {
        let rows: Vec<_> = wanted.iter().map(|(_, wanted)| (*wanted).clone()).collect();
        for (n, job) in load_ready_of(connection, sql, &rows).await? {
            found[wanted[n].0].push(job);
        }
    }
    Ok(found)
}

async fn load_ready_of(
    connection: &mut PgConnection,
    sql: &'static str,
    wanted: &[Of<Short>],
) -> Result<Vec<(usize, ReadyJob)>, StoreError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let (orgs, names) = columns_of(wanted, |wanted| wanted.name.to_string());
    let (_, limits) = columns_of(wanted, |wanted| wanted.limit as i64);
    let (_, priorities) = columns_of(wanted, |wanted| wanted.from.map_or(i32::MAX, |from| from.priority.0));
    let (_, ready) = columns_of(wanted, |wanted| wanted.from.map(|from| from.ready_at));
    let (_, seqs) = columns_of(wanted, |wanted| wanted.from.map(|from| from.created_seq));
    let query = sqlx::query_with(AssertSqlSafe(sql), arguments![orgs, names, limits, priorities, ready, seqs]);
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    let job = |row| {
        let mut columns = Columns::of(row);
        let place = usize::try_from(columns.long()? - 1).ok().filter(|place| *place < wanted.len());
        Ok((place.ok_or_else(|| rows::damaged("place"))?, rows::ready_job(&mut columns)?))
    };
    found.iter().map(job).collect()
}

/// Loads jobs by id, without stage and progress.
pub(super) async fn load_rows(connection: &mut PgConnection, ids: &[Of<JobId>]) -> Result<Vec<Job>, StoreError> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let (orgs, ids) = columns_of(ids, |id| id.0);
    let query = sqlx::query_with(AssertSqlSafe(LOAD_ROWS.as_str()), arguments![orgs, ids]);
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| read_job(&mut Columns::of(row))).collect()
}

static LOAD_ROWS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_rows */ SELECT {}, NULL::text, NULL::integer FROM unnest($1::uuid[], $2::uuid[]) AS wanted (org_id, id)
        CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = wanted.org_id AND j.id = wanted.id OFFSET 0) j",
        job_columns("j")
    )
});

/// Selects ready jobs in the order of an index, from a position on. While anyone has an older snapshot, the index keeps the
/// entries of claimed jobs, and a claim that began at its front would walk through all of them. If no position is known,
/// `priority` is above all priorities.
fn load_ready_sql(name: &str, of_type: &str) -> String {
    let first = |condition: &str, order: &str| {
        format!(
            "(SELECT j.id, j.type, j.priority, j.ready_at, j.created_seq FROM jobledger.job j
              WHERE j.org_id = wanted.org_id {of_type} AND jobledger.is_ready(j.status, j.due_at) AND {condition}
              ORDER BY {order}j.ready_at, j.created_seq LIMIT wanted.most)"
        )
    };
    format!(
        "/* {name} */ WITH wanted (org_id, type, most, priority, ready_at, created_seq, n) AS (
            SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::integer[], $5::timestamptz[], $6::bigint[]) WITH ORDINALITY
        )
        SELECT wanted.n, j.id, j.type, j.priority, j.ready_at, j.created_seq
        FROM wanted CROSS JOIN LATERAL ({} UNION ALL {} LIMIT wanted.most) j",
        first(
            "j.priority = wanted.priority AND (j.ready_at, j.created_seq) >= (wanted.ready_at, wanted.created_seq)",
            ""
        ),
        first("j.priority < wanted.priority", "j.priority DESC, ")
    )
}

static LOAD_READY: LazyLock<String> = LazyLock::new(|| load_ready_sql("load_ready", "AND j.type = wanted.type"));
static LOAD_ALL_READY: LazyLock<String> = LazyLock::new(|| load_ready_sql("load_all_ready", ""));
