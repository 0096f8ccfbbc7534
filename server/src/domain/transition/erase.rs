//! Erasures: what people have put into a job is blanked for good.

use std::sync::Arc;

use super::{
    Tick, Transition, TransitionError,
    builder::{Detail, Path},
};
use crate::domain::job::Job;

/// Blanks a job and its events. What the ledger itself needs stays: places in the log, kinds, statuses and times.
#[derive(Debug, Clone, PartialEq)]
pub struct Erase {
    /// Cancel a job that has not finished, at once: its worker's lease is lost. Otherwise such a job is refused.
    pub cancel: bool,
    /// The command is refused if this is not the job's etag.
    pub etag: Option<String>,
    /// Who asks; empty when unknown.
    pub actor: Arc<str>,
}

impl Job {
    pub(super) fn erase(&self, erase: &Erase, at: Tick) -> Result<Transition, TransitionError> {
        if self.erased_at.is_some() {
            return Ok(self.unchanged());
        }
        self.check_etag(erase.etag.as_deref())?;
        let mut path = Path::new(self, &erase.actor, at);
        if !self.status.is_terminal() {
            if !erase.cancel {
                return Err(TransitionError::InvalidTransition { current: self.status });
            }
            path.cancel(Detail::default());
        }
        path.erase();
        Ok(path.finish())
    }
}
