//! Edits: changes of what the creator asked for, while a job is queued.

use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::{
    clock::Time,
    id::Digest,
    job::{JobSpec, Labels},
    json::Json,
};

/// A field that can be edited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EditableField {
    /// The payload.
    Payload,
    /// The priority.
    Priority,
    /// The earliest time for the next attempt.
    ScheduledAt,
    /// The labels.
    Labels,
    /// The bound on failures.
    MaxAttempts,
    /// How long an attempt may take.
    RunTimeout,
}

impl EditableField {
    /// Every field.
    pub const ALL: [Self; 6] =
        [Self::Payload, Self::Priority, Self::ScheduledAt, Self::Labels, Self::MaxAttempts, Self::RunTimeout];

    /// The name in the contract.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Payload => "payload",
            Self::Priority => "priority",
            Self::ScheduledAt => "scheduled_at",
            Self::Labels => "labels",
            Self::MaxAttempts => "max_attempts",
            Self::RunTimeout => "run_timeout",
        }
    }
}

/// Some fields of a job, with their values. A field that is `None` is left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EditableFields {
    /// The priority.
    pub priority: Option<i32>,
    /// The bound on failures.
    pub max_attempts: Option<i32>,
    /// How long an attempt may take; the inner `None`: without limit.
    pub run_timeout: Option<Option<Duration>>,
    /// The labels, all of them.
    pub labels: Option<Labels>,
    /// The earliest time for the next attempt; the inner `None`: none, the job was ready at once.
    pub scheduled_at: Option<Option<Time>>,
    /// The payload, by its size and digest.
    pub payload: Option<PayloadMark>,
}

/// A payload, without its text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PayloadMark {
    /// Size on the wire, in bytes; 0 without a payload.
    pub bytes: u32,
    /// SHA-256 of its JSON text; `None` without a payload.
    pub digest: Option<Digest>,
}

impl PayloadMark {
    /// The mark of a payload with this size on the wire.
    pub fn of(bytes: u32, payload: Option<&Json>) -> Self {
        Self { bytes, digest: payload.map(|json| Digest(Sha256::digest(json.as_str()).into())) }
    }
}

/// What an edit changed: the same fields before and after it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobEdit {
    /// The values before.
    pub before: EditableFields,
    /// The values after.
    pub after: EditableFields,
}

impl JobEdit {
    /// By how many bytes the payload has grown.
    pub fn payload_growth(&self) -> i64 {
        let bytes = |fields: &EditableFields| fields.payload.map_or(0, |payload| i64::from(payload.bytes));
        bytes(&self.after) - bytes(&self.before)
    }
}

impl EditableFields {
    /// The fields that are there.
    pub fn present(&self) -> impl Iterator<Item = EditableField> {
        EditableField::ALL.into_iter().filter(|field| match field {
            EditableField::Payload => self.payload.is_some(),
            EditableField::Priority => self.priority.is_some(),
            EditableField::ScheduledAt => self.scheduled_at.is_some(),
            EditableField::Labels => self.labels.is_some(),
            EditableField::MaxAttempts => self.max_attempts.is_some(),
            EditableField::RunTimeout => self.run_timeout.is_some(),
        })
    }

    /// True if no field is there.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes over what an edit changed. Returns whether the fields had the values from before the edit, as far as they are there.
    pub fn follow(&mut self, edit: &JobEdit) -> bool {
        fn follows<T: Clone + PartialEq>(value: &mut Option<T>, before: &Option<T>, after: &Option<T>) -> bool {
            let is_known =
                before.is_some() == after.is_some() && (value.is_none() || after.is_none() || value == before);
            if after.is_some() {
                value.clone_from(after);
            }
            is_known
        }
        let JobEdit { before, after } = edit;
        let follow = [
            follows(&mut self.priority, &before.priority, &after.priority),
            follows(&mut self.max_attempts, &before.max_attempts, &after.max_attempts),
            follows(&mut self.run_timeout, &before.run_timeout, &after.run_timeout),
            follows(&mut self.labels, &before.labels, &after.labels),
            follows(&mut self.payload, &before.payload, &after.payload),
            before.scheduled_at.is_some() == after.scheduled_at.is_some(),
        ];
        follow.into_iter().all(|follows| follows)
    }

    /// True if the job has these values, as far as they are there. `scheduled_at`, which retries change, too, and the payload's
    /// digest are not compared.
    pub fn are_of(&self, spec: &JobSpec) -> bool {
        self.priority.is_none_or(|priority| priority == spec.priority)
            && self.max_attempts.is_none_or(|attempts| attempts == spec.max_attempts)
            && self.run_timeout.is_none_or(|timeout| timeout == spec.run_timeout)
            && self.labels.as_ref().is_none_or(|labels| *labels == spec.labels)
            && self.payload.is_none_or(|payload| payload.bytes == spec.payload_bytes)
    }

    /// Approximate bytes of the texts.
    pub fn text_bytes(&self) -> usize {
        let labels = self.labels.iter().flat_map(|labels| labels.iter());
        labels.map(|(key, value)| key.len() + value.len()).sum()
    }
}
