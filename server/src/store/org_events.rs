//! `org_event.detail_json`: what an org event says besides its columns, the same in every database.

use std::sync::Arc;

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    StoreError,
    rows::{Columns, damaged, json_text, non_empty},
    value::Value,
};
use crate::domain::{
    bulk::{BulkAction, BulkStatus},
    clock::Time,
    id::OrgId,
    job_type::Pause,
    org_event::{OrgChange, OrgEvent},
};

/// The columns of `org_event`, in the order in which they are written and read; `bytes` is written after them.
pub(super) const ORG_EVENT_COLUMNS: [&str; 7] = ["org_id", "seq", "ts", "recorded_at", "kind", "actor", "detail_json"];

/// A pause in JSON. Times are microseconds since 1970. Absent values are left out.
#[derive(Serialize, Deserialize)]
pub(super) struct PauseText {
    since: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<i64>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    actor: String,
}

impl PauseText {
    fn of(pause: &Pause) -> Self {
        Self {
            since: pause.since.timestamp_micros(),
            until: pause.until.map(|until| until.timestamp_micros()),
            reason: pause.reason.to_string(),
            actor: pause.actor.to_string(),
        }
    }

    fn read(self) -> Result<Pause, StoreError> {
        let Self { since, until, reason, actor } = self;
        let until = until.map(time).transpose()?;
        Ok(Pause { since: time(since)?, until, reason: reason.into(), actor: actor.into() })
    }

    /// A pause as the text of a column.
    pub(super) fn text(pause: &Pause) -> String {
        json_text(&Self::of(pause))
    }

    /// Reads the text of a column.
    pub(super) fn parse(text: &str) -> Result<Pause, StoreError> {
        serde_json::from_str::<Self>(text).map_err(|_| damaged("pause"))?.read()
    }
}

fn time(micros: i64) -> Result<Time, StoreError> {
    DateTime::from_timestamp_micros(micros).ok_or_else(|| damaged("time"))
}

/// What an event changed, in JSON. Absent values are left out.
#[derive(Default, Serialize, Deserialize)]
struct Detail {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    job_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pause: Option<PauseText>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_before: Option<PauseText>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    description_before: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bulk: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    action: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    matched: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    changed: Option<i64>,
}

const PAUSED: &str = "type_paused";
const RESUMED: &str = "type_resumed";
const UPDATED: &str = "type_updated";
const RESET: &str = "type_reset";
const BULK_STARTED: &str = "bulk_started";
const BULK_ENDED: &str = "bulk_ended";

/// The kind of an event and its detail.
fn kind_and_detail(change: &OrgChange) -> (&'static str, Detail) {
    match change {
        OrgChange::TypePaused { job_type, pause, before } => {
            let (pause, pause_before) = (Some(PauseText::of(pause)), before.as_ref().map(PauseText::of));
            (PAUSED, Detail { job_type: job_type.to_string(), pause, pause_before, ..Detail::default() })
        }
        OrgChange::TypeResumed { job_type, pause } => {
            let pause_before = Some(PauseText::of(pause));
            (RESUMED, Detail { job_type: job_type.to_string(), pause_before, ..Detail::default() })
        }
        OrgChange::TypeUpdated { job_type, before, after } => {
            let (description_before, description) = (before.to_string(), after.to_string());
            (UPDATED, Detail { job_type: job_type.to_string(), description, description_before, ..Detail::default() })
        }
        OrgChange::TypeReset { job_type, description, pause } => {
            let (description_before, pause_before) = (description.to_string(), pause.as_ref().map(PauseText::of));
            (RESET, Detail { job_type: job_type.to_string(), description_before, pause_before, ..Detail::default() })
        }
        OrgChange::BulkStarted { id, action, reason, is_dry_run } => {
            let (action, reason) = (action.as_str().to_owned(), reason.to_string());
            (
                BULK_STARTED,
                Detail { bulk: Some(id.to_string()), action, reason, dry_run: *is_dry_run, ..Detail::default() },
            )
        }
        OrgChange::BulkEnded { id, status, matched, changed } => {
            let (matched, changed) = (Some(*matched), Some(*changed));
            let status = status.as_str().to_owned();
            (BULK_ENDED, Detail { bulk: Some(id.to_string()), status, matched, changed, ..Detail::default() })
        }
    }
}

fn change(kind: &str, detail: Detail) -> Result<OrgChange, StoreError> {
    let Detail { job_type, pause, pause_before, description, description_before, .. } = detail;
    let bulk = detail.bulk.and_then(|id| Uuid::try_parse(&id).ok());
    let (action, reason, is_dry_run) = (detail.action, detail.reason, detail.dry_run);
    let pause = pause.map(PauseText::read).transpose()?;
    let before = pause_before.map(PauseText::read).transpose()?;
    let (job_type, missing): (Arc<str>, _) = (job_type.into(), || damaged("org event"));
    Ok(match kind {
        PAUSED => OrgChange::TypePaused { job_type, pause: pause.ok_or_else(missing)?, before },
        RESUMED => OrgChange::TypeResumed { job_type, pause: before.ok_or_else(missing)? },
        UPDATED => OrgChange::TypeUpdated { job_type, before: description_before.into(), after: description.into() },
        RESET => OrgChange::TypeReset { job_type, description: description_before.into(), pause: before },
        BULK_STARTED => OrgChange::BulkStarted {
            id: bulk.ok_or_else(missing)?,
            action: BulkAction::parse(&action).ok_or_else(missing)?,
            reason: reason.into(),
            is_dry_run,
        },
        BULK_ENDED => OrgChange::BulkEnded {
            id: bulk.ok_or_else(missing)?,
            status: BulkStatus::parse(&detail.status).ok_or_else(missing)?,
            matched: detail.matched.unwrap_or_default(),
            changed: detail.changed.unwrap_or_default(),
        },
        _ => return Err(missing()),
    })
}

/// The kind of an event and the text of its detail.
pub(super) fn kind_and_text(change: &OrgChange) -> (&'static str, String) {
    let (kind, detail) = kind_and_detail(change);
    (kind, json_text(&detail))
}

/// The values of [`ORG_EVENT_COLUMNS`], then the event's weight.
pub(super) fn values(event: &OrgEvent) -> Vec<Value<'_>> {
    let (kind, detail) = kind_and_text(&event.change);
    vec![
        event.org_id.0.into(),
        event.seq.into(),
        event.ts.into(),
        event.recorded_at.into(),
        kind.into(),
        non_empty(&event.actor).into(),
        detail.into(),
        (event.weight() as i64).into(),
    ]
}

/// Reads [`ORG_EVENT_COLUMNS`].
pub(super) fn read<'r>(columns: &mut impl Columns<'r>) -> Result<Arc<OrgEvent>, StoreError> {
    let (org_id, seq) = (OrgId(columns.uuid()?), columns.long()?);
    let (ts, recorded_at) = (columns.time()?, columns.time()?);
    let (kind, actor) = (columns.text()?.to_owned(), columns.text()?.into());
    let detail = serde_json::from_str(columns.text()?).map_err(|_| damaged("org event"))?;
    Ok(Arc::new(OrgEvent { org_id, seq, ts, recorded_at, actor, change: change(&kind, detail)? }))
}
