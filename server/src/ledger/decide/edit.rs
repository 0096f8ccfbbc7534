//! What edits change beside the rows of their jobs.

use super::{Before, Log};
use crate::{
    domain::transition::{Edit, Transition},
    store::{Edited, NewPayload},
};

impl Log {
    /// Notes what an edit takes from the rows beside the job's, and its new payload.
    pub(super) fn note_edit(&mut self, transition: &Transition, edit: &Edit) {
        let (job, Some(changed)) = (&transition.job, transition.events.first().and_then(|event| event.edit.as_ref()))
        else {
            return;
        };
        let is_new = self.touched.get(&job.id).is_some_and(|touched| touched.before == Before::Nothing);
        let has_other_payload = changed.after.payload.is_some();
        if has_other_payload {
            self.changes.payloads.retain(|payload| payload.job != job.id);
            let new = edit.payload.clone().map(|json| NewPayload { job: job.id, json, seq: None });
            self.changes.payloads.extend(new);
        }
        if is_new {
            return;
        }
        let labels_before = changed.before.labels.clone();
        let (job, created_seq, is_erased) = (job.id, job.created_seq, false);
        self.note_rewritten(Edited { job, created_seq, labels_before, has_other_payload, is_erased });
    }

    /// Notes that the row of a job is written whole.
    pub(super) fn note_rewritten(&mut self, new: Edited) {
        match self.changes.edited.iter_mut().find(|edited| edited.job == new.job) {
            Some(edited) => {
                edited.has_other_payload |= new.has_other_payload;
                edited.is_erased |= new.is_erased;
                edited.labels_before = edited.labels_before.take().or(new.labels_before);
            }
            None => self.changes.edited.push(new),
        }
    }
}
