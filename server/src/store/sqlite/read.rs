//! Reads for callers. Each is a single statement outside any transaction, and so one snapshot.

use std::sync::{Arc, LazyLock};

use sqlx::{AssertSqlSafe, SqlitePool};
use tokio_stream::StreamExt;
use uuid::Uuid;

use super::{
    columns::{Columns, IS_EXTENSION_FAR, JOB_OVER, LAST_EVENT, NEAR_EXTENSION, job_over, micros},
    error::store_error,
    load::{hex, ids_json},
    write::MAX_SMALL_RESULT,
};
use crate::{
    domain::{
        clock::Clock,
        id::{JobId, LogId, OrgId},
        job::{Job, JobContents, JobRecord},
        org_event::{LogEvent, OrgEvent},
        status::JobStatus,
    },
    store::{
        DueWork, EventPage, EventQuery, FoundJob, LARGE_JOB, LONGEST_PAUSE, LedgerInfo, Reach, SCAN_WINDOW, StoreError,
        extension::lease_text,
        org_events::{self, ORG_EVENT_COLUMNS},
        rows::{self, Columns as _, EVENT_COLUMNS},
    },
};

/// Joins the result of a job `j`. A running job has none, even if its row, which is behind, names one.
const RESULT: &str =
    "LEFT JOIN job_event r ON r.org_id = j.org_id AND r.seq = iif(e.seq > j.last_seq, NULL, j.result_seq)
    LEFT JOIN job_result x ON x.org_id = r.org_id AND x.job_id = r.job_id AND x.seq = r.seq";

/// The result, in the form of an event's detail.
const RESULT_DETAIL: &str = r#"iif(x.result IS NULL, r.detail_json, '{"result":' || x.result || '}')"#;

/// Joins the payload of a job `j`: with its first event, or in a row of its own.
const PAYLOAD: &str =
    "LEFT JOIN job_event c ON j.payload_recorded_at IS NOT NULL AND c.org_id = j.org_id AND c.seq = j.created_seq
    LEFT JOIN job_payload p ON j.payload_recorded_at IS NULL AND p.org_id = j.org_id AND p.job_id = j.id";

static JOB: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* job */ SELECT {}, coalesce(c.payload, p.payload), {RESULT_DETAIL} FROM job j {LAST_EVENT} {RESULT} {PAYLOAD}
        WHERE j.org_id = $1 AND j.id = $2",
        *JOB_OVER
    )
});

pub(super) async fn job(pool: &SqlitePool, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError> {
    let query = sqlx::query(AssertSqlSafe(JOB.as_str())).bind(org.0).bind(id.0);
    let row = query.fetch_optional(pool).await.map_err(store_error)?;
    row.map(|row| rows::job_record(&mut Columns::of(&row))).transpose()
}

const IS_LARGE: &str = "j.payload_bytes + coalesce(octet_length(x.result), octet_length(r.detail_json), 0) > $2";

/// Each found job with its position in the argument.
static JOBS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* jobs */ SELECT w.key, {IS_LARGE} OR {}, {}, iif({IS_LARGE}, NULL, coalesce(c.payload, p.payload)),
            iif({IS_LARGE}, NULL, {RESULT_DETAIL})
        FROM json_each($1) w
        CROSS JOIN job j ON j.org_id = unhex(substr(w.value, 1, 32)) AND j.id = unhex(substr(w.value, 33))
        {LAST_EVENT} {RESULT} {PAYLOAD}",
        *IS_EXTENSION_FAR,
        job_over(&NEAR_EXTENSION)
    )
});

pub(super) async fn jobs(pool: &SqlitePool, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError> {
    let wanted: Vec<_> = names.iter().map(|(org, id)| format!("{}{}", org.0.simple(), id.0.simple())).collect();
    let query = sqlx::query(AssertSqlSafe(JOBS.as_str())).bind(rows::json_text(&wanted)).bind(LARGE_JOB);
    let found = query.fetch_all(pool).await.map_err(store_error)?;
    rows::found_jobs(names.len(), found.iter().map(Columns::of))
}

/// The positions of the wanted jobs whose last event and lease are unchanged. A wanted text has the org, the job,
/// whether it is leased (with the same last event, it still is), the last event, and the lease ([`lease_text`]). The
/// lease is compared with the last extension, else with the row if that has the last event. A job whose extension
/// takes long to find counts as changed.
static UNCHANGED: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* unchanged */ SELECT json_group_array(w.key) FROM json_each($1) w
        CROSS JOIN job j ON j.org_id = unhex(substr(w.value, 1, 32)) AND j.id = unhex(substr(w.value, 33, 32))
        {LAST_EVENT}
        WHERE CASE WHEN e.seq > j.last_seq AND {ext} IS NULL THEN instr(substr(w.value, 66), e.seq || ',' || e.recorded_at || ',') = 1
            ELSE instr(e.seq || ',' || e.recorded_at || ',' || coalesce({ext}, {LEASE_OF_ROW}), substr(w.value, 66)) = 1 END",
        ext = format_args!("iif(substr(w.value, 65, 1) = '1', {}, NULL)", *NEAR_EXTENSION)
    )
});

