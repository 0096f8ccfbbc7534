//! Maps rows of the old tables to jobs.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use chrono::{DateTime, Datelike as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    RowRefusal,
    detail::{Detail, error},
    source::{Row, Table},
};
use crate::{
    domain::{
        clock::Time,
        event::JobError,
        id::{Digest, JobId, OrgId},
        job::{Idempotency, JobSpec, MAX_NAME_CHARS, MAX_PRIORITY, MAX_TYPE_CHARS},
        name::is_seen,
        status::JobStatus,
        transition::{Import, ImportedState, Past},
    },
    legacy::{DEFAULT_TYPE, fit_name, parse_status},
};

/// No job has more attempts: an attempt always has a successor.
const MAX_ATTEMPT: i64 = 1_000_000;

/// The first instant of the year 1, the earliest time that the contract can represent.
const FIRST: Time = match DateTime::from_timestamp(-62_135_596_800, 0) {
    Some(time) => time,
    None => DateTime::UNIX_EPOCH,
};

#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) org: OrgId,
    pub(super) import: Import,
    /// What the ledger stores otherwise than the row has it.
    pub(super) notes: Vec<String>,
}

/// The columns of a row of either table, as `to_jsonb` prints them. A column that the table lacks is null. The digest
/// of a job covers this struct, serialised again, so that other columns may come and go.
#[derive(Serialize, Deserialize)]
struct Columns<'a> {
    status: Option<String>,
    #[serde(rename = "type")]
    job_type: Option<String>,
    attempt: Option<i64>,
    priority: Option<i64>,
    idempotency_key: Option<String>,
    requested_by: Option<String>,
    stage: Option<String>,
    progress: Option<f64>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<String>,
    last_error_code: Option<String>,
    last_error_message: Option<String>,
    created_at: Option<String>,
    updated_at: Option<String>,
    started_at: Option<String>,
    finished_at: Option<String>,
    /// The state in this row was taken from the row of `jobs` with the same id.
    of_jobs: Option<bool>,
}

/// The columns of a row of `job_event`, for the same two purposes.
#[derive(Serialize, Deserialize)]
struct EventColumns<'a> {
    id: Option<String>,
    ts: Option<String>,
    prev_status: Option<String>,
    next_status: Option<String>,
    #[serde(borrow)]
    detail_json: Option<&'a RawValue>,
}

/// The status of a row; `None` if the row has none or an unknown one.
pub(super) fn status_of(row: &Row) -> Option<JobStatus> {
    #[derive(Deserialize)]
    struct Status {
        status: Option<String>,
    }
    serde_json::from_str::<Status>(&row.text).ok()?.status.as_deref().and_then(parse_status)
}

/// The org of a row; `None` if the row has no valid `org_id`.
pub(super) fn org_of(row: &Row, default_org: OrgId) -> Option<OrgId> {
    #[derive(Deserialize)]
    struct Org {
        org_id: Option<String>,
    }
    match row.table {
        Table::Jobs => Some(default_org),
        Table::Job => {
            let org = serde_json::from_str::<Org>(&row.text).ok()?.org_id?;
            Uuid::try_parse(&org).ok().map(OrgId)
        }
    }
}

