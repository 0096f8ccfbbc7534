//! Why a job does not run: what the lane says, and which workers ask for its type.

use std::{sync::Arc, time::Instant};

use super::{Author, Explain, Explanation, Ledger, LedgerError, submission::Submission};
use crate::{
    domain::{id::JobId, job_type::ALL_TYPES, status::JobStatus},
    store::Store,
};

/// Workers that are looked through.
const WORKERS: usize = 5_000;

/// Why a job does not run.
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// What the code that decides claims says.
    pub decided: Explanation,
    /// Workers whose last claim asked for the job's type, on any server. 0 unless the job is queued.
    pub asking: usize,
    /// Those of them that wait for a job.
    pub waiting: usize,
}

impl Ledger {
    /// Explains why a job does not run, as of a `seq` of its org's log.
    ///
    /// # Errors
    ///
    /// [`LedgerError::JobNotFound`]; else as for [`Ledger::submit`].
    pub async fn explain(&self, by: impl Into<Author>, job: JobId) -> Result<Explained, LedgerError> {
        let by = by.into();
        let org = by.org;
        // A job's type never changes.
        let (record, turn) = self.job(org, job).await?;
        let job_type = Arc::clone(&record.job.spec.job_type);
        drop((record, turn));
        debug_assert!(*job_type != *ALL_TYPES, "no job has this type");
        let asked = Box::new(Explain::new(job, Arc::clone(&job_type)));
        let decided: Explanation = self.ask(by, Submission::Explain, asked).await?;
        let (mut asking, mut waiting) = (0, 0);
        if decided.job.status == JobStatus::Queued {
            let known_for = self.workers.known_for();
            let read = move |store: Arc<dyn Store>| async move { store.workers(org, "", WORKERS, known_for).await };
            let known = self.lists.read(org, read).await?.workers;
            let heard = self.workers.of_org(org, "", WORKERS, Instant::now());
            // What this server has heard itself is the latest.
            let elsewhere = known.iter().filter(|known| heard.binary_search_by(|own| own.id.cmp(&known.id)).is_err());
            let all = elsewhere.map(|known| (&known.about, known.is_waiting));
            for (about, is_waiting) in all.chain(heard.iter().map(|own| (&own.about, own.is_waiting))) {
                if about.asks_for(&job_type) {
                    asking += 1;
                    waiting += usize::from(is_waiting);
                }
            }
        }
        Ok(Explained { decided, asking, waiting })
    }
}
