//! Converts statistics into the answer of GetStatistics.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use chrono::TimeDelta;
use jobledger_proto::v1 as pb;

use super::convert::{self, duration, timestamp};
use crate::{
    domain::{
        clock::Time,
        flow::{Flow, Histogram, Width},
        job_type::{ALL_TYPES, OrgSettings},
        status::JobStatus,
    },
    ledger::{SeriesKind, SeriesPoint, Statistics, StatisticsQuery, StatusCounts, TypeStatistics},
};

/// Types that GetStatistics lists, so that its answer stays small.
const MAX_TYPES_LISTED: usize = 1_000;

pub(super) fn answer(statistics: Statistics, query: &StatisticsQuery) -> pb::GetStatisticsResponse {
    let (as_of, since) = (statistics.as_of, statistics.since);
    let (total, mut scheduled, mut flow) = (total(&statistics), 0, Flow::default());
    for of_type in &statistics.types {
        scheduled += of_type.scheduled;
        flow.add_all(&of_type.flow);
    }
    let settings = Arc::clone(&statistics.settings);
    let oldest = statistics.types.iter().filter_map(|of_type| of_type.oldest_ready_at).min();
    let types_truncated = statistics.types.len() > MAX_TYPES_LISTED;
    let listed = statistics.types.into_iter().take(MAX_TYPES_LISTED);
    let width = Width::of(query.window);
    pb::GetStatisticsResponse {
        types: listed.map(|of_type| of_one(of_type, as_of, &settings)).collect(),
        types_truncated,
        oldest_queued_age: age(oldest, as_of),
        as_of_seq: statistics.as_of_seq,
        as_of: Some(timestamp(as_of)),
        claimable: total.get(JobStatus::Queued) - scheduled,
        scheduled,
        window_start: Some(timestamp(since)),
        happened: Some(happened(&flow)),
        per_minute: Some(per_minute(&flow, as_of - since)),
        waits: Some(durations(&flow.waits)),
        runs: Some(durations(&flow.runs)),
        series: series(statistics.series),
        series_width: (query.series != SeriesKind::None)
            .then(|| duration(Duration::from_secs(width.seconds().unsigned_abs()))),
        counts: Some(counts(&total)),
        pause_of_all: pause(&settings, ALL_TYPES),
    }
}

/// The numbers of jobs of all types.
pub(super) fn total(statistics: &Statistics) -> StatusCounts {
    let mut total = StatusCounts::default();
    statistics.types.iter().for_each(|of_type| total.add_all(&of_type.counts));
    total
}

/// The own pause of a type, or of all types.
fn pause(settings: &OrgSettings, name: &str) -> Option<pb::Pause> {
    settings.types.get(name)?.pause.as_ref().map(convert::pause)
}

fn of_one(of_type: TypeStatistics, as_of: Time, settings: &OrgSettings) -> pb::TypeStatistics {
    pb::TypeStatistics {
        pause: pause(settings, &of_type.job_type),
        r#type: of_type.job_type,
        counts: Some(counts(&of_type.counts)),
        oldest_queued_age: age(of_type.oldest_ready_at, as_of),
        claimable: of_type.counts.get(JobStatus::Queued) - of_type.scheduled,
        scheduled: of_type.scheduled,
        happened: Some(happened(&of_type.flow)),
        waits: Some(durations(&of_type.flow.waits)),
        runs: Some(durations(&of_type.flow.runs)),
    }
}

/// How long the oldest ready job has waited; `None` if its ready time is later than `as_of`.
pub(super) fn age(ready_at: Option<Time>, as_of: Time) -> Option<prost_types::Duration> {
    (as_of - ready_at?).to_std().ok().map(duration)
}

pub(super) fn counts(counts: &StatusCounts) -> pb::StatusCounts {
    pb::StatusCounts {
        queued: counts.get(JobStatus::Queued),
        running: counts.get(JobStatus::Running),
        succeeded: counts.get(JobStatus::Succeeded),
        failed: counts.get(JobStatus::Failed),
        canceled: counts.get(JobStatus::Canceled),
        dead_letter: counts.get(JobStatus::DeadLetter),
    }
}

fn happened(flow: &Flow) -> pb::Happened {
    let [created, started, succeeded, failed, retried, canceled, lost] = flow.counts();
    pb::Happened { created, started, succeeded, failed, retried, canceled, lost }
}

fn per_minute(flow: &Flow, window: TimeDelta) -> pb::RatesPerMinute {
    let minutes = window.as_seconds_f64() / 60.0;
    let [created, started, succeeded, failed, retried, canceled, lost] = flow.counts().map(|n| n as f64 / minutes);
    pb::RatesPerMinute { created, started, succeeded, failed, retried, canceled, lost }
}

fn durations(histogram: &Histogram) -> pb::Durations {
    let quantile = |share| histogram.quantile(share).map(duration);
    pb::Durations { count: histogram.total(), p50: quantile(0.5), p90: quantile(0.9), p99: quantile(0.99) }
}

/// One series of all types together, or one for each type.
fn series(points: Vec<SeriesPoint>) -> Vec<pb::Series> {
    let mut series: BTreeMap<String, Vec<pb::SeriesPoint>> = BTreeMap::new();
    for SeriesPoint { start, job_type, flow } in points {
        let point = pb::SeriesPoint { start: Some(timestamp(start)), happened: Some(happened(&flow)) };
        series.entry(job_type.unwrap_or_default()).or_default().push(point);
    }
    series.into_iter().map(|(r#type, points)| pb::Series { r#type, points }).collect()
}
