//! Requests of StreamJobEvents and GetStatistics.

use std::time::Duration;

use chrono::TimeDelta;
use jobledger_proto::v1 as pb;
use uuid::Uuid;

use super::{super::status::ApiError, check::Check};
use crate::{
    domain::id::LogId,
    ledger::{EventFilter, SeriesKind, StatisticsQuery, SubscribeRequest},
};

const WINDOW: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(7 * 24 * 3_600)];
const DEFAULT_WINDOW: Duration = Duration::from_secs(3_600);
/// Types with a series of their own in one answer. A day of minutes takes at most 80 KiB a type.
const MAX_SERIES: usize = 40;

pub(in super::super) fn subscribe(request: pb::StreamJobEventsRequest) -> Result<SubscribeRequest, ApiError> {
    let mut check = Check::default();
    let job = (!request.job_id.is_empty()).then(|| check.job_id(&request.job_id));
    let types = check.types("types", request.types);
    let statuses = check.statuses("statuses", &request.statuses);
    check.labels("labels", &request.labels);
    let with_snapshot = request.include_snapshot;
    check.that("include_org_events", !(request.include_org_events && job.is_some()), || {
        "must not be combined with job_id".to_owned()
    });
    let is_filtered = !(types.is_empty() && statuses.is_empty() && request.labels.is_empty());
    check.that("after_seq", request.after_seq.is_none_or(|seq| seq >= 0), || "must not be negative".to_owned());
    check.that("include_snapshot", !(with_snapshot && request.after_seq.is_some()), || {
        "must not be combined with after_seq: the stream begins with the snapshot".to_owned()
    });
    let log_id = (!request.log_id.is_empty()).then(|| Uuid::try_parse(&request.log_id).map(LogId));
    check.that("log_id", !matches!(log_id, Some(Err(_))), || "must be a UUID".to_owned());
    check.finish()?;
    Ok(SubscribeRequest {
        filter: EventFilter {
            job,
            types,
            statuses,
            is_leaving: with_snapshot || request.include_leaving,
            labels: request.labels,
            has_org_events: job.is_none() && (request.include_org_events || !is_filtered),
        },
        after: request.after_seq,
        history_only: request.history_only,
        with_snapshot,
        log_id: log_id.and_then(Result::ok),
    })
}

pub(in super::super) fn statistics(request: pb::GetStatisticsRequest) -> Result<StatisticsQuery, ApiError> {
    let mut check = Check::default();
    let types = check.types("types", request.types);
    let window =
        request.window.as_ref().map_or(Some(DEFAULT_WINDOW), |window| check.duration("window", window, WINDOW));
    let series = match (request.series, types.is_empty()) {
        (false, _) => SeriesKind::None,
        (true, true) => SeriesKind::Together,
        (true, false) => SeriesKind::ByType,
    };
    check.that("types", series != SeriesKind::ByType || types.len() <= MAX_SERIES, || {
        format!("must name at most {MAX_SERIES} types if a series is requested")
    });
    check.finish()?;
    let window = TimeDelta::from_std(window.unwrap_or(DEFAULT_WINDOW)).unwrap_or_default();
    Ok(StatisticsQuery { types, window, series })
}
