//! `job_event.detail_json`: what an event says besides its columns, the same in every database.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    StoreError,
    rows::{damaged, json_text, non_empty},
};
use crate::domain::{
    edit::{EditableFields, JobEdit, PayloadMark},
    event::{JobError, JobEvent, Origin},
    id::Digest,
    json::Json,
};

/// Absent values are left out of the JSON.
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
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    origin: Option<OriginText<'a>>,
    /// The event happened in another system, before the job was imported.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    past: bool,
    /// The bulk operation that caused the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    bulk: Option<String>,
    /// What an `edited` event changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    edit: Option<EditText>,
}

/// A [`JobEdit`].
#[derive(Serialize, Deserialize)]
struct EditText {
    before: FieldsText,
    after: FieldsText,
}

/// [`EditableFields`]. A field that was edited and has no value is null; one that was not edited is left out. Durations are in
/// microseconds, digests in hexadecimal digits.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct FieldsText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    priority: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_attempts: Option<i32>,
    #[serde(default, deserialize_with = "present_or_null", skip_serializing_if = "Option::is_none")]
    run_timeout: Option<Option<u64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default, deserialize_with = "present_or_null", skip_serializing_if = "Option::is_none")]
    scheduled_at: Option<Option<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    payload_bytes: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    payload_sha256: Option<String>,
}

/// Tells null from absent.
fn present_or_null<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Deserialize::deserialize(deserializer).map(Some)
}

impl FieldsText {
    pub(super) fn of(fields: &EditableFields) -> Self {
        Self {
            priority: fields.priority,
            max_attempts: fields.max_attempts,
            run_timeout: fields.run_timeout.map(|timeout| timeout.map(|timeout| timeout.as_micros() as u64)),
            labels: fields.labels.as_deref().cloned(),
            scheduled_at: fields.scheduled_at.map(|time| time.map(rfc3339)),
            payload_bytes: fields.payload.map(|payload| payload.bytes),
            payload_sha256: fields.payload.and_then(|payload| payload.digest).map(|digest| digest.to_string()),
        }
    }

    pub(super) fn read(self) -> Result<EditableFields, StoreError> {
        let digest = self.payload_sha256.map(|digest| digest.parse().map_err(|()| damaged("digest"))).transpose()?;
        let scheduled_at = self.scheduled_at.map(|at| at.as_deref().map(time).transpose()).transpose()?;
        Ok(EditableFields {
            priority: self.priority,
            max_attempts: self.max_attempts,
            run_timeout: self.run_timeout.map(|timeout| timeout.map(Duration::from_micros)),
            labels: self.labels.map(Arc::new),
            scheduled_at,
            payload: self.payload_bytes.map(|bytes| PayloadMark { bytes, digest }),
        })
    }
}

/// The [`Origin`] of an imported job.
#[derive(Serialize, Deserialize)]
struct OriginText<'a> {
    /// In hexadecimal digits.
    #[serde(borrow)]
    digest: Cow<'a, str>,
    #[serde(borrow)]
    created_at: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    started_at: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    finished_at: Option<Cow<'a, str>>,
}

impl OriginText<'_> {
    fn of(origin: &Origin) -> Self {
        let text = |time: DateTime<Utc>| Cow::Owned(rfc3339(time));
        Self {
            digest: origin.digest.to_string().into(),
            created_at: text(origin.created_at),
            started_at: origin.started_at.map(text),
            finished_at: origin.finished_at.map(text),
        }
    }

    fn read(&self) -> Result<Origin, StoreError> {
        let optional = |text: &Option<Cow<'_, str>>| text.as_deref().map(time).transpose();
        Ok(Origin {
            digest: self.digest()?,
            created_at: time(&self.created_at)?,
            started_at: optional(&self.started_at)?,
            finished_at: optional(&self.finished_at)?,
        })
    }

    fn digest(&self) -> Result<Digest, StoreError> {
        self.digest.parse().map_err(|()| damaged("digest"))
    }
}

/// Keeps a null, unlike the default: a result may be null.
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
            && self.origin.is_none()
            && !self.past
            && self.bulk.is_none()
            && self.edit.is_none()
    }
}

/// An event's `detail_json`, with its result if that has at most `max_result` bytes. `None` if there is nothing to say.
pub(super) fn write(event: &JobEvent, max_result: usize) -> Result<Option<String>, StoreError> {
    let result = event.result.as_ref().filter(|result| result.len() <= max_result);
    let raw = result.map(|result| serde_json::from_str::<&RawValue>(result.as_str()));
    let detail = Detail {
        stage: event.stage.as_deref().map(Into::into),
        progress: event.progress,
        message: non_empty(&event.message).map(Into::into),
        result: raw.transpose().map_err(|error| StoreError::Refused(format!("result: {error}")))?,
        error_code: event.error.as_ref().map(|error| (*error.code).into()),
        error_message: event.error.as_ref().and_then(|error| non_empty(&error.message)).map(Into::into),
        scheduled_at: event.scheduled_at.map(|time| rfc3339(time).into()),
        origin: event.origin.as_deref().map(OriginText::of),
        past: event.is_past,
        bulk: event.bulk_operation.map(|id| id.to_string()),
        edit: event
            .edit
            .as_deref()
            .map(|edit| EditText { before: FieldsText::of(&edit.before), after: FieldsText::of(&edit.after) }),
    };
    Ok((!detail.is_empty()).then(|| json_text(&detail)))
}

/// Sets what an event's `detail_json` says in the event.
pub(super) fn read(text: &str, event: &mut JobEvent) -> Result<(), StoreError> {
    let detail = Detail::parse(text)?;
    event.stage = detail.stage.map(|stage| stage.into_owned().into());
    event.progress = detail.progress;
    if let Some(message) = detail.message {
        event.message = message.into_owned().into();
    }
    event.result = detail.result.map(|raw| Json::from_trusted(raw.get()));
    event.error = detail.error_code.map(|code| JobError {
        code: code.into_owned().into(),
        message: detail.error_message.unwrap_or_default().into_owned().into(),
    });
    event.scheduled_at = detail.scheduled_at.as_deref().map(time).transpose()?;
    event.is_past = detail.past;
    let bulk = detail.bulk.map(|id| Uuid::try_parse(&id).map_err(|_| damaged("bulk operation")));
    event.bulk_operation = bulk.transpose()?;
    let edit =
        detail.edit.map(|edit| Ok::<_, StoreError>(JobEdit { before: edit.before.read()?, after: edit.after.read()? }));
    event.edit = edit.transpose()?.map(Arc::new);
    event.origin = detail.origin.map(|origin| origin.read().map(Arc::new)).transpose()?;
    Ok(())
}

/// The digest of what was imported, from the `detail_json` of an `IMPORTED` event.
pub(super) fn origin_digest(text: &str) -> Result<Digest, StoreError> {
    Detail::parse(text)?.origin.ok_or_else(|| damaged("origin"))?.digest()
}

/// The result in an event's `detail_json`.
pub(super) fn result(text: &str) -> Result<Option<Json>, StoreError> {
    Ok(Detail::parse(text)?.result.map(|raw| Json::from_trusted(raw.get())))
}

/// Parses a time in the form of `scheduled_at`.
pub(super) fn time(text: &str) -> Result<DateTime<Utc>, StoreError> {
    DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).map_err(|_| damaged("time"))
}

fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}
