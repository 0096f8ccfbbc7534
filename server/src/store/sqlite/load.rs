//! What a batch loads before it is decided.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, LazyLock},
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Sqlite, SqliteConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};
use uuid::Uuid;

use super::{
    columns::{Columns, IS_READY, LAST_EVENT, job_columns, job_over, micros},
    error::store_error,
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
        job_type::OrgSettings,
        lease::LONGEST_LEASE,
        transition::LONGEST_GRACE,
    },
    store::{
        ClaimOrder, Differs, Head, HeldBy, Outdated, ReadyJob, RecordId, StoreError,
        changes::OUTDATED_AT_ONCE,
        image::{DIFFERS, read_job_over},
        job_columns::read_job,
        row_writes::Base,
        rows::{self, Columns as _},
        settings,
        state::{Extended, Lacks, OrgState},
        window::{ALL_TYPES, Short},
    },
};

/// The end of an org's log.
#[derive(Debug)]
pub(super) struct End {
    pub(super) head: Head,
    /// The log's last record.
    pub(super) record: RecordId,
    /// Those of the named types that exist.
    pub(super) types: Vec<String>,
    /// No row lacks an event or a lease extension up to here.
    pub(super) base: Base,
    /// The org's state as of `record`; `None` until it is needed.
    pub(super) state: Option<OrgState>,
}

impl Default for End {
    fn default() -> Self {
        Self { head: Head::EMPTY, record: RecordId::default(), types: Vec::new(), base: Base::default(), state: None }
    }
}

pub(super) const LOAD_HEADS: &str =
    "/* load_heads */ SELECT h.org_id, h.seq, h.floor_seq, h.recorded_at, h.types, h.ready_gen, h.jobs, h.bytes, h.org_seq, h.n, h.record,
        (SELECT json_group_array(c.type) FROM json_each(wanted.value) named
         CROSS JOIN org_counter c ON c.org_id = h.org_id AND c.type = named.value), h.base_seq, h.base_n
     FROM json_each($1) wanted CROSS JOIN org_head h ON h.org_id = unhex(wanted.key)";

/// The ends of some orgs' logs, each with those of the named types that exist. Orgs without a log are left out.
pub(super) async fn load_ends<'a>(
    connection: &mut SqliteConnection,
    orgs: impl IntoIterator<Item = (OrgId, &'a [Arc<str>])>,
) -> Result<HashMap<OrgId, End>, StoreError> {
    let wanted: BTreeMap<_, Vec<_>> =
        orgs.into_iter().map(|(org, types)| (hex(org.0), types.iter().map(|name| &**name).collect())).collect();
    let found = sqlx::query(LOAD_HEADS).bind(rows::json_text(&wanted)).fetch_all(connection).await;
    let end = |row: &SqliteRow| {
        let mut columns = Columns::of(row);
        let org = OrgId(columns.uuid()?);
        let (head, record) = rows::head(&mut columns)?;
        let types = serde_json::from_str(columns.text()?).map_err(|_| rows::damaged("type"))?;
        let base = Base { seq: columns.long()?, n: columns.long()? };
        Ok((org, End { head, record, types, base, state: None }))
    };
    found.map_err(store_error)?.iter().map(end).collect()
}

/// Jobs whose rows are behind. Of each: number and time of the record with its last extension (if that extension
/// counts), the first event that its row lacks (if any), and the job.
pub(super) static LOAD_UNFOLDED: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_unfolded */ SELECT found.n, x.written_at, b.seq, b.recorded_at, b.prev_status = 'queued',
            {DIFFERS}, {} FROM (
            SELECT job_id, max(n) AS n, said FROM (
                SELECT i.job_id, NULL AS n, NULL AS said FROM job_event i WHERE i.org_id = $1 AND i.seq > $2 AND i.image IS NOT NULL
                UNION ALL SELECT unhex(found.key), r.n, found.value FROM org_record r CROSS JOIN json_each(r.extensions) found
                WHERE r.org_id = $1 AND r.n > $3 AND r.extensions IS NOT NULL
            ) GROUP BY job_id) found
        CROSS JOIN job j ON j.org_id = $1 AND j.id = found.job_id
        {LAST_EVENT}
        LEFT JOIN job_event b ON b.org_id = j.org_id AND b.seq = (SELECT min(l.seq) FROM job_event l INDEXED BY idx_job_event_job
            WHERE l.org_id = j.org_id AND l.job_id = j.id AND l.seq > j.last_seq)
        LEFT JOIN org_record x ON x.org_id = $1 AND x.n = found.n AND x.seq >= e.seq
        WHERE e.next_status = 'running' AND (e.seq > j.last_seq OR x.n IS NOT NULL)",
        job_over("iif(x.n IS NOT NULL, found.said || '\"', NULL)")
    )
});