/// Maps a row to a job. Rows of `jobs` belong to `default_org`. `now` replaces a time that the row lacks.
pub(super) fn map(row: &Row, default_org: OrgId, now: Time) -> Result<Mapped, RowRefusal> {
    if let Some(reason) = &row.unreadable {
        return Err(RowRefusal::new(format!("its row can't be read: {reason}")));
    }
    let columns: Columns<'_> =
        serde_json::from_str(&row.text).map_err(|error| RowRefusal::new(format!("its row can't be read: {error}")))?;
    let mut notes = Vec::new();
    let word = columns.status.as_deref().ok_or_else(|| RowRefusal::new("it has no status"))?;
    let status = parse_status(word).ok_or_else(|| RowRefusal::new(format!("its status {word:?} is unknown")))?;
    let org = org_of(row, default_org).ok_or_else(|| RowRefusal::new("its org_id is missing or not a UUID"))?;
    let spec = spec(&columns, &mut notes)?;
    let Times { created_at, updated_at, started_at, finished_at } = Times::of(&columns, now, &mut notes);
    if let Some(time) = finished_at.filter(|_| !status.is_terminal()) {
        notes.push(format!("finished_at was {time}, of a job that has not ended"));
    }
    let mut digest = Sha256::new();
    hash(&mut digest, row.table.name());
    hash(&mut digest, &columns);
    let mut old = past_of(row, created_at, now, &mut digest, &mut notes)?;
    // A row without events has all the state itself. Otherwise its last event has what the row lacks.
    let latest = match old.last().filter(|_| columns.of_jobs.is_none()) {
        Some(last) => Detail {
            stage: last.stage.clone(),
            progress: last.progress,
            result: last.result.clone(),
            ..Detail::default()
        },
        None => Detail::of_row(columns.stage.as_deref(), columns.progress, columns.result, &mut notes),
    };
    let error = error_of(&columns, &mut notes);
    let has_run = started_at.is_some()
        || matches!(status, JobStatus::Running | JobStatus::Succeeded | JobStatus::Failed | JobStatus::DeadLetter)
        || status == JobStatus::Canceled
            && (latest.stage.is_some() || latest.progress > Some(0) || latest.result.is_some());
    let wanted = columns.attempt.unwrap_or_else(|| i64::from(has_run));
    let attempt = wanted.clamp(0, MAX_ATTEMPT) as i32;
    if i64::from(attempt) != wanted {
        notes.push(format!("attempt was {wanted}"));
    }
    let state = ImportedState {
        status,
        attempt,
        stage: latest.stage,
        progress: latest.progress,
        result: latest.result,
        error,
        created_at,
        updated_at,
        started_at,
        finished_at,
    };
    if let Some(last) = old.last().filter(|last| columns.of_jobs.is_some() && last.next_status != status) {
        // The job went on without an event, so one is inferred.
        let (prev, attempt) = (Some(last.next_status), last.attempt);
        old.push(Past { attempt, error: state.error.clone(), ..inferred(updated_at, prev, status) });
    }
    let past = if old.is_empty() { proven(&state, has_run) } else { old };
    let import = Import { id: JobId(row.id), spec, state, past, digest: Digest(digest.finalize().into()) };
    Ok(Mapped { org, import, notes })
}

/// Adds a value to a digest, with its length before it.
fn hash(digest: &mut Sha256, value: impl Serialize) {
    let text = serde_json::to_vec(&value).expect("texts, numbers and raw JSON serialise");
    digest.update(text.len().to_le_bytes());
    digest.update(text);
}

fn spec(columns: &Columns<'_>, notes: &mut Vec<String>) -> Result<Arc<JobSpec>, RowRefusal> {
    let job_type = match columns.job_type.as_deref() {
        None => DEFAULT_TYPE,
        Some("") => {
            notes.push("type was empty".to_owned());
            DEFAULT_TYPE
        }
        Some(name) => name,
    };
    if job_type.chars().count() > MAX_TYPE_CHARS || !is_seen(job_type) {
        let reason = format!(
            "its type has more than {MAX_TYPE_CHARS} characters, or control or bidirectional formatting characters"
        );
        return Err(RowRefusal::new(reason));
    }
    let too_long = |text: &&str| text.chars().count() > MAX_NAME_CHARS;
    let key = columns.idempotency_key.as_deref().filter(|key| !key.is_empty());
    if key.as_ref().is_some_and(too_long) {
        return Err(RowRefusal::new(format!("its idempotency_key is longer than {MAX_NAME_CHARS} characters")));
    }
    let requested_by = columns.requested_by.as_deref().unwrap_or_default();
    if too_long(&requested_by) {
        return Err(RowRefusal::new(format!("its requested_by is longer than {MAX_NAME_CHARS} characters")));
    }
    let wanted = columns.priority.unwrap_or_default();
    let priority = wanted.clamp(i64::from(-MAX_PRIORITY), i64::from(MAX_PRIORITY)) as i32;
    if i64::from(priority) != wanted {
        notes.push(format!("priority was {wanted}"));
    }
    Ok(Arc::new(JobSpec {
        priority,
        idempotency: key.map(|key| Idempotency { key: key.into(), digest: None }),
        requested_by: fit_name("requested_by", requested_by, notes),
        ..JobSpec::of_type(job_type)
    }))
}