/// The [`lease_text`] of the row of a job `j`.
const LEASE_OF_ROW: &str = "iif(j.due_at = j.lease_expires_at AND j.lease_confirmed, j.lease_expires_at,
    ifnull(j.lease_expires_at, '') || ',' || ifnull(j.due_at, '') || ',' || j.lease_confirmed) || '\"'";

pub(super) async fn unchanged(pool: &SqlitePool, jobs: &[&Job]) -> Result<Vec<bool>, StoreError> {
    let name = |job: &&Job| {
        let (org, id, recorded_at) = (hex(job.org_id.0), hex(job.id.0), micros(job.last_recorded_at));
        format!("{org}{id}{}{},{recorded_at},{}", u8::from(job.lease.is_some()), job.last_seq, lease_text(job))
    };
    let wanted: Vec<_> = jobs.iter().map(name).collect();
    let places: String = sqlx::query_scalar(AssertSqlSafe(UNCHANGED.as_str()))
        .bind(rows::json_text(&wanted))
        .fetch_one(pool)
        .await
        .map_err(store_error)?;
    let places: Vec<usize> = serde_json::from_str(&places).map_err(|_| rows::damaged("place"))?;
    rows::at(jobs.len(), places)
}

/// The outer join returns head and floor of the same snapshot even if no event matches.
fn events_sql(name: &str, index: &str, matching: &str) -> String {
    let columns = EVENT_COLUMNS.map(|column| format!("e.{column}")).join(", ");
    format!(
        "/* {name} */ SELECT h.seq, h.floor_seq, h.org_seq, (SELECT status FROM job WHERE org_id = $1 AND id = $4), {columns}, x.result
        FROM org_head h LEFT JOIN job_event e {index}
            ON e.org_id = h.org_id AND e.seq > $2 AND e.seq <= $3 {matching}
            AND ($5 IS NULL OR e.job_type IN (SELECT value FROM json_each($5)))
            AND ($6 IS NULL OR e.next_status IN (SELECT value FROM json_each($6))
                OR $7 AND e.prev_status IN (SELECT value FROM json_each($6)))
            AND ($8 IS NULL OR e.kind = 'erased' OR e.labels IS NOT NULL AND NOT EXISTS (
                SELECT 1 FROM json_each($8) wanted
                WHERE NOT EXISTS (SELECT 1 FROM json_each(e.labels) found WHERE found.key = wanted.key AND found.value = wanted.value))
                OR e.kind = 'edited' AND e.detail_json -> '$.edit.before.labels' IS NOT NULL AND NOT EXISTS (
                SELECT 1 FROM json_each($8) wanted WHERE NOT EXISTS (SELECT 1 FROM json_each(e.detail_json -> '$.edit.before.labels') found
                    WHERE found.key = wanted.key AND found.value = wanted.value)))
        LEFT JOIN job_result x ON e.bytes > {MAX_SMALL_RESULT} AND x.org_id = e.org_id AND x.job_id = e.job_id AND x.seq = e.seq
        WHERE h.org_id = $1 ORDER BY e.seq LIMIT +$9"
    )
}

static ORG_EVENTS: LazyLock<String> = LazyLock::new(|| events_sql("org_events", "", ""));

/// Without INDEXED BY, SQLite would walk the whole log by its primary key.
static JOB_EVENTS: LazyLock<String> =
    LazyLock::new(|| events_sql("job_events", "INDEXED BY idx_job_event_job", "AND e.job_id = $4"));