/// Loads an org's state: the jobs whose rows are behind.
pub(super) async fn load_unfolded(
    connection: &mut SqliteConnection,
    org: OrgId,
    base: Base,
) -> Result<OrgState, StoreError> {
    let query = sqlx::query(AssertSqlSafe(LOAD_UNFOLDED.as_str())).bind(org.0).bind(base.seq).bind(base.n);
    let mut state = OrgState::default();
    for row in &query.fetch_all(connection).await.map_err(store_error)? {
        let mut columns = Columns::of(row);
        let (n, at) = (columns.optional_long()?, columns.optional_time()?);
        let (seq, recorded_at) = (columns.optional_long()?, columns.optional_time()?);
        let lacks = Lacks::of(seq, recorded_at, columns.optional_flag()?);
        let differs = Differs::of_number(columns.optional_int()?);
        state.set(read_job_over(&mut columns)?, lacks, Extended::of(n, at), differs);
    }
    Ok(state)
}

/// CROSS JOIN keeps SQLite from scanning all jobs of an org for the wanted ones.
pub(super) static LOAD_JOBS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_jobs */ WITH wanted (org_id, id) AS (
            SELECT unhex(of_org.key), unhex(named.value)
            FROM json_each($1) of_org CROSS JOIN json_each(of_org.value) named
            UNION SELECT j.org_id, j.id FROM json_each($2) of_org CROSS JOIN json_each(of_org.value) named
            CROSS JOIN job j ON j.org_id = unhex(of_org.key) AND j.idempotency_key = named.value
        )
        SELECT {}, e.detail_json ->> '$.stage', e.detail_json ->> '$.progress', e.seq IS NOT NULL
        FROM wanted CROSS JOIN job j ON j.org_id = wanted.org_id AND j.id = wanted.id
        LEFT JOIN job_event e ON e.org_id = j.org_id AND e.seq = j.last_seq AND +e.job_id = j.id",
        job_columns("j")
    )
});

/// Jobs of some orgs, by id and by idempotency key. Returns each job once.
pub(super) async fn load_jobs(
    connection: &mut SqliteConnection,
    ids: &[(OrgId, Vec<JobId>)],
    keys: &[(OrgId, &[Arc<str>])],
) -> Result<Vec<Job>, StoreError> {
    let keys: BTreeMap<_, Vec<_>> =
        keys.iter().map(|(org, keys)| (hex(org.0), keys.iter().map(|key| &**key).collect())).collect();
    let query = sqlx::query(AssertSqlSafe(LOAD_JOBS.as_str())).bind(ids_by_org(ids)).bind(rows::json_text(&keys));
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| rows::job_of_log(&mut Columns::of(row))).collect()
}

/// How many types one statement covers. There are few sizes, so each text is prepared once.
const TYPES_AT_ONCE: [usize; 3] = [32, 4, 1];

/// SELECT of the ready jobs from a claim position on, in claim order. The parameters from `first` on are the position
/// (priority, ready time, `seq` of the first event), the limit, the org, and what else `of` names.
fn ready_from(name: &str, index: &str, of: &str, first: usize) -> String {
    let from = |condition: &str, order: &str| {
        format!(
            "/* {name} */ SELECT * FROM (SELECT org_id, id, type, priority, ready_at, created_seq FROM job INDEXED BY {index}
                WHERE org_id = ?{} {of} AND {IS_READY} AND {condition} ORDER BY {order}ready_at, created_seq LIMIT +?{})",
            first + 4,
            first + 3
        )
    };
    let [priority, at, seq] = [first, first + 1, first + 2];
    let same = from(&format!("priority = ?{priority} AND (ready_at, created_seq) >= (?{at}, ?{seq})"), "");
    let lower = from(&format!("priority < ?{priority}"), "priority DESC, ");
    format!("{same} UNION ALL {lower}")
}

/// Parameters of each type in [`load_ready_of`].
const READY_PARAMETERS: usize = 6;

