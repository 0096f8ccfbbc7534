//! Edits of queued jobs.

use std::sync::Arc;

use super::{
    Tick, Transition, TransitionError,
    builder::{Detail, Path},
};
use crate::domain::{
    edit::{EditableFields, JobEdit, PayloadMark},
    event::EventKind,
    job::{Job, JobSpec},
    json::Json,
    status::JobStatus,
};

/// Changes what the creator of a queued job asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// The fields to set. A `scheduled_at` without a time makes the job ready at once.
    pub fields: EditableFields,
    /// The new payload, if the payload is among the fields; the inner `None`: no payload.
    pub payload: Option<Json>,
    /// The payload that was read before, if the payload is among the fields.
    pub found: FoundPayload,
    /// The command is refused if this is not the job's etag.
    pub etag: Option<String>,
    /// Who asks; empty when unknown.
    pub actor: Arc<str>,
}

/// A job's payload as it was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FoundPayload {
    /// `seq` of the job's last event then.
    pub last_seq: i64,
    /// The payload.
    pub payload: PayloadMark,
}

impl Job {
    pub(super) fn edit(&self, edit: &Edit, at: Tick) -> Result<Transition, TransitionError> {
        if edit.fields.payload.is_some() && edit.found.last_seq != self.last_seq {
            return Err(TransitionError::PayloadOutdated);
        }
        let changed = self.changed_by(edit, at);
        if changed.after.is_empty() {
            return Ok(self.unchanged());
        }
        self.check_etag(edit.etag.as_deref())?;
        if self.status != JobStatus::Queued {
            return Err(TransitionError::InvalidTransition { current: self.status });
        }
        let mut path = Path::new(self, &edit.actor, at);
        let after = &changed.after;
        let spec = JobSpec::clone(&self.spec);
        path.job.spec = Arc::new(JobSpec {
            priority: after.priority.unwrap_or(spec.priority),
            max_attempts: after.max_attempts.unwrap_or(spec.max_attempts),
            run_timeout: after.run_timeout.unwrap_or(spec.run_timeout),
            labels: after.labels.clone().unwrap_or_else(|| Arc::clone(&spec.labels)),
            payload_bytes: after.payload.map_or(spec.payload_bytes, |payload| payload.bytes),
            ..spec
        });
        if after.payload.is_some() {
            path.job.payload_recorded_at = None;
        }
        // An event that says no time leaves the job's place among those that wait.
        let scheduled_at = after.scheduled_at.flatten();
        path.take(EventKind::Edited, JobStatus::Queued, Detail { scheduled_at, ..Detail::default() });
        path.events[0].edit = Some(Arc::new(changed));
        Ok(path.finish())
    }

    /// The fields that the edit sets to other values than they have.
    fn changed_by(&self, edit: &Edit, at: Tick) -> JobEdit {
        let (wanted, spec) = (&edit.fields, &self.spec);
        let mut changed = JobEdit::default();
        let JobEdit { before, after } = &mut changed;
        if let Some(priority) = wanted.priority.filter(|priority| *priority != spec.priority) {
            (before.priority, after.priority) = (Some(spec.priority), Some(priority));
        }
        if let Some(max_attempts) = wanted.max_attempts.filter(|most| *most != spec.max_attempts) {
            (before.max_attempts, after.max_attempts) = (Some(spec.max_attempts), Some(max_attempts));
        }
        if let Some(run_timeout) = wanted.run_timeout.filter(|timeout| *timeout != spec.run_timeout) {
            (before.run_timeout, after.run_timeout) = (Some(spec.run_timeout), Some(run_timeout));
        }
        if let Some(labels) = wanted.labels.as_ref().filter(|labels| **labels != spec.labels) {
            (before.labels, after.labels) = (Some(Arc::clone(&spec.labels)), Some(Arc::clone(labels)));
        }
        if let Some(time) = wanted.scheduled_at {
            // Without a time it is ready now, unless it is ready already.
            let time = time.or_else(|| self.is_scheduled().then_some(at.now));
            if time.is_some() && time != self.scheduled_at {
                (before.scheduled_at, after.scheduled_at) = (Some(self.scheduled_at), Some(time));
            }
        }
        if let Some(payload) = wanted.payload.filter(|payload| *payload != edit.found.payload) {
            (before.payload, after.payload) = (Some(edit.found.payload), Some(payload));
        }
        changed
    }
}