pub(super) async fn events(pool: &SqlitePool, org: OrgId, query: &EventQuery) -> Result<EventPage, StoreError> {
    let filter = &query.filter;
    let (sql, last) = match filter.job {
        // The events of one job have their own index, so the scan needs no window.
        Some(_) => (&*JOB_EVENTS, i64::MAX),
        None => (&*ORG_EVENTS, query.after.saturating_add(SCAN_WINDOW)),
    };
    let json_unless_empty = |names: Vec<&str>| (!names.is_empty()).then(|| rows::json_text(&names));
    let mut found = sqlx::query(AssertSqlSafe(sql.as_str()))
        .bind(org.0)
        .bind(query.after)
        .bind(last)
        .bind(filter.job.map(|job| job.0))
        .bind(json_unless_empty(filter.types.iter().map(String::as_str).collect()))
        .bind(json_unless_empty(filter.statuses.iter().copied().map(JobStatus::as_str).collect()))
        .bind(filter.is_leaving)
        .bind(rows::labels_json(&filter.labels))
        .bind(i64::try_from(query.max_events).unwrap_or(i64::MAX))
        .fetch(pool);

    let mut page = EventPage { events: Vec::new(), through: 0, head: 0, floor: 1, job_status: None };
    let mut bytes = 0;
    let (mut is_cut, mut org_seq) = (false, 0);
    while let Some(row) = found.next().await.transpose().map_err(store_error)? {
        let mut columns = Columns::of(&row);
        page.head = columns.long()?;
        page.floor = columns.long()?;
        org_seq = columns.long()?;
        page.job_status = columns.optional_text()?.map(rows::status).transpose()?;
        if columns.peek_is_null()? {
            break;
        }
        let event = rows::event(&mut columns)?;
        bytes += event.weight();
        page.events.push(LogEvent::Job(Arc::new(event)));
        is_cut = page.events.len() >= query.max_events || bytes > query.max_bytes;
        if is_cut {
            break;
        }
    }
    drop(found);
    let page = page.ending_at(last, is_cut);
    if !filter.has_org_events || org_seq <= query.after {
        return Ok(page);
    }
    // A later snapshot has the same events up to the head of the first one, unless retention removed some.
    let of_org = org_events(pool, org, query.after, page.through).await?;
    Ok(page.with_org_events(of_org, query))
}

pub(super) async fn org_events(
    pool: &SqlitePool,
    org: OrgId,
    after: i64,
    last: i64,
) -> Result<Vec<Arc<OrgEvent>>, StoreError> {
    let found = sqlx::query(AssertSqlSafe(EVENTS_OF_ORG.as_str())).bind(org.0).bind(after).bind(last);
    let found = found.fetch_all(pool).await.map_err(store_error)?;
    found.iter().map(|row| org_events::read(&mut Columns::of(row))).collect()
}

/// A page spans a bounded number of `seq`s, so the number of these events needs no other bound.
static EVENTS_OF_ORG: LazyLock<String> = LazyLock::new(|| {
    let columns = ORG_EVENT_COLUMNS.join(", ");
    format!(
        "/* events_of_org */ SELECT {columns} FROM org_event WHERE org_id = $1 AND seq > $2 AND seq <= $3 ORDER BY seq"
    )
});

static CONTENTS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* contents */ SELECT j.id, coalesce(c.payload, p.payload), {RESULT_DETAIL}
        FROM json_each($2) wanted CROSS JOIN job j ON j.org_id = $1 AND j.id = unhex(wanted.value)
        {LAST_EVENT} {RESULT} {PAYLOAD}"
    )
});

pub(super) async fn contents(
    pool: &SqlitePool,
    org: OrgId,
    ids: &[JobId],
) -> Result<Vec<(JobId, JobContents)>, StoreError> {
    let query = sqlx::query(AssertSqlSafe(CONTENTS.as_str())).bind(org.0).bind(ids_json(ids));
    let mut found = query.fetch(pool);
    let mut contents = Vec::with_capacity(ids.len());
    while let Some(row) = found.next().await.transpose().map_err(store_error)? {
        let mut columns = Columns::of(&row);
        contents.push((JobId(columns.uuid()?), rows::contents(&mut columns)?));
    }
    Ok(contents)
}

pub(super) async fn reaches(pool: &SqlitePool, orgs: &[OrgId]) -> Result<Vec<(OrgId, Reach)>, StoreError> {
    const REACHES: &str = "/* reaches */ SELECT org_id, seq, ready_gen FROM org_head
         WHERE org_id IN (SELECT unhex(value) FROM json_each($1))";
    let ids: Vec<_> = orgs.iter().map(|org| org.0.simple().to_string()).collect();
    let found: Vec<(Uuid, i64, i64)> =
        sqlx::query_as(REACHES).bind(rows::json_text(&ids)).fetch_all(pool).await.map_err(store_error)?;
    Ok(found.into_iter().map(|(org, seq, ready_gen)| (OrgId(org), Reach { seq, ready_gen })).collect())
}

pub(super) async fn about(pool: &SqlitePool, clock: &dyn Clock) -> Result<LedgerInfo, StoreError> {
    let sql = "/* about */ SELECT log_id, retention_paused_until, credentials FROM ledger";
    let row = sqlx::query(sql).fetch_one(pool).await.map_err(store_error)?;
    let mut columns = Columns::of(&row);
    let log_id = LogId(columns.uuid()?);
    let now = clock.now();
    let is_retention_paused = (micros(now) + 1..=micros(now + LONGEST_PAUSE)).contains(&columns.long()?);
    Ok(LedgerInfo { log_id, is_retention_paused, credentials: columns.long()? })
}

