//! Hears of workers, and lists them: what the database has of them, what this server has heard since, and what they hold.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::TimeDelta;

use super::{HeardClaim, Ledger, LedgerError, ListOrder, ListQuery, workers::WRITTEN_EVERY};
use crate::{
    domain::{
        clock::Time,
        id::OrgId,
        job_filter::JobFilter,
        status::JobStatus,
        worker::{Worker, WorkerAbout},
    },
    store::{HeardWorker, Store, StoreError, WorkerPage},
};

/// Jobs read at once, and running jobs that are counted.
const PAGE: usize = 1_000;
const COUNTED: usize = 4_000;

/// What a worker holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holding {
    /// Its running jobs.
    pub jobs: i64,
    /// When the attempt began that it has been holding for longest.
    pub since: Option<Time>,
}

/// A page of workers.
#[derive(Debug)]
pub struct ListedWorkers {
    /// The workers, in the order of their ids, with what they hold.
    pub workers: Vec<(Worker, Holding)>,
    /// True if there are more.
    pub has_more: bool,
    /// True if the org has more running jobs than were counted.
    pub is_held_truncated: bool,
    /// True if workers may be missing.
    pub lacks_some: bool,
    /// The database's clock.
    pub as_of: Time,
}

impl Ledger {
    /// Notes that a worker claims, until the returned value is dropped.
    #[must_use]
    pub fn hear_claim(&self, org: OrgId, worker: &Arc<str>, about: WorkerAbout) -> Option<HeardClaim> {
        self.workers.claims(org, worker, about, Instant::now())
    }

    /// Notes a heartbeat of a worker.
    pub fn hear_heartbeat(&self, org: OrgId, worker: &Arc<str>) {
        self.workers.beats(org, worker, Instant::now());
    }

    /// How long a silent worker is known.
    pub fn workers_known_for(&self) -> Duration {
        self.workers.known_for()
    }

    /// Takes workers that the database is to be told of, up to `most`. Returns whether there may be more.
    pub fn take_heard_workers(&self, most: usize) -> (Vec<HeardWorker>, bool) {
        self.workers.take_due(most, Instant::now())
    }

    /// Puts workers back that could not be written.
    pub fn put_heard_workers_back(&self, taken: &[HeardWorker]) {
        self.workers.put_back(taken);
    }

    /// Reads at most `limit` workers of an org whose ids come after `after`, in ascending order.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn workers(&self, org: OrgId, after: &str, limit: usize) -> Result<ListedWorkers, LedgerError> {
        let (from, known_for) = (after.to_owned(), self.workers.known_for());
        let read = move |store: Arc<dyn Store>| async move {
            let page = store.workers(org, &from, limit + 1, known_for).await?;
            Ok((page, held(&*store, org).await?))
        };
        let (WorkerPage { workers, as_of }, (held, is_held_truncated)) = self.lists.read(org, read).await?;
        let by_id = merge(workers, self.workers.of_org(org, after, limit + 1, Instant::now()), as_of);
        let has_more = by_id.len() > limit;
        let workers = by_id.into_values().take(limit).map(|worker| {
            let held = held.get(&worker.id).copied().unwrap_or_default();
            (worker, held)
        });
        let lacks_some = self.workers.lacks_some(org);
        Ok(ListedWorkers { workers: workers.collect(), has_more, is_held_truncated, lacks_some, as_of })
    }
}

/// Merges the database's rows with what this server has heard.
pub(super) fn merge(rows: Vec<Worker>, heard: Vec<HeardWorker>, as_of: Time) -> BTreeMap<Arc<str>, Worker> {
    // Who waits is written again and again. A row that was not is of a server that is gone.
    let is_lately =
        |worker: &Worker| as_of - worker.heard_at < TimeDelta::from_std(WRITTEN_EVERY * 2).unwrap_or_default();
    let row = |worker: Worker| {
        let is_waiting = worker.is_waiting && is_lately(&worker);
        (Arc::clone(&worker.id), Worker { is_waiting, ..worker })
    };
    let mut by_id: BTreeMap<_, _> = rows.into_iter().map(row).collect();
    for HeardWorker { id, about, is_waiting, silent_for, .. } in heard {
        let heard_at = as_of - silent_for;
        let nothing = || Worker { id: Arc::clone(&id), about: Arc::default(), is_waiting: false, heard_at };
        let known = by_id.entry(Arc::clone(&id)).or_insert_with(nothing);
        // Another server may have heard of it later.
        if let Some(about) = about.filter(|_| known.heard_at <= heard_at || is_waiting) {
            (known.about, known.is_waiting) = (about, is_waiting);
        }
        known.heard_at = known.heard_at.max(heard_at);
    }
    by_id
}

/// What each worker of an org holds, and whether there is more.
async fn held(store: &dyn Store, org: OrgId) -> Result<(HashMap<Arc<str>, Holding>, bool), StoreError> {
    let filter = JobFilter { statuses: vec![JobStatus::Running], ..JobFilter::default() };
    let mut query = ListQuery::first(filter, ListOrder::OldestFirst, PAGE);
    let (mut held, mut counted) = (HashMap::<_, Holding>::new(), 0);
    loop {
        let page = store.list(org, &query).await?;
        counted += page.jobs.len();
        for job in &page.jobs {
            let Some(lease) = &job.lease else { continue };
            let of_worker = held.entry(Arc::clone(&lease.worker)).or_default();
            of_worker.jobs += 1;
            let since = job.attempt_started_at;
            of_worker.since =
                of_worker.since.map_or(since, |known| since.map_or(Some(known), |since| Some(known.min(since))));
        }
        let Some(next) = page.next else { return Ok((held, false)) };
        if counted >= COUNTED {
            return Ok((held, true));
        }
        query.after = next;
    }
}
