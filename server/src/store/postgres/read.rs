//! Single statements outside transactions, mostly reads. A function that reads an org first names it to row-level security.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use chrono::TimeDelta;
use uuid::Uuid;

use super::{
    columns::{Columns, job_over},
    connections::{Connections, arguments},
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, LogId, OrgId},
        job::{Job, JobContents, JobRecord},
        org_event::{LogEvent, OrgEvent},
        status::JobStatus,
    },
    store::{
        DueWork, EventPage, EventQuery, FoundJob, LARGE_JOB, LONGEST_PAUSE, LedgerInfo, Reach, SCAN_WINDOW, StoreError,
        extension::lease_text,
        migrations,
        org_events::{self, ORG_EVENT_COLUMNS},
        rows::{self, Columns as _, EVENT_COLUMNS},
    },
};

static JOB: LazyLock<String> = LazyLock::new(|| {
    format!("/* job */ SELECT {}, r.payload, r.result FROM jobledger.read_job($1, $2) r", job_over("r"))
});

pub(super) async fn job(readers: &Arc<Connections>, org: OrgId, id: JobId) -> Result<Option<JobRecord>, StoreError> {
    let found = readers.fetch(JOB.as_str(), arguments![org.0, id.0]).await?;
    found.first().map(|row| rows::job_record(&mut Columns::of(row))).transpose()
}

static JOBS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* jobs */ SELECT r.n, r.is_large, {}, r.payload, r.result FROM jobledger.read_jobs($1, $2, $3, $4) r",
        job_over("r")
    )
});

/// The wanted items by org: a function processes one org after another.
struct ByOrg {
    /// The positions of the items in the request, grouped by org.
    places: Vec<usize>,
    orgs: Vec<Uuid>,
    /// How many positions belong to each org and the orgs before it.
    ends: Vec<i32>,
}

impl ByOrg {
    fn of(wanted: usize, org: impl Fn(usize) -> OrgId) -> Self {
        let mut places: Vec<_> = (0..wanted).collect();
        places.sort_by_key(|place| org(*place));
        let (mut orgs, mut ends) = (Vec::new(), Vec::new());
        for (n, place) in places.iter().enumerate() {
            if n == 0 || org(places[n - 1]) != org(*place) {
                orgs.push(org(*place).0);
                ends.push(0);
            }
            if let Some(end) = ends.last_mut() {
                *end = n as i32 + 1;
            }
        }
        Self { places, orgs, ends }
    }
}

