//! Erasures of jobs.

use super::{Author, Command, JobReply, Ledger, LedgerError};
use crate::domain::{
    id::JobId,
    transition::{self, Erase},
};

impl Ledger {
    /// Blanks a job and its events for good. Returns once all of them are blank. A job with more events than one batch may blank
    /// takes several batches; if this future is dropped, sweeps blank the rest.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`], [`LedgerError::Transition`]; else as for [`Ledger::submit`].
    pub async fn erase(&self, by: impl Into<Author>, job: JobId, erase: Erase) -> Result<JobReply, LedgerError> {
        let by = by.into();
        loop {
            let command = Box::new(transition::Command::Erase(erase.clone()));
            let reply = self.submit(by.clone(), Command::Apply { job, command }).await?;
            if !reply.is_unfinished {
                self.reads.forget(by.org, job);
                return Ok(reply);
            }
        }
    }
}