pub(super) async fn orgs(pool: &SqlitePool, after: Option<OrgId>, limit: usize) -> Result<Vec<OrgId>, StoreError> {
    const ORGS: &str =
        "/* orgs */ SELECT org_id FROM org_due WHERE $1 IS NULL OR org_id > $1 ORDER BY org_id LIMIT +$2";
    let query = sqlx::query_scalar(ORGS).bind(after.map(|org| org.0)).bind(limit as i64);
    let found: Vec<Uuid> = query.fetch_all(pool).await.map_err(store_error)?;
    Ok(found.into_iter().map(OrgId).collect())
}

/// Orgs with due work. They need not be reserved for this server: no other one has the file.
pub(super) async fn due(
    pool: &SqlitePool,
    clock: &dyn Clock,
    what: DueWork,
    limit: usize,
) -> Result<Vec<OrgId>, StoreError> {
    let sql = match what {
        DueWork::Jobs => {
            "/* due_jobs */ SELECT org_id FROM org_due WHERE work_due_at <= $1 ORDER BY work_due_at LIMIT +$2"
        }
        DueWork::Retention => {
            "/* due_retention */ SELECT org_id FROM org_due WHERE next_due_at <= $1 ORDER BY next_due_at LIMIT +$2"
        }
    };
    let query = sqlx::query_scalar(sql).bind(micros(clock.now())).bind(limit as i64);
    let found: Vec<Uuid> = query.fetch_all(pool).await.map_err(store_error)?;
    Ok(found.into_iter().map(OrgId).collect())
}

#[cfg(test)]
mod tests {
    use sqlx::{ConnectOptions as _, Row as _, SqliteConnection, sqlite::SqliteConnectOptions};

    use super::*;
    use crate::store::sqlite::{audit, expired, heads, load, migrations, series, statistics};

    /// The query plan of a statement, one line a step.
    async fn plan(connection: &mut SqliteConnection, sql: &str) -> Vec<String> {
        let explain = format!("EXPLAIN QUERY PLAN {sql}");
        let steps = sqlx::query(AssertSqlSafe(explain)).fetch_all(connection).await.unwrap();
        steps.iter().map(|step| step.get::<String, _>("detail")).collect()
    }

    #[tokio::test]
    async fn no_statement_walks_a_table_or_sorts_events() {
        let folder = tempfile::TempDir::new().unwrap();
        let options = SqliteConnectOptions::new().filename(folder.path().join("x.db")).create_if_missing(true);
        let mut connection = options.connect().await.unwrap();
        migrations::prepare(&mut connection, true).await.unwrap();
        let statements = [
            &**JOB,
            &**JOBS,
            &**UNCHANGED,
            &**CONTENTS,
            &**ORG_EVENTS,
            &**JOB_EVENTS,
            &**EVENTS_OF_ORG,
            &**statistics::STATISTICS,
            &**audit::SERIES,
            &**audit::MISCOUNTED,
            audit::EARLY_ROWS,
            audit::COUNT_REMAINING,
            &**audit::HISTORIES,
            expired::LOAD_EXPIRED,
            expired::LOAD_NEXT_EXPIRY,
            expired::LOAD_HISTORIES,
            expired::LOAD_SIZES,
            expired::LOAD_SLICE,
            &**load::LOAD_JOBS,
            &**load::LOAD_ROWS,
            &**load::LOAD_UNFOLDED,
            &load::load_ready_of(2),
            &**load::LOAD_ALL_READY,
            load::LOAD_HELD,
            &**load::LOAD_READY_TYPES,
            load::LOAD_SETTINGS,
            load::LOAD_OUTDATED,
            load::LOAD_DUE,
            load::LOAD_NEXT_DUE,
            load::LOAD_MISDATED,
            load::LOAD_HEADS,
            heads::DUE_AT,
            heads::DUE_BY,
            series::DURATIONS,
        ];
        for sql in statements {
            let plan = plan(&mut connection, sql).await;
            for step in &plan {
                let is_small = ["VIRTUAL TABLE", "wanted", "found", "near", "CONSTANT", "(subquery"]
                    .iter()
                    .any(|name| step.contains(name));
                let walks = step.starts_with("SCAN") && !is_small;
                assert!(!walks, "{sql}\n{plan:#?}");
                assert!(!step.contains("ORDER BY"), "{sql}\n{plan:#?}");
            }
        }
        let of_job = plan(&mut connection, &JOB_EVENTS).await;
        let by_job = "INDEX idx_job_event_job (org_id=? AND job_id=? AND seq>? AND seq<?)";
        assert!(of_job.iter().any(|step| step.contains(by_job)), "{of_job:#?}");
    }
}