pub(super) async fn jobs(readers: &Arc<Connections>, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError> {
    let ByOrg { places, orgs, ends } = ByOrg::of(names.len(), |n| names[n].0);
    let ids: Vec<_> = places.iter().map(|place| names[*place].1.0).collect();
    let found = readers.fetch(JOBS.as_str(), arguments![orgs, ends, ids, LARGE_JOB]).await?;
    let mut sorted = rows::found_jobs(names.len(), found.iter().map(Columns::of))?;
    let mut found = vec![FoundJob::Nothing; names.len()];
    for (n, place) in places.into_iter().enumerate() {
        found[place] = std::mem::take(&mut sorted[n]);
    }
    Ok(found)
}

pub(super) async fn unchanged(readers: &Arc<Connections>, jobs: &[&Job]) -> Result<Vec<bool>, StoreError> {
    let ByOrg { places, orgs, ends } = ByOrg::of(jobs.len(), |n| jobs[n].org_id);
    let in_order: Vec<_> = places.iter().map(|place| jobs[*place]).collect();
    let column = |value: fn(&Job) -> Option<Time>| in_order.iter().map(|job| value(job)).collect::<Vec<_>>();
    let (expire, due) = (column(|job| job.lease.as_ref().map(|lease| lease.expires_at)), column(|job| job.due_at));
    let is_confirmed = |job: &&Job| job.lease.as_ref().is_some_and(|lease| lease.is_confirmed);
    let confirmed: Vec<_> = in_order.iter().map(is_confirmed).collect();
    let leases: Vec<_> = in_order.iter().map(|job| lease_text(job)).collect();
    let ids: Vec<_> = in_order.iter().map(|job| job.id.0).collect();
    let (seqs, recorded): (Vec<_>, Vec<_>) = in_order.iter().map(|job| (job.last_seq, job.last_recorded_at)).unzip();
    let sql = "/* unchanged */ SELECT n FROM jobledger.unchanged_jobs($1, $2, $3, $4, $5, $6, $7, $8, $9) n";
    let found = readers.fetch(sql, arguments![orgs, ends, ids, seqs, recorded, expire, confirmed, due, leases]).await?;
    let place = |row| Ok(usize::try_from(Columns::of(row).long()?).ok().and_then(|n| places.get(n)).copied());
    let found = found.iter().map(place).collect::<Result<Option<Vec<_>>, StoreError>>()?;
    rows::at(jobs.len(), found.ok_or_else(|| rows::damaged("place"))?)
}

fn events_sql(name: &str, call: &str) -> String {
    format!(
        "/* {name} */ SELECT head_seq, floor_seq, org_seq, job_status, bytes_through, {}, result FROM jobledger.{call}",
        EVENT_COLUMNS.join(", ")
    )
}

static ORG_EVENTS: LazyLock<String> =
    LazyLock::new(|| events_sql("org_events", "read_log($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9)"));
static JOB_EVENTS: LazyLock<String> =
    LazyLock::new(|| events_sql("job_events", "read_job_log($1, $2, $3, $4, $5, $6, $7::jsonb, $8, $9)"));

pub(super) async fn events(
    readers: &Arc<Connections>,
    org: OrgId,
    query: &EventQuery,
) -> Result<EventPage, StoreError> {
    let filter = &query.filter;
    let types = (!filter.types.is_empty()).then_some(&filter.types[..]);
    let statuses: Vec<_> = filter.statuses.iter().copied().map(JobStatus::as_str).collect();
    let statuses = (!statuses.is_empty()).then_some(statuses);
    let labels = rows::labels_json(&filter.labels);
    let max_events = i64::try_from(query.max_events).unwrap_or(i64::MAX);
    let max_bytes = i64::try_from(query.max_bytes).unwrap_or(i64::MAX);
    let (found, last) = match filter.job {
        // The events of one job have an index of their own, so no window is needed.
        Some(job) => {
            let arguments = arguments![
                org.0,
                job.0,
                query.after,
                types,
                statuses,
                filter.is_leaving,
                labels,
                max_events,
                max_bytes
            ];
            (readers.fetch(JOB_EVENTS.as_str(), arguments).await?, i64::MAX)
        }
        None => {
            let last = query.after.saturating_add(SCAN_WINDOW);
            let arguments =
                arguments![org.0, query.after, last, types, statuses, filter.is_leaving, labels, max_events, max_bytes];
            (readers.fetch(ORG_EVENTS.as_str(), arguments).await?, last)
        }
    };

    let mut page =
        EventPage { events: Vec::with_capacity(found.len()), through: 0, head: 0, floor: 1, job_status: None };
    let (mut bytes, mut org_seq) = (0, 0);
    for row in &found {
        let mut columns = Columns::of(row);
        page.head = columns.long()?;
        page.floor = columns.long()?;
        org_seq = columns.long()?;
        page.job_status = columns.optional_text()?.map(rows::status).transpose()?;
        // The database's own count, by which it cut the page.
        let Some(bytes_through) = columns.optional_long()? else {
            break;
        };
        bytes = bytes_through;
        page.events.push(LogEvent::Job(Arc::new(rows::event(&mut columns)?)));
    }
    let is_cut = page.events.len() >= query.max_events || bytes > max_bytes;
    let page = page.ending_at(last, is_cut);
    if !filter.has_org_events || org_seq <= query.after {
        return Ok(page);
    }
    // A later snapshot has the same events up to the head of the first one, unless retention removed some.
    let of_org = org_events(readers, org, query.after, page.through).await?;
    Ok(page.with_org_events(of_org, query))
}

pub(super) async fn org_events(
    readers: &Arc<Connections>,
    org: OrgId,
    after: i64,
    last: i64,
) -> Result<Vec<Arc<OrgEvent>>, StoreError> {
    let found = readers.fetch(EVENTS_OF_ORG.as_str(), arguments![org.0, after, last]).await?;
    found.iter().map(|row| org_events::read(&mut Columns::of(row))).collect()
}

/// A page spans a bounded number of `seq`s, so the number of these events needs no other bound.
static EVENTS_OF_ORG: LazyLock<String> = LazyLock::new(|| {
    format!("/* events_of_org */ SELECT {} FROM jobledger.read_org_events($1, $2, $3)", ORG_EVENT_COLUMNS.join(", "))
});

pub(super) async fn clock(readers: &Arc<Connections>) -> Result<crate::domain::clock::Time, StoreError> {
    let found = readers.fetch("/* clock */ SELECT clock_timestamp()", arguments![]).await?;
    let row = found.first().ok_or_else(|| rows::damaged("clock"))?;
    Columns::of(row).time()
}

pub(super) async fn contents(
    readers: &Arc<Connections>,
    org: OrgId,
    ids: &[JobId],
) -> Result<Vec<(JobId, JobContents)>, StoreError> {
    let ids: Vec<_> = ids.iter().map(|id| id.0).collect();
    let sql = "/* contents */ SELECT id, payload, result FROM jobledger.read_contents($1, $2)";
    let found = readers.fetch(sql, arguments![org.0, ids]).await?;
    let contents = |row| {
        let mut columns = Columns::of(row);
        Ok((JobId(columns.uuid()?), rows::contents(&mut columns)?))
    };
    found.iter().map(contents).collect()
}

pub(super) async fn reaches(readers: &Arc<Connections>, orgs: &[OrgId]) -> Result<Vec<(OrgId, Reach)>, StoreError> {
    let ids: Vec<_> = orgs.iter().map(|org| org.0).collect();
    let sql = "/* reaches */ SELECT org_id, seq, ready_gen FROM jobledger.read_reaches($1)";
    let found = readers.fetch(sql, arguments![ids]).await?;
    let reach = |row| {
        let mut columns = Columns::of(row);
        Ok((OrgId(columns.uuid()?), Reach { seq: columns.long()?, ready_gen: columns.long()? }))
    };
    found.iter().map(reach).collect()
}

pub(super) async fn about(readers: &Arc<Connections>) -> Result<LedgerInfo, StoreError> {
    let sql = "/* about */ SELECT log_id, credentials,
            retention_paused_until > clock_timestamp() AND retention_paused_until <= clock_timestamp() + $1 * interval '1 second'
        FROM jobledger.ledger";
    let found = readers.fetch(sql, arguments![LONGEST_PAUSE.as_secs_f64()]).await?;
    let mut columns = Columns::of(found.first().ok_or_else(|| rows::damaged("ledger"))?);
    Ok(LedgerInfo {
        log_id: LogId(columns.uuid()?),
        credentials: columns.long()?,
        is_retention_paused: columns.flag()?,
    })
}

pub(super) async fn orgs(
    readers: &Arc<Connections>,
    after: Option<OrgId>,
    limit: usize,
) -> Result<Vec<OrgId>, StoreError> {
    let sql =
        "/* orgs */ SELECT org_id FROM jobledger.org_due WHERE $1 IS NULL OR org_id > $1 ORDER BY org_id LIMIT $2";
    let found = readers.fetch(sql, arguments![after.map(|org| org.0), limit as i64]).await?;
    found.iter().map(|row| Ok(OrgId(Columns::of(row).uuid()?))).collect()
}

/// Puts off the orgs that it takes, so that other servers leave them alone. If this server dies, they fall due again.
pub(super) async fn take_due(
    readers: &Arc<Connections>,
    what: DueWork,
    limit: usize,
    hold: Duration,
) -> Result<Vec<OrgId>, StoreError> {
    let sql = match what {
        DueWork::Jobs => {
            "/* take_due_jobs */ WITH due AS MATERIALIZED (
                SELECT org_id FROM jobledger.org_due WHERE work_due_at <= statement_timestamp()
                ORDER BY work_due_at LIMIT $1 FOR UPDATE SKIP LOCKED
            )
            UPDATE jobledger.org_due d SET work_due_at = clock_timestamp() + $2 * interval '1 microsecond'
            FROM due WHERE d.org_id = due.org_id RETURNING d.org_id"
        }
        DueWork::Retention => {
            "/* take_due_retention */ WITH due AS MATERIALIZED (
                SELECT org_id FROM jobledger.org_due WHERE next_due_at <= statement_timestamp()
                ORDER BY next_due_at LIMIT $1 FOR UPDATE SKIP LOCKED
            )
            UPDATE jobledger.org_due d SET next_due_at = clock_timestamp() + $2 * interval '1 microsecond'
            FROM due WHERE d.org_id = due.org_id RETURNING d.org_id"
        }
    };
    let found = readers.fetch(sql, arguments![limit as i64, hold.as_micros() as f64]).await?;
    found.iter().map(|row| Ok(OrgId(Columns::of(row).uuid()?))).collect()
}

