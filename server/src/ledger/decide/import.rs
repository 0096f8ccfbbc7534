//! Imports of jobs of other systems.

use std::sync::Arc;

use super::{
    super::{
        LedgerError,
        command::{Import, Imported},
    },
    Before, Log,
};
use crate::domain::{
    flow::Timeline,
    job::Job,
    transition::{ImportOutcome, Mark, Past},
};

impl Log {
    pub(super) fn import(&mut self, import: &Import) -> Result<Imported, LedgerError> {
        let Import { job: wanted, is_dry_run } = import;
        let is_erased = self.jobs.get(&wanted.id).is_some_and(|job| job.erased_at.is_some());
        if let Some(idempotency) = wanted.spec.idempotency.as_ref().filter(|_| !is_erased)
            && let Some(existing) = self.keys.get(&idempotency.key).filter(|id| **id != wanted.id)
        {
            return Err(LedgerError::IdempotencyKeyReused { existing: *existing });
        }
        let known = self.jobs.get(&wanted.id).map(|job| (job, self.marks.get(&wanted.id)));
        let (status, before, timeline) = match known {
            None => (None, Before::Nothing, Timeline::default()),
            Some((job, _)) => (Some(job.status), Before::of(job), Timeline::of(job)),
        };
        let (outcome, transition) = match Job::import(wanted, self.org, known, self.tick()) {
            Ok(brought) => brought,
            Err(refusal) => return Ok(Imported { outcome: Err(refusal), job: None, events: 0 }),
        };
        if outcome == ImportOutcome::New {
            self.add_to_stock(1, u64::from(wanted.spec.payload_bytes))?;
            self.is_new_type(&wanted.spec.job_type)?;
        }
        let (job, events) = (transition.job.clone(), transition.events.len());
        if transition.is_changed && !is_dry_run {
            self.add_type(&wanted.spec.job_type)?;
            if let Some(idempotency) = &job.spec.idempotency {
                self.keys.insert(Arc::clone(&idempotency.key), job.id);
            }
            self.has_brought_ended |= job.status.is_terminal();
            let past = wanted.past.iter().map(Past::key).collect();
            self.marks.insert(job.id, Mark { seq: job.last_seq, digest: wanted.digest, past });
            self.append(status, before, timeline, transition);
        }
        Ok(Imported { outcome: Ok(outcome), job: Some(job), events })
    }
}
