//! Hears of workers, and lists them: what the database has of them, what this server has heard since, and what they hold.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{HeardClaim, Ledger, LedgerError, ListOrder, ListQuery};
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

    /// Takes up to `limit` workers that the database is to be told of.
    pub fn take_heard_workers(&self, limit: usize) -> Vec<HeardWorker> {
        self.workers.take_due(limit, Instant::now())
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
        let mut by_id: BTreeMap<_, _> = workers.into_iter().map(|worker| (Arc::clone(&worker.id), worker)).collect();
        for heard in self.workers.of_org(org, after, limit + 1, Instant::now()) {
            let heard_at = as_of - heard.silent_for;
            // Another server may have heard of it later.
            if by_id.get(&heard.id).is_none_or(|known| known.heard_at <= heard_at) {
                let id = Arc::clone(&heard.id);
                by_id.insert(id, Worker { id: heard.id, about: heard.about, is_waiting: heard.is_waiting, heard_at });
            }
        }
        let has_more = by_id.len() > limit;
        let workers = by_id.into_values().take(limit).map(|worker| {
            let held = held.get(&worker.id).copied().unwrap_or_default();
            (worker, held)
        });
        Ok(ListedWorkers { workers: workers.collect(), has_more, is_held_truncated, as_of })
    }
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
