//! Statistics: one statement over counters and series, and so one snapshot.

use std::{collections::HashMap, sync::LazyLock};

use sqlx::{AssertSqlSafe, SqlitePool};
use tokio_stream::StreamExt as _;

use super::{
    columns::{Columns, IS_BEHIND, IS_READY, micros},
    error::store_error,
    load::load_settings,
    series::histogram,
};
use crate::{
    domain::{
        clock::{Clock, Time},
        flow::{FLOW_COUNTS, Flow, Width, Window},
        id::OrgId,
        status::JobStatus,
    },
    store::{
        SeriesKind, SeriesPoint, Statistics, StatisticsQuery, StatusCounts, StoreError, TypeStatistics,
        rows::{self, Columns as _},
    },
};

/// Width 0: a row for each type, with its counters. Widths 60 and 3600: a row for each bucket, with its flow. All
/// have seven counts.
pub(super) static STATISTICS: LazyLock<String> = LazyLock::new(|| {
    let counts = JobStatus::ALL.map(|status| format!("c.{status}")).join(", ");
    let flow = Flow::NAMES.map(|name| format!("s.{name}")).join(", ");
    let wanted = |row: &str| format!("($2 IS NULL OR {row}.type IN (SELECT value FROM json_each($2)))");
    let part = |width: i64, until: &str| {
        format!(
            "UNION ALL SELECT h.seq, h.org_seq, s.width, s.type, s.start, {flow}, s.waits, s.runs
            FROM org_head h CROSS JOIN org_series s ON s.org_id = h.org_id AND s.width = {width} {until} AND s.removed = 0
                AND {} WHERE h.org_id = $1",
            wanted("s")
        )
    };
    format!(
        "/* statistics */ SELECT h.seq, h.org_seq, 0, c.type, CASE WHEN c.queued > c.scheduled THEN (
                WITH RECURSIVE found (priority) AS (
                    SELECT max(j.priority) FROM job j
                    WHERE j.org_id = c.org_id AND j.type = c.type AND {IS_READY} AND NOT {IS_BEHIND}
                    UNION ALL
                    SELECT (SELECT max(j.priority) FROM job j WHERE j.org_id = c.org_id AND j.type = c.type
                                AND {IS_READY} AND NOT {IS_BEHIND} AND j.priority < found.priority)
                    FROM found WHERE found.priority IS NOT NULL
                ) SELECT min((SELECT min(j.ready_at) FROM job j WHERE j.org_id = c.org_id AND j.type = c.type
                                AND {IS_READY} AND NOT {IS_BEHIND} AND j.priority = found.priority))
                FROM found WHERE found.priority IS NOT NULL)
            END, {counts}, c.scheduled, NULL, NULL
        FROM org_head h LEFT JOIN org_counter c ON c.org_id = h.org_id AND {}
        WHERE h.org_id = $1 {} {}",
        wanted("c"),
        part(60, "AND s.start >= $3 AND s.start < $4"),
        part(3_600, "AND s.start >= $5"),
    )
});

pub(super) async fn statistics(
    pool: &SqlitePool,
    clock: &dyn Clock,
    org: OrgId,
    query: &StatisticsQuery,
) -> Result<Statistics, StoreError> {
    let now = clock.now();
    let window = Window::ending_at(now, query.window);
    // A series by the minute needs all minutes of the window, not only those before its first whole hour.
    let by_minute = query.series != SeriesKind::None && window.width == Width::Minute;
    let mut found = sqlx::query(AssertSqlSafe(STATISTICS.as_str()))
        .bind(org.0)
        .bind((!query.types.is_empty()).then(|| rows::json_text(&query.types)))
        .bind(micros(window.since))
        .bind(if by_minute { i64::MAX } else { micros(window.hours_since) })
        .bind(micros(window.hours_since))
        .fetch(pool);
    let mut statistics = Statistics::empty(now, window.since);
    let mut org_seq = 0;
    let mut flows: HashMap<String, Flow> = HashMap::new();
    let mut series: HashMap<(Time, Option<String>), Flow> = HashMap::new();
    while let Some(row) = found.next().await.transpose().map_err(store_error)? {
        let mut columns = Columns::of(&row);
        (statistics.as_of_seq, org_seq) = (columns.long()?, columns.long()?);
        let (width, job_type) = (columns.long()?, columns.optional_text()?);
        let Some(job_type) = job_type.map(str::to_owned) else { continue };
        let time = columns.optional_time()?;
        let mut counts = [0; FLOW_COUNTS];
        for count in &mut counts {
            *count = columns.long()?;
        }
        if width == 0 {
            let [statuses @ .., scheduled] = counts;
            let counts = StatusCounts::new(statuses);
            let of_type = TypeStatistics { job_type, counts, scheduled, oldest_ready_at: time, flow: Flow::default() };
            statistics.types.push(of_type);
            continue;
        }
        let start = time.ok_or_else(|| rows::damaged("series"))?;
        let flow = Flow::of_counts(counts);
        if query.series != SeriesKind::None && width == window.width.seconds() {
            let job_type = (query.series == SeriesKind::ByType).then(|| job_type.clone());
            series.entry((start, job_type)).or_default().add_all(&flow);
        }
        if width == Width::Hour.seconds() || start < window.hours_since {
            let total = flows.entry(job_type).or_default();
            total.add_all(&flow);
            total.waits.add_all(&histogram(columns.text()?)?);
            total.runs.add_all(&histogram(columns.text()?)?);
        }
    }
    drop(found);
    if org_seq > 0 {
        let mut connection = pool.acquire().await.map_err(store_error)?;
        statistics.settings = load_settings(&mut connection, org, org_seq).await?;
    }
    // Read after the snapshot, so nothing in it is later.
    statistics.as_of = clock.now();
    for of_type in &mut statistics.types {
        of_type.flow = flows.remove(&of_type.job_type).unwrap_or_default();
    }
    // Types that have no jobs left, but a flow within the window.
    for (job_type, flow) in flows {
        let of_type =
            TypeStatistics { job_type, counts: StatusCounts::default(), scheduled: 0, oldest_ready_at: None, flow };
        statistics.types.push(of_type);
    }
    let point = |((start, job_type), flow)| SeriesPoint { start, job_type, flow };
    statistics.series = series.into_iter().map(point).collect();
    Ok(statistics.in_order())
}