struct Times {
    created_at: Time,
    updated_at: Time,
    started_at: Option<Time>,
    finished_at: Option<Time>,
}

impl Times {
    fn of(columns: &Columns<'_>, now: Time, notes: &mut Vec<String>) -> Self {
        let mut read = |name, text: &Option<String>| text.as_deref().and_then(|text| time(name, text, notes));
        let created_at = read("created_at", &columns.created_at);
        let updated_at = read("updated_at", &columns.updated_at);
        let started_at = read("started_at", &columns.started_at);
        let finished_at = read("finished_at", &columns.finished_at);
        for (name, time) in [("created_at", created_at), ("updated_at", updated_at)] {
            if time.is_none() {
                notes.push(format!("{name} was missing"));
            }
        }
        let either = created_at.or(updated_at).unwrap_or(now);
        let updated_at = updated_at.or(created_at).unwrap_or(now);
        Self { created_at: either, updated_at, started_at, finished_at }
    }
}

/// Parses a time as `to_jsonb` prints it; `None`, with a note, if the contract cannot represent it.
fn time(name: &str, text: &str, notes: &mut Vec<String>) -> Option<Time> {
    let time = DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).ok();
    let time = time.filter(|time| (1..=9999).contains(&time.year()));
    if time.is_none() {
        notes.push(format!("{name} was {text}"));
    }
    time
}

fn error_of(columns: &Columns<'_>, notes: &mut Vec<String>) -> Option<JobError> {
    let message = columns.error.as_deref().or(columns.last_error_message.as_deref());
    let code = columns.last_error_code.as_deref();
    (message.is_some() || code.is_some()).then(|| error(code.unwrap_or_default(), message.unwrap_or_default(), notes))
}

/// The events that the row of a job without events proves.
fn proven(state: &ImportedState, has_run: bool) -> Vec<Past> {
    let mut past = vec![inferred(state.created_at, None, JobStatus::Queued)];
    let mut prev = JobStatus::Queued;
    if has_run {
        let ts = state.started_at.unwrap_or(state.updated_at);
        past.push(Past { attempt: state.attempt, ..inferred(ts, Some(prev), JobStatus::Running) });
        prev = JobStatus::Running;
    }
    if state.status.is_terminal() {
        let ts = state.finished_at.unwrap_or(state.updated_at);
        let error = state.error.clone();
        past.push(Past { attempt: state.attempt, error, ..inferred(ts, Some(prev), state.status) });
    }
    past
}

/// An event that must have happened, and of which nothing else is known.
fn inferred(ts: Time, prev_status: Option<JobStatus>, next_status: JobStatus) -> Past {
    Past {
        ts,
        is_inferred: true,
        prev_status,
        next_status,
        attempt: 0,
        stage: None,
        progress: None,
        message: Arc::default(),
        result: None,
        error: None,
    }
}

