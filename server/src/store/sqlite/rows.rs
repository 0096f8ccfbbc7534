//! Rows as the domain's values, and back.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use sqlx::{Decode, Row, Sqlite, Type, ValueRef, sqlite::SqliteRow};
use uuid::Uuid;

use crate::{
    domain::{
        clock::Time,
        event::{EventKind, JobError, JobEvent},
        id::{Digest, JobId, OrgId},
        job::{Idempotency, Job, JobSpec},
        json::Json,
        retry::RetryPolicy,
        status::JobStatus,
    },
    store::StoreError,
};

/// The columns of `job`, in the order in which they are written and read.
pub(super) const JOB_COLUMNS: [&str; 29] = [
    "org_id",
    "id",
    "type",
    "max_attempts",
    "priority",
    "idempotency_key",
    "request_digest",
    "requested_by",
    "labels",
    "retry_initial",
    "retry_multiplier",
    "retry_max",
    "created_at",
    // From here on, what events change.
    "status",
    "attempt",
    "failures",
    "updated_at",
    "started_at",
    "attempt_started_at",
    "finished_at",
    "scheduled_at",
    "ready_at",
    "cancel_requested",
    "outcome_digest",
    "last_error_code",
    "last_error_message",
    "result_seq",
    "last_job_seq",
    "last_seq",
];

/// How many of [`JOB_COLUMNS`] never change.
pub(super) const JOB_FIXED_COLUMNS: usize = 13;

/// The columns of `job_event`, in the order in which they are written and read.
pub(super) const EVENT_COLUMNS: [&str; 13] = [
    "org_id",
    "seq",
    "job_id",
    "job_seq",
    "ts",
    "recorded_at",
    "kind",
    "prev_status",
    "next_status",
    "attempt",
    "actor",
    "job_type",
    "detail_json",
];

/// A row, read from left to right.
pub(super) struct Columns<'r> {
    row: &'r SqliteRow,
    next: usize,
}

impl<'r> Columns<'r> {
    pub(super) fn of(row: &'r SqliteRow) -> Self {
        Self { row, next: 0 }
    }

    pub(super) fn get<T: Decode<'r, Sqlite> + Type<Sqlite>>(&mut self) -> Result<T, StoreError> {
        let index = self.next;
        self.next += 1;
        Ok(self.row.try_get(index)?)
    }

    /// True if the next column is null, as all of an outer join's are where it found nothing.
    pub(super) fn peek_is_null(&self) -> Result<bool, StoreError> {
        Ok(self.row.try_get_raw(self.next)?.is_null())
    }

    pub(super) fn time(&mut self) -> Result<Time, StoreError> {
        time(self.get()?)
    }

    pub(super) fn optional_time(&mut self) -> Result<Option<Time>, StoreError> {
        self.get::<Option<i64>>()?.map(time).transpose()
    }

    fn status(&mut self) -> Result<JobStatus, StoreError> {
        status(self.get()?)
    }

    fn digest(&mut self) -> Result<Option<Digest>, StoreError> {
        let bytes: Option<&[u8]> = self.get()?;
        bytes.map(|bytes| bytes.try_into().map(Digest).map_err(|_| damaged("digest"))).transpose()
    }

    /// Text that is empty when the column is null.
    fn text(&mut self) -> Result<Arc<str>, StoreError> {
        Ok(self.get::<Option<&str>>()?.unwrap_or_default().into())
    }
}

pub(super) fn micros(time: Time) -> i64 {
    time.timestamp_micros()
}

pub(super) fn time(micros: i64) -> Result<Time, StoreError> {
    DateTime::from_timestamp_micros(micros).ok_or_else(|| damaged("time"))
}

pub(super) fn status(name: &str) -> Result<JobStatus, StoreError> {
    JobStatus::parse(name).ok_or_else(|| damaged("status"))
}

pub(super) fn damaged(what: &str) -> StoreError {
    StoreError::Unusable(format!("the database holds a {what} that can't be read"))
}

/// Null for the empty string, as in the seed of this schema.
pub(super) fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

pub(super) fn labels_json(labels: &BTreeMap<String, String>) -> Option<String> {
    (!labels.is_empty()).then(|| json_text(labels))
}

/// The JSON of something that has string keys only, and so always has one.
pub(super) fn json_text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings, numbers and raw JSON serialise")
}

