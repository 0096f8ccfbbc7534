//! What erasures change beside the rows of their jobs.

use std::sync::Arc;

use super::Log;
use crate::{
    domain::{id::JobId, job::Job},
    store::{Edited, StoredEvent, StoredEvents, Unblanked},
};

impl Log {
    /// Blanks the events of a job that was erased and was `erased` before: those of this batch, and as many of the stored ones as
    /// were loaded. Notes what the job loses beside its row.
    pub(super) fn note_erasure(&mut self, erased: &Job, is_new: bool) {
        let (id, spec) = (erased.id, &erased.spec);
        if let Some(idempotency) = &spec.idempotency {
            self.keys.remove(&idempotency.key);
        }
        self.changes.payloads.retain(|payload| payload.job != id);
        for event in self.changes.events.iter_mut().filter(|event| event.job_id == id) {
            let before = event.weight() as i64;
            Arc::make_mut(event).blank(&spec.requested_by);
            self.head.stock.bytes += event.weight() as i64 - before;
        }
        if is_new {
            return;
        }
        self.note_rewritten(Edited {
            job: id,
            created_seq: erased.created_seq,
            labels_before: Some(Arc::clone(&spec.labels)),
            has_other_payload: true,
            is_erased: true,
        });
        let stored = self.erasures.events.remove(&id).unwrap_or_default();
        let unblanked = self.blank(Unblanked::of(erased), stored);
        if !unblanked.is_done() {
            self.wake_at = Some(self.now);
            self.changes.unblanked.push(unblanked);
        }
    }

    /// Blanks stored events. Returns what is left then.
    fn blank(&mut self, mut unblanked: Unblanked, stored: StoredEvents) -> Unblanked {
        for StoredEvent { mut event, bytes } in stored.events {
            event.blank(&unblanked.requester);
            self.head.stock.bytes += event.weight() as i64 - bytes;
            unblanked.after = event.seq;
            self.changes.blanked.push(event);
        }
        if stored.are_all {
            unblanked.after = unblanked.last;
        }
        unblanked
    }

    /// Blanks the next events that an earlier erasure has left. True unless all are blank.
    pub(super) fn blank_next(&mut self) -> bool {
        // Retention may have removed these events in this batch.
        let is_retaining = !self.changes.removed.is_empty() || self.changes.removed_slice.is_some();
        if is_retaining {
            return !self.erasures.left.is_empty() || !self.changes.unblanked.is_empty();
        }
        if !self.erasures.left.is_empty() {
            let next = self.erasures.left.remove(0);
            let stored = self.erasures.events.remove(&next.job).unwrap_or_default();
            let unblanked = self.blank(next, stored);
            self.changes.unblanked.push(unblanked);
            self.wake_at = Some(self.now);
        }
        !self.changes.unblanked.is_empty()
    }

    /// Blanks the next events of this erased job. True if more are left.
    pub(super) fn blank_next_of(&mut self, job: JobId) -> bool {
        if self.erasures.left.first().is_some_and(|next| next.job == job) {
            self.blank_next();
        }
        let is_unblanked = |left: &Unblanked| left.job == job && !left.is_done();
        self.changes.unblanked.iter().chain(&self.erasures.left).any(is_unblanked)
    }

    /// True if the batch may still erase this job: all of its events were loaded, or it is the first one.
    pub(super) fn may_erase(&self, job: &Job) -> bool {
        let has_all = self.erasures.events.get(&job.id).is_some_and(|stored| stored.are_all);
        let may = self.changes.unblanked.is_empty() && (has_all || self.changes.blanked.is_empty());
        may || job.erased_at.is_some()
    }
}