/// SELECT of the first ready jobs of this many types.
pub(super) fn load_ready_of(types: usize) -> String {
    let of_type = |n| {
        let first = READY_PARAMETERS * n + 1;
        ready_from("load_ready_of", "idx_job_ready", &format!("AND type = ?{}", first + 5), first)
    };
    (0..types).map(of_type).collect::<Vec<_>>().join(" UNION ALL ")
}

pub(super) static LOAD_ALL_READY: LazyLock<String> =
    LazyLock::new(|| ready_from("load_all_ready", "idx_job_ready_all", "", 1));

/// Binds the position to begin at, the limit and the org.
fn bind_from<'q>(
    query: Query<'q, Sqlite, SqliteArguments>,
    from: Option<ClaimOrder>,
    limit: usize,
    org: OrgId,
) -> Query<'q, Sqlite, SqliteArguments> {
    // `i32::MAX` is above every priority, so the search begins at the first job.
    let query =
        query.bind(from.map_or(i32::MAX, |from| from.priority.0)).bind(from.map_or(0, |from| micros(from.ready_at)));
    query.bind(from.map_or(0, |from| from.created_seq)).bind(limit as i64).bind(org.0)
}

/// What a ready window of an org lacks.
pub(super) struct Wanted {
    pub(super) org: OrgId,
    pub(super) short: Short,
}

/// Ready jobs in claim order, for each element of `wanted`.
pub(super) async fn load_ready(
    connection: &mut SqliteConnection,
    wanted: &[Wanted],
) -> Result<Vec<Vec<ReadyJob>>, StoreError> {
    let job = |row: &SqliteRow| {
        let mut columns = Columns::of(row);
        Ok::<_, StoreError>((OrgId(columns.uuid()?), rows::ready_job(&mut columns)?))
    };
    let (of_all, of_types): (Vec<_>, Vec<_>) =
        wanted.iter().enumerate().partition(|(_, wanted)| *wanted.short.name == **ALL_TYPES);
    let mut found: Vec<_> = wanted.iter().map(|_| Vec::new()).collect();
    let mut of_types = &of_types[..];
    for size in TYPES_AT_ONCE {
        while of_types.len() >= size {
            let (chunk, rest) = of_types.split_at(size);
            of_types = rest;
            let query = sqlx::query(AssertSqlSafe(load_ready_of(size)));
            let query = chunk.iter().fold(query, |query, (_, Wanted { org, short })| {
                bind_from(query, short.from, short.limit, *org).bind(&*short.name)
            });
            let place_of: HashMap<_, _> =
                chunk.iter().map(|(place, wanted)| ((wanted.org, &*wanted.short.name), *place)).collect();
            for row in &query.fetch_all(&mut *connection).await.map_err(store_error)? {
                let (org, job) = job(row)?;
                if let Some(place) = place_of.get(&(org, &*job.job_type)) {
                    found[*place].push(job);
                }
            }
        }
    }
    for (place, Wanted { org, short }) in of_all {
        let query = bind_from(sqlx::query(AssertSqlSafe(LOAD_ALL_READY.as_str())), short.from, short.limit, *org);
        for row in &query.fetch_all(&mut *connection).await.map_err(store_error)? {
            found[place].push(job(row)?.1);
        }
    }
    // The two halves of the UNION each have the limit, so together they may exceed it.
    for (found, wanted) in found.iter_mut().zip(wanted) {
        found.truncate(wanted.short.limit);
    }
    Ok(found)
}

pub(super) static LOAD_ROWS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_rows */ SELECT {}, NULL, NULL FROM json_each($1) of_org CROSS JOIN json_each(of_org.value) wanted
        CROSS JOIN job j ON j.org_id = unhex(of_org.key) AND j.id = unhex(wanted.value)",
        job_columns("j")
    )
});

/// Jobs of some orgs by id, without stage and progress.
pub(super) async fn load_rows(
    connection: &mut SqliteConnection,
    ids: &[(OrgId, Vec<JobId>)],
) -> Result<Vec<Job>, StoreError> {
    let query = sqlx::query(AssertSqlSafe(LOAD_ROWS.as_str())).bind(ids_by_org(ids));
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| read_job(&mut Columns::of(row))).collect()
}

pub(super) const LOAD_HELD: &str = "/* load_held */ SELECT id FROM job INDEXED BY idx_job_lease_request
     WHERE org_id = $1 AND lease_request = $2 AND lease_worker = $3 LIMIT +$4";

