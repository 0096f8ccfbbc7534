//! Statistics: one call of a function that adds up the counters, the series, and the records that are not folded.

use std::sync::{Arc, LazyLock};

use super::{
    columns::Columns,
    connections::{Connections, arguments},
    read::clock,
};
use crate::{
    domain::{
        clock::Time,
        flow::{FLOW_COUNTS, Flow, Histogram, Width, Window},
        id::OrgId,
        job_type::OrgSettings,
        status::JobStatus,
    },
    store::{
        SeriesKind, SeriesPoint, Statistics, StatisticsQuery, StatusCounts, StoreError, TypeStatistics,
        rows::Columns as _, settings,
    },
};

static STATISTICS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* statistics */ SELECT head_seq, org_seq, clock, since, type, bucket, {}, scheduled, oldest_ready_at, {}, waits, runs
        FROM jobledger.read_statistics($1, $2, $3 * interval '1 microsecond', $4, $5)",
        JobStatus::ALL.map(JobStatus::as_str).join(", "),
        Flow::NAMES.map(|name| format!("flow_{name}")).join(", ")
    )
});

pub(super) async fn statistics(
    readers: &Arc<Connections>,
    org: OrgId,
    query: &StatisticsQuery,
) -> Result<Statistics, StoreError> {
    let types = (!query.types.is_empty()).then_some(&query.types[..]);
    let micros = query.window.num_microseconds().unwrap_or(i64::MAX) as f64;
    let width = (query.series != SeriesKind::None).then(|| Width::of(query.window).seconds() as i16);
    let arguments = arguments![org.0, types, micros, width, query.series == SeriesKind::ByType];
    let found = readers.fetch(STATISTICS.as_str(), arguments).await?;
    let now = if found.is_empty() { clock(readers).await? } else { Time::UNIX_EPOCH };
    let mut statistics = Statistics::empty(now, Window::ending_at(now, query.window).since);
    let mut org_seq = 0;
    for row in &found {
        let mut columns = Columns::of(row);
        // These are the same in all rows.
        (statistics.as_of_seq, org_seq) = (columns.long()?, columns.long()?);
        (statistics.as_of, statistics.since) = (columns.time()?, columns.time()?);
        let (job_type, bucket) = (columns.optional_text()?.map(str::to_owned), columns.optional_time()?);
        let mut counts = [0; 7];
        for count in &mut counts {
            *count = columns.optional_long()?.unwrap_or_default();
        }
        let oldest_ready_at = columns.optional_time()?;
        let flow = flow(&mut columns)?;
        match (bucket, job_type) {
            (Some(start), job_type) => statistics.series.push(SeriesPoint { start, job_type, flow }),
            (None, Some(job_type)) => {
                let [statuses @ .., scheduled] = counts;
                let counts = StatusCounts::new(statuses);
                statistics.types.push(TypeStatistics { job_type, counts, scheduled, oldest_ready_at, flow });
            }
            // The org has a log, but none of these types.
            (None, None) => {}
        }
    }
    if org_seq > 0 {
        let sql = "/* settings */ SELECT type, description, pause, changed_seq FROM jobledger.read_settings($1)";
        let mut settings = OrgSettings { as_of: org_seq, ..OrgSettings::default() };
        let found = readers.fetch(sql, arguments![org.0]).await?;
        found.iter().try_for_each(|row| settings::read(&mut Columns::of(row), &mut settings))?;
        statistics.settings = Arc::new(settings);
    }
    Ok(statistics.in_order())
}

/// Reads the counts of a flow, then its durations. They are null if nothing happened.
pub(super) fn flow(columns: &mut Columns<'_>) -> Result<Flow, StoreError> {
    let mut counts = [0; FLOW_COUNTS];
    for count in &mut counts {
        *count = columns.optional_long()?.unwrap_or_default();
    }
    let mut flow = Flow::of_counts(counts);
    let mut histogram = || columns.get::<Option<Vec<i64>>>().map(|counts| Histogram::new(counts.unwrap_or_default()));
    flow.waits = histogram()?;
    flow.runs = histogram()?;
    Ok(flow)
}
