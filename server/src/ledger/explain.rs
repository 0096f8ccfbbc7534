//! Why a job does not run: what the lane says, and which workers ask for its type.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::TimeDelta;

use super::{Author, Explain, Explanation, Ledger, LedgerError, submission::Submission, worker_list::merge};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job_type::ALL_TYPES,
        status::JobStatus,
        worker::Worker,
    },
    store::{SeriesKind, StatisticsQuery, Store, TypeStatistics, WorkerPage},
};

/// Workers that are looked through.
const WORKERS: usize = 5_000;
/// A worker that was silent for longer may be gone.
const ALIVE: TimeDelta = TimeDelta::minutes(1);
/// The time whose rate tells how long jobs wait.
const LATELY: TimeDelta = TimeDelta::minutes(15);
/// How often a batch is asked that could not tell.
const TRIES: u32 = 3;

/// Why a job does not run.
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// What the code that decides claims says.
    pub decided: Explanation,
    /// Workers that were heard of within a minute, and whose last claim asked for the job's type, on any server. 0 unless the job
    /// is queued.
    pub asking: usize,
    /// Those of them that wait for a job.
    pub waiting: usize,
    /// True if there may be more of both.
    pub lacks_some: bool,
    /// Attempts of jobs of the type that began within the last 15 minutes, per second. 0 unless the job is queued.
    pub begun_per_second: f64,
}

impl Explained {
    /// How long the job is likely to wait still. `None` if nothing tells.
    pub fn estimated_wait(&self) -> Option<Duration> {
        let Explanation { job, pauses, ahead, quota, as_of, .. } = &self.decided;
        if job.status != JobStatus::Queued || quota.is_some() {
            return None;
        }
        // It can't begin before its time, nor before the last of the pauses ends.
        let mut from = job.ready_at.max(*as_of);
        for pause in pauses.iter().flatten() {
            from = from.max(pause.until?);
        }
        let until_then = (from - *as_of).to_std().unwrap_or_default();
        if *ahead == 0 && self.waiting > 0 {
            return Some(until_then);
        }
        let in_turn = Duration::try_from_secs_f64((*ahead + 1) as f64 / self.begun_per_second).ok()?;
        Some(until_then + in_turn)
    }
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
        let mut tries = TRIES;
        let decided: Explanation = loop {
            let asked = Box::new(Explain::new(job, Arc::clone(&job_type)));
            let decided: Explanation = self.ask(by.clone(), Submission::Explain, asked).await?;
            tries -= 1;
            if !decided.is_unsure || tries == 0 {
                break decided;
            }
        };
        let (mut asking, mut waiting) = (0, 0);
        let mut lacks_some = false;
        if decided.job.status == JobStatus::Queued {
            let known_for = self.workers.known_for();
            let read = move |store: Arc<dyn Store>| async move { store.workers(org, "", WORKERS, known_for).await };
            let WorkerPage { workers, as_of } = self.lists.read(org, read).await?;
            lacks_some = workers.len() == WORKERS || self.workers.lacks_some(org);
            let all = merge(workers, self.workers.of_org(org, "", WORKERS, Instant::now()), as_of);
            let is_alive = |worker: &&Worker| as_of - worker.heard_at < ALIVE;
            for worker in all.values().filter(is_alive).filter(|worker| worker.about.asks_for(&job_type)) {
                asking += 1;
                waiting += usize::from(worker.is_waiting);
            }
        }
        let begun_per_second = self.begun_per_second(org, &decided).await?;
        Ok(Explained { decided, asking, waiting, lacks_some, begun_per_second })
    }

    /// How many jobs of a queued job's type begin per second.
    async fn begun_per_second(&self, org: OrgId, decided: &Explanation) -> Result<f64, LedgerError> {
        if decided.job.status != JobStatus::Queued {
            return Ok(0.0);
        }
        let types = vec![decided.job.spec.job_type.to_string()];
        let query = StatisticsQuery { types, window: LATELY, series: SeriesKind::None };
        let found = self.statistics(org, &query).await?;
        let seconds = (found.as_of - found.since).as_seconds_f64().max(1.0);
        let begun = |of_type: &TypeStatistics| {
            let [_, begun, ..] = of_type.flow.counts();
            begun as f64
        };
        Ok(found.types.iter().map(begun).sum::<f64>() / seconds)
    }
}