/// Jobs under the lease of an earlier claim with the same worker and `request_id`.
pub(super) async fn load_held(
    connection: &mut SqliteConnection,
    org: OrgId,
    held: &HeldBy,
) -> Result<Vec<JobId>, StoreError> {
    let query = sqlx::query_scalar::<_, Uuid>(LOAD_HELD).bind(org.0).bind(&*held.request).bind(&*held.worker);
    let found = query.bind(held.limit as i64).fetch_all(connection).await.map_err(store_error)?;
    Ok(found.into_iter().map(JobId).collect())
}

pub(super) const LOAD_ALL_HELD: &str = "/* load_all_held */ SELECT id FROM job INDEXED BY idx_job_lease_request
     WHERE org_id = $1 AND lease_request IS NOT NULL LIMIT +$2";

/// Jobs whose claims have a `request_id`, and so may be repeated.
pub(super) async fn load_all_held(
    connection: &mut SqliteConnection,
    org: OrgId,
    limit: usize,
) -> Result<Vec<JobId>, StoreError> {
    let query = sqlx::query_scalar::<_, Uuid>(LOAD_ALL_HELD).bind(org.0).bind(limit as i64);
    Ok(query.fetch_all(connection).await.map_err(store_error)?.into_iter().map(JobId).collect())
}

pub(super) const LOAD_DUE: &str = "/* load_due */ SELECT id, due_at FROM job
     WHERE org_id = $1 AND due_at IS NOT NULL AND due_at <= $2 ORDER BY due_at LIMIT +$3";
pub(super) const LOAD_NEXT_DUE: &str = "/* load_next_due */ SELECT min(due_at) FROM job
     WHERE org_id = $1 AND due_at IS NOT NULL AND due_at > $2";

/// The due jobs, the earliest first, and when the next one is due.
pub(super) async fn load_due(
    connection: &mut SqliteConnection,
    org: OrgId,
    limit: usize,
    now: Time,
    state: &OrgState,
) -> Result<(Vec<JobId>, Option<Time>), StoreError> {
    let query = sqlx::query(LOAD_DUE).bind(org.0).bind(micros(now)).bind((limit + state.len()) as i64);
    let found = query.fetch_all(&mut *connection).await.map_err(store_error)?;
    let due = |row| {
        let mut columns = Columns::of(row);
        let id = JobId(columns.uuid()?);
        Ok((columns.time()?, id))
    };
    let due = found.iter().map(due).collect::<Result<_, StoreError>>()?;
    let query = sqlx::query(LOAD_NEXT_DUE).bind(org.0).bind(micros(now));
    let next = query.fetch_one(connection).await.map_err(store_error)?;
    Ok(state.due(due, Columns::of(&next).optional_time()?, limit, now))
}

pub(super) const LOAD_MISDATED: &str =
    "/* load_misdated */ SELECT id FROM job WHERE org_id = $1 AND due_at IS NOT NULL AND (
        status = 'running' AND lease_expires_at > $2 + lease_granted AND (updated_at > $2 OR lease_expires_at > $3)
        OR status = 'running' AND due_at > $5 + max($2, min(coalesce(lease_expires_at, 9223372036854775807),
            coalesce(min(attempt_started_at, $2) + run_timeout, 9223372036854775807)))
        OR status = 'queued' AND attempt > 0 AND updated_at > $2 AND due_at > $2 + scheduled_at - updated_at
     ) LIMIT +$4";

pub(super) async fn load_misdated(
    connection: &mut SqliteConnection,
    org: OrgId,
    limit: usize,
    by: Duration,
    now: Time,
) -> Result<Vec<JobId>, StoreError> {
    let query = sqlx::query_scalar::<_, Uuid>(LOAD_MISDATED).bind(org.0).bind(micros(now));
    let query =
        query.bind(micros(now + by.min(LONGEST_LEASE))).bind(limit as i64).bind(LONGEST_GRACE.as_micros() as i64);
    Ok(query.fetch_all(connection).await.map_err(store_error)?.into_iter().map(JobId).collect())
}

/// An id in hexadecimal digits, for `unhex(…)`.
pub(super) fn hex(id: Uuid) -> String {
    id.simple().to_string()
}

/// Ids as a JSON array of hexadecimal digits, for `unhex(value) FROM json_each(…)`.
pub(super) fn ids_json<'a>(ids: impl IntoIterator<Item = &'a JobId>) -> String {
    rows::json_text(&ids.into_iter().map(|id| hex(id.0)).collect::<Vec<_>>())
}