/// The events of a job in their order in the old database, beginning with its creation.
fn past_of(
    row: &Row,
    created_at: Time,
    now: Time,
    digest: &mut Sha256,
    notes: &mut Vec<String>,
) -> Result<Vec<Past>, RowRefusal> {
    let mut found = Vec::with_capacity(row.events.len());
    for text in &row.events {
        let columns: EventColumns<'_> =
            serde_json::from_str(text).map_err(|error| RowRefusal::new(format!("an event can't be read: {error}")))?;
        hash(digest, &columns);
        let id = columns.id.unwrap_or_default();
        let (prev, next) = (columns.prev_status.as_deref(), columns.next_status.as_deref().unwrap_or_default());
        let Some(next_status) = parse_status(next) else {
            let detail = columns.detail_json.map_or("null", RawValue::get);
            notes.push(format!(
                "event {id} was left out: its next_status {next:?} is unknown; its detail_json: {detail}"
            ));
            continue;
        };
        let prev_status = prev.and_then(parse_status);
        if let (None, Some(prev)) = (prev_status, prev) {
            notes.push(format!("event {id}: its prev_status {prev:?} is unknown"));
        }
        let ts = columns.ts.as_deref().and_then(|text| match text {
            // Before all other times, as PostgreSQL orders it.
            "-infinity" => Some(FIRST),
            text if text.ends_with(" BC") => Some(FIRST),
            text => time("ts of an event", text, notes),
        });
        let detail = columns.detail_json.map(|text| Detail::of_event(text, notes)).unwrap_or_default();
        let Detail { stage, progress, message, result, error } = detail;
        let is_inferred = ts.is_none();
        let past = inferred(ts.unwrap_or(now), prev_status, next_status);
        found.push(Past { is_inferred, stage, progress, message, result, error, ..past });
    }
    if row.left_out > 0 {
        notes.push(format!("the oldest {} events were left out: the job has too many", row.left_out));
    }
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let mut past = in_order(found);
    if past[0].prev_status.is_some() {
        past.insert(0, inferred(created_at, None, JobStatus::Queued));
    }
    let (mut status, mut attempt) = (None, 0);
    for event in &mut past {
        // Only a first event has no previous status.
        event.prev_status = event.prev_status.or(status);
        attempt += i32::from(event.next_status == JobStatus::Running && status != Some(JobStatus::Running));
        event.attempt = attempt;
        status = Some(event.next_status);
    }
    Ok(past)
}

/// Orders events by time. Events of one transaction have the same time. Among those, events that keep the current
/// status come first, then one that begins at the current status, then any.
fn in_order(mut events: Vec<Past>) -> Vec<Past> {
    events.sort_by_key(|past| past.ts);
    let mut ordered: Vec<Past> = Vec::with_capacity(events.len());
    let mut rest = events.into_iter().peekable();
    while let Some(first) = rest.next() {
        let ts = first.ts;
        // The events of one time by their previous and next status; of equal ones in the order read.
        let mut same: BTreeMap<(Option<JobStatus>, JobStatus), VecDeque<Past>> = BTreeMap::new();
        let mut next = Some(first);
        while let Some(past) = next {
            same.entry((past.prev_status, past.next_status)).or_default().push_back(past);
            next = rest.next_if(|next| next.ts == ts);
        }
        while !same.is_empty() {
            let status = ordered.last().map(|last| last.next_status);
            let stays = status.map(|status| (Some(status), status)).filter(|way| same.contains_key(way));
            let leads_on = || same.keys().find(|(prev, _)| *prev == status).copied();
            let Some(way) = stays.or_else(leads_on).or_else(|| same.keys().next().copied()) else { break };
            let of_way = same.entry(way).or_default();
            ordered.extend(of_way.pop_front());
            if of_way.is_empty() {
                same.remove(&way);
            }
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn events_of_one_time_follow_from_each_other() {
        use JobStatus::{Queued, Running, Succeeded};
        let at = |seconds| DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds);
        let events = [
            (5, Some(Running), Succeeded, "done"),
            (5, Some(Running), Running, "b"),
            (5, Some(Queued), Running, "a"),
            (5, Some(Running), Running, "c"),
            (1, None, Queued, ""),
            (9, Some(Queued), Running, "odd"),
        ];
        let past = events.map(|(seconds, prev, next, stage)| Past {
            stage: Some(stage.into()),
            ..inferred(at(seconds), prev, next)
        });
        let stages: Vec<_> = in_order(past.into()).into_iter().filter_map(|past| past.stage).collect();
        assert_eq!(stages.iter().map(|stage| &**stage).collect::<Vec<_>>(), ["", "a", "b", "c", "done", "odd"]);
    }
}