pub(super) async fn make_partitions(readers: &Arc<Connections>, months_ahead: i32) -> Result<(), StoreError> {
    readers.fetch("/* make_partitions */ SELECT jobledger.make_partitions($1)", arguments![months_ahead]).await?;
    Ok(())
}

pub(super) async fn maintain(readers: &Arc<Connections>, months_ahead: i32) -> Result<(), StoreError> {
    make_partitions(readers, months_ahead).await?;
    // A failure is harmless: the next call tries again.
    match readers.fetch("/* maintain */ SELECT jobledger.drop_empty_partitions()", arguments![]).await {
        Ok(dropped) => {
            let dropped = dropped.first().map_or(Ok(0), |row| Columns::of(row).int())?;
            if dropped > 0 {
                tracing::info!(dropped, "dropped empty partitions of past months");
            }
        }
        Err(error) => tracing::warn!(%error, "can't drop empty partitions of past months"),
    }
    Ok(())
}

pub(super) async fn ping(readers: &Arc<Connections>) -> Result<Time, StoreError> {
    let found = readers.fetch("/* ping */ SELECT clock_timestamp()", arguments![]).await?;
    Columns::of(found.first().ok_or_else(|| rows::damaged("clock"))?).time()
}

pub(super) async fn newer_migration(readers: &Arc<Connections>) -> Result<Option<i64>, StoreError> {
    let sql = "/* newer_migration */ SELECT coalesce(max(m.version), 0), l.functions
        FROM jobledger.ledger l LEFT JOIN jobledger.migration m ON true GROUP BY l.functions";
    let found = readers.fetch(sql, arguments![]).await?;
    let mut columns = Columns::of(found.first().ok_or_else(|| rows::damaged("migration"))?);
    let (last, functions) = (columns.long()?, columns.int()?);
    let newer_functions = Some(functions).filter(|functions| *functions > migrations::FUNCTIONS.version);
    Ok(migrations::newer(last).or(newer_functions.map(i64::from)))
}

pub(super) async fn note_clock(
    readers: &Arc<Connections>,
    unseen: TimeDelta,
    doubt: Duration,
) -> Result<Option<TimeDelta>, StoreError> {
    // If two servers run this at once, both see the same earlier time, and both pause retention.
    let sql = "/* note_clock */ WITH before AS MATERIALIZED (SELECT clock_seen_at AS seen, clock_timestamp() AS now FROM jobledger.ledger)
        UPDATE jobledger.ledger SET clock_seen_at = before.now, retention_paused_until = CASE
            WHEN abs(extract(epoch FROM before.now - before.seen)) > $1::double precision
            THEN before.now + $2 * interval '1 second' ELSE retention_paused_until END
        FROM before RETURNING before.seen, before.now";
    let found = readers.fetch(sql, arguments![unseen.as_seconds_f64(), doubt.as_secs_f64()]).await?;
    let mut columns = Columns::of(found.first().ok_or_else(|| rows::damaged("ledger"))?);
    let (before, now) = (columns.optional_time()?, columns.time()?);
    Ok(before.map(|before| now - before))
}
