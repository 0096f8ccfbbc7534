//! Edits of queued jobs.

use super::{Author, Command, JobReply, Ledger, LedgerError};
use crate::domain::{
    edit::PayloadMark,
    id::JobId,
    transition::{self, Edit, FoundPayload, TransitionError},
};

/// How often a payload is read again because its job has changed meanwhile.
const READS: usize = 8;

impl Ledger {
    /// Changes what a queued job asks for. A new payload is compared with the one that the job has, which is read first:
    /// decisions know no payloads.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`], [`LedgerError::Transition`], [`LedgerError::QuotaExceeded`]; else as for
    /// [`Ledger::submit`].
    pub async fn edit(&self, by: impl Into<Author>, job: JobId, mut edit: Edit) -> Result<JobReply, LedgerError> {
        let by = by.into();
        for read in 1.. {
            if edit.fields.payload.is_some() {
                let (record, _turn) = self.job(by.org, job).await?;
                let payload = PayloadMark::of(record.job.spec.payload_bytes, record.contents.payload.as_ref());
                edit.found = FoundPayload { last_seq: record.job.last_seq, payload };
            }
            let command = Box::new(transition::Command::Edit(Box::new(edit.clone())));
            match self.submit(by.clone(), Command::Apply { job, command }).await {
                Err(LedgerError::Transition(TransitionError::PayloadOutdated)) if read < READS => {}
                answer => return answer,
            }
        }
        unreachable!("the last read returns")
    }
}
