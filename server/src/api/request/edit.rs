//! Edits of jobs.

use std::{collections::BTreeSet, sync::Arc};

use jobledger_proto::v1 as pb;
use prost::Message as _;

use super::{super::status::ApiError, check::Check};
use crate::domain::{
    edit::{EditableField, EditableFields, PayloadMark},
    id::JobId,
    transition::{Edit, FoundPayload},
};

/// The job, and the changes.
pub(in super::super) fn edit(request: pb::UpdateJobRequest) -> Result<(JobId, Edit), ApiError> {
    let mut check = Check::default();
    let job = check.job_id(&request.job_id);
    let etag = check.token("etag", request.etag);
    let changes = pb::JobChanges {
        update_mask: request.update_mask,
        priority: request.priority,
        scheduled_at: request.scheduled_at,
        labels: request.labels,
        max_attempts: request.max_attempts,
        run_timeout: request.run_timeout,
    };
    let mut fields = check.job_changes("", &EditableField::ALL, changes, request.payload.is_some());
    let payload = check.value("payload", request.payload.as_ref());
    let payload_bytes = request.payload.as_ref().map_or(0, |payload| payload.encoded_len() as u32);
    check.finish()?;
    fields.payload = fields.payload.map(|_| PayloadMark::of(payload_bytes, payload.as_ref()));
    let found = FoundPayload::default();
    Ok((job, Edit { fields, payload, found, etag, actor: Arc::default() }))
}

impl Check {
    /// Checks changes of some of these fields. `prefix` goes before their names in violations. A payload that is named is marked by
    /// nothing yet.
    pub(super) fn job_changes(
        &mut self,
        prefix: &str,
        known: &[EditableField],
        changes: pb::JobChanges,
        has_payload: bool,
    ) -> EditableFields {
        let named = self.named_fields(prefix, known, &changes.update_mask.unwrap_or_default().paths);
        let is_present = |field| match field {
            EditableField::Payload => has_payload,
            EditableField::Priority => changes.priority != 0,
            EditableField::ScheduledAt => changes.scheduled_at.is_some(),
            EditableField::Labels => !changes.labels.is_empty(),
            EditableField::MaxAttempts => changes.max_attempts != 0,
            EditableField::RunTimeout => changes.run_timeout.is_some(),
        };
        for field in EditableField::ALL {
            self.that(&format!("{prefix}{}", field.as_str()), named.contains(&field) || !is_present(field), || {
                "is not named by update_mask".to_owned()
            });
        }
        let priority = self.priority(prefix, changes.priority);
        let max_attempts = self.max_attempts(prefix, changes.max_attempts);
        let run_timeout = self.run_timeout(prefix, changes.run_timeout.as_ref());
        self.labels(&format!("{prefix}labels"), &changes.labels);
        let at = &format!("{prefix}scheduled_at");
        let scheduled_at = changes.scheduled_at.and_then(|time| self.time(at, time));
        let is_named = |field| named.contains(&field);
        EditableFields {
            priority: is_named(EditableField::Priority).then_some(priority),
            max_attempts: is_named(EditableField::MaxAttempts).then_some(max_attempts),
            run_timeout: is_named(EditableField::RunTimeout).then_some(run_timeout),
            labels: is_named(EditableField::Labels).then(|| Arc::new(changes.labels)),
            scheduled_at: is_named(EditableField::ScheduledAt).then_some(scheduled_at),
            payload: is_named(EditableField::Payload).then(PayloadMark::default),
        }
    }

    fn named_fields(&mut self, prefix: &str, known: &[EditableField], paths: &[String]) -> BTreeSet<EditableField> {
        let mask = &format!("{prefix}update_mask");
        self.that(mask, !paths.is_empty(), || "must name at least one field".to_owned());
        let mut named = BTreeSet::new();
        for path in paths {
            let Some(field) = known.iter().find(|field| field.as_str() == path) else {
                let known: Vec<_> = known.iter().map(|field| field.as_str()).collect();
                self.refuse(mask, format!("{path:.100?} is none of {}", known.join(", ")));
                break;
            };
            named.insert(*field);
        }
        named
    }
}