/// Reads [`JOB_COLUMNS`], then `stage` and `progress`.
pub(super) fn job(columns: &mut Columns<'_>) -> Result<Job, StoreError> {
    let org_id = OrgId(columns.get()?);
    let id = JobId(columns.get()?);
    let job_type = columns.text()?;
    let max_attempts = columns.get()?;
    let priority = columns.get()?;
    let key: Option<&str> = columns.get()?;
    let digest = columns.digest()?;
    let requested_by = columns.text()?;
    let labels: Option<&str> = columns.get()?;
    let retry_policy = RetryPolicy {
        initial_backoff: Duration::from_micros(columns.get::<i64>()? as u64),
        multiplier: columns.get()?,
        max_backoff: Duration::from_micros(columns.get::<i64>()? as u64),
    };
    let spec = Arc::new(JobSpec {
        job_type,
        priority,
        max_attempts,
        retry_policy,
        idempotency: key.zip(digest).map(|(key, digest)| Idempotency { key: key.into(), digest }),
        requested_by,
        labels: match labels {
            Some(text) => serde_json::from_str(text).map_err(|_| damaged("label"))?,
            None => BTreeMap::new(),
        },
    });
    Ok(Job {
        id,
        org_id,
        spec,
        created_at: columns.time()?,
        status: columns.status()?,
        attempt: columns.get()?,
        failures: columns.get()?,
        updated_at: columns.time()?,
        started_at: columns.optional_time()?,
        attempt_started_at: columns.optional_time()?,
        finished_at: columns.optional_time()?,
        scheduled_at: columns.optional_time()?,
        ready_at: columns.time()?,
        cancel_requested: columns.get()?,
        outcome: columns.digest()?,
        last_error: {
            let (code, message): (Option<&str>, Option<&str>) = (columns.get()?, columns.get()?);
            code.map(|code| JobError { code: code.into(), message: message.unwrap_or_default().into() })
        },
        result_seq: columns.get()?,
        last_job_seq: columns.get()?,
        last_seq: columns.get()?,
        stage: columns.get::<Option<&str>>()?.map(Arc::from),
        progress: columns.get()?,
    })
}

/// Reads [`EVENT_COLUMNS`].
pub(super) fn event(columns: &mut Columns<'_>) -> Result<JobEvent, StoreError> {
    let org_id = OrgId(columns.get::<Uuid>()?);
    let seq = columns.get()?;
    let job_id = JobId(columns.get::<Uuid>()?);
    let job_seq = columns.get()?;
    let (ts, recorded_at) = (columns.time()?, columns.time()?);
    let kind = EventKind::parse(columns.get()?).ok_or_else(|| damaged("kind"))?;
    let prev_status = columns.get::<Option<&str>>()?.map(status).transpose()?;
    let next_status = columns.status()?;
    let attempt = columns.get()?;
    let (actor, job_type) = (columns.text()?, columns.text()?);
    let detail: Option<&str> = columns.get()?;
    let detail = detail.map(Detail::parse).transpose()?.unwrap_or_default();
    Ok(JobEvent {
        org_id,
        seq,
        job_id,
        job_seq,
        ts,
        recorded_at,
        kind,
        prev_status,
        next_status,
        attempt,
        actor,
        job_type,
        stage: detail.stage.map(|stage| stage.into_owned().into()),
        progress: detail.progress,
        message: detail.message.unwrap_or_default().into_owned().into(),
        result: detail.result.map(|raw| Json::from_trusted(raw.get())),
        error: detail.error_code.map(|code| JobError {
            code: code.into_owned().into(),
            message: detail.error_message.unwrap_or_default().into_owned().into(),
        }),
        scheduled_at: detail
            .scheduled_at
            .map(|text| DateTime::parse_from_rfc3339(&text).map(|time| time.to_utc()).map_err(|_| damaged("time")))
            .transpose()?,
    })
}

/// The result in an event's `detail_json`.
pub(super) fn result(detail: &str) -> Result<Option<Json>, StoreError> {
    Ok(Detail::parse(detail)?.result.map(|raw| Json::from_trusted(raw.get())))
}

/// `job_event.detail_json`: what an event says beside its columns. What is absent is left out.
#[derive(Default, Serialize, Deserialize)]
struct Detail<'a> {
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    stage: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<u8>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    message: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    result: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    error_code: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    error_message: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    scheduled_at: Option<Cow<'a, str>>,
}

/// What is there, also where it is null: a result may be.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(deserializer).map(Some)
}

impl<'a> Detail<'a> {
    fn parse(text: &'a str) -> Result<Self, StoreError> {
        serde_json::from_str(text).map_err(|_| damaged("detail"))
    }

    fn is_empty(&self) -> bool {
        self.stage.is_none()
            && self.progress.is_none()
            && self.message.is_none()
            && self.result.is_none()
            && self.error_code.is_none()
            && self.scheduled_at.is_none()
    }
}

/// An event's `detail_json`; null when there is nothing to say.
pub(super) fn detail_json(event: &JobEvent) -> Result<Option<String>, StoreError> {
    let raw = event.result.as_ref().map(|result| serde_json::from_str::<&RawValue>(result.as_str()));
    let detail = Detail {
        stage: event.stage.as_deref().map(Into::into),
        progress: event.progress,
        message: non_empty(&event.message).map(Into::into),
        result: raw.transpose().map_err(|error| StoreError::Refused(format!("result: {error}")))?,
        error_code: event.error.as_ref().map(|error| (*error.code).into()),
        error_message: event.error.as_ref().and_then(|error| non_empty(&error.message)).map(Into::into),
        scheduled_at: event.scheduled_at.map(|time| rfc3339(time).into()),
    };
    Ok((!detail.is_empty()).then(|| json_text(&detail)))
}

fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}