/// A JSON object from org to such an array of ids. Each org must occur once.
fn ids_by_org(ids: &[(OrgId, Vec<JobId>)]) -> String {
    let ids: BTreeMap<_, Vec<_>> =
        ids.iter().map(|(org, ids)| (hex(org.0), ids.iter().map(|id| hex(id.0)).collect())).collect();
    rows::json_text(&ids)
}

pub(super) const LOAD_SETTINGS: &str =
    "/* load_settings */ SELECT type, description, pause, changed_seq FROM org_type WHERE org_id = $1";

/// The settings of an org's types, as of its last org event.
pub(super) async fn load_settings(
    connection: &mut SqliteConnection,
    org: OrgId,
    as_of: i64,
) -> Result<Arc<OrgSettings>, StoreError> {
    let found = sqlx::query(LOAD_SETTINGS).bind(org.0).fetch_all(connection).await.map_err(store_error)?;
    let mut settings = OrgSettings { as_of, ..OrgSettings::default() };
    found.iter().try_for_each(|row| settings::read(&mut Columns::of(row), &mut settings))?;
    Ok(Arc::new(settings))
}

/// One search of the index for each type.
pub(super) static LOAD_READY_TYPES: LazyLock<String> = LazyLock::new(|| {
    let next = |after: &str| {
        format!(
            "(SELECT min(type) FROM job INDEXED BY idx_job_ready WHERE org_id = $1 AND type > {after} AND {IS_READY})"
        )
    };
    format!(
        "/* load_ready_types */ WITH RECURSIVE found (type) AS (
            SELECT {} UNION ALL SELECT {} FROM found WHERE found.type IS NOT NULL
        ) SELECT type FROM found WHERE type IS NOT NULL",
        next("''"),
        next("found.type")
    )
});

/// The types with rows that say that they are ready.
pub(super) async fn load_ready_types(
    connection: &mut SqliteConnection,
    org: OrgId,
) -> Result<Vec<Arc<str>>, StoreError> {
    let query = sqlx::query_scalar::<_, String>(AssertSqlSafe(LOAD_READY_TYPES.as_str())).bind(org.0);
    Ok(query.fetch_all(connection).await.map_err(store_error)?.into_iter().map(Arc::from).collect())
}

/// The org events before the floor of the log, the oldest ones: `seq` of the last, and bytes of all.
pub(super) const LOAD_OUTDATED: &str = "/* load_outdated */ SELECT max(seq), coalesce(sum(bytes), 0) FROM (
    SELECT seq, bytes FROM org_event WHERE org_id = $1 AND seq < $2 ORDER BY seq LIMIT +$3) found";

pub(super) async fn load_outdated(
    connection: &mut SqliteConnection,
    org: OrgId,
    head: &Head,
) -> Result<Option<Outdated>, StoreError> {
    if head.org_seq == 0 {
        return Ok(None);
    }
    let query = sqlx::query(LOAD_OUTDATED).bind(org.0).bind(head.floor).bind(OUTDATED_AT_ONCE);
    let row = query.fetch_one(connection).await.map_err(store_error)?;
    let mut columns = Columns::of(&row);
    let (last, bytes) = (columns.optional_long()?, columns.long()?);
    Ok(last.map(|last| Outdated { last, bytes }))
}

pub(super) const LOAD_POPULATIONS: &str =
    "/* load_populations */ SELECT type, queued + running + succeeded + failed + canceled + dead_letter
     FROM org_counter WHERE org_id = $1 AND type IN (SELECT value FROM json_each($2))";

/// The number of jobs of each of these types.
pub(super) async fn load_populations(
    connection: &mut SqliteConnection,
    org: OrgId,
    types: &BTreeSet<Arc<str>>,
) -> Result<HashMap<Arc<str>, i64>, StoreError> {
    if types.is_empty() {
        return Ok(HashMap::new());
    }
    let names: Vec<_> = types.iter().map(|name| &**name).collect();
    let query = sqlx::query_as::<_, (String, i64)>(LOAD_POPULATIONS).bind(org.0).bind(rows::json_text(&names));
    let found = query.fetch_all(connection).await.map_err(store_error)?;
    Ok(found.into_iter().map(|(name, jobs)| (name.into(), jobs)).collect())
}
