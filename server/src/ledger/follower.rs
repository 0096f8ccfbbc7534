//! Brings commits of other servers and of imports to this process's subscribers and waiting claims.
//!
//! The follower listens to announcements, and reads the heads every few seconds in case an announcement was lost. It reads what
//! the tails lack, each org's log once for all its subscribers.

use std::{
    collections::{HashMap, HashSet},
    future::pending,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::Semaphore, task::JoinSet, time::sleep};

use super::{
    claim_waiters::ClaimWaiters,
    hub::{Gap, Hub},
    own_commits::OwnCommits,
};
use crate::{
    domain::id::OrgId,
    store::{EventFilter, EventQuery, Listener, News, Reach, Store, StoreError},
};

/// How often it reads the heads. A lost announcement delays events by no more than this.
const LOOK: Duration = Duration::from_secs(5);
/// Orgs whose heads one query reads.
const ORGS_PER_LOOK: usize = 256;
/// Orgs whose logs are read concurrently.
const READS: usize = 2;
/// Bounds of a page of missing events.
const PAGE_EVENTS: usize = 512;
const PAGE_BYTES: usize = 1 << 20;
/// Pause after a failed read.
const PAUSE: Duration = Duration::from_millis(250);

/// Follows the logs that have subscribers or waiting claims here.
pub(super) struct Follower {
    store: Arc<dyn Store>,
    hub: Arc<Hub>,
    waiting: Arc<ClaimWaiters>,
    own: Arc<OwnCommits>,
}

impl Follower {
    pub(super) fn new(store: Arc<dyn Store>, hub: Arc<Hub>, waiting: Arc<ClaimWaiters>, own: Arc<OwnCommits>) -> Self {
        Self { store, hub, waiting, own }
    }

    /// Follows for as long as it is polled.
    pub(super) async fn run(self) {
        tokio::join!(self.listen(), self.look_now_and_then(), self.fetch());
    }

    async fn listen(&self) {
        let Some(mut listener) = self.store.listen() else { return pending().await };
        let listener: &mut dyn Listener = &mut *listener;
        loop {
            match listener.next().await {
                News::Reaches(reaches) => self.own.heard(reaches),
                News::Missed => self.read_heads().await,
            }
        }
    }

    async fn look_now_and_then(&self) {
        loop {
            sleep(LOOK).await;
            let turn = self.hub.turn();
            if let Ok(about) = self.store.about().await {
                self.hub.is_of_log(turn, about.log_id);
            }
            self.read_heads().await;
        }
    }

    /// Reads how far the logs reach that have subscribers or waiting claims here.
    async fn read_heads(&self) {
        // Taken before the query: the database has at least these events, unless it lost some.
        let ends: HashMap<_, _> = self.hub.ends().into_iter().collect();
        let orgs: HashSet<_> = ends.keys().copied().chain(self.waiting.orgs()).collect();
        for orgs in Vec::from_iter(orgs).chunks(ORGS_PER_LOOK) {
            match self.store.reaches(orgs).await {
                Ok(reaches) => {
                    self.look_back(orgs, &ends, &reaches);
                    self.own.heard(reaches);
                }
                Err(error) => return tracing::debug!(%error, "can't look for what others have committed"),
            }
        }
    }

    /// Restarts the tails of logs that end before their tail: a standby that lacks commits took over.
    fn look_back(&self, orgs: &[OrgId], ends: &HashMap<OrgId, Option<i64>>, reaches: &[(OrgId, Reach)]) {
        let reaches: HashMap<_, _> = reaches.iter().map(|(org, reach)| (org, reach.seq)).collect();
        for org in orgs {
            let seq = reaches.get(org).copied().unwrap_or_default();
            if ends.get(org).copied().flatten().is_some_and(|end| seq < end) {
                tracing::error!(org_id = %org, seq, "the log's head went back: the database lost commits; subscribers get an error");
                self.hub.restart(*org);
            }
        }
    }

    /// Reads what the tails lack.
    async fn fetch(&self) {
        let turns = Arc::new(Semaphore::new(READS));
        let mut reads = JoinSet::new();
        loop {
            for org in self.hub.behind().await {
                // The semaphore is never closed.
                let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
                while reads.try_join_next().is_some() {}
                let (store, hub) = (Arc::clone(&self.store), Arc::clone(&self.hub));
                reads.spawn(async move {
                    let fetched = async {
                        while let Some(gap) = hub.gap(org) {
                            fetch_page(&*store, &hub, org, gap).await?;
                        }
                        Ok::<_, StoreError>(())
                    };
                    let fetched = fetched.await;
                    drop(turn);
                    if let Err(error) = fetched {
                        tracing::debug!(org_id = %org, %error, "can't read what others have committed");
                        sleep(PAUSE).await;
                        hub.fall_behind(org);
                    }
                });
            }
        }
    }
}

/// Reads the next page of what a tail lacks.
async fn fetch_page(store: &dyn Store, hub: &Hub, org: OrgId, gap: Gap) -> Result<(), StoreError> {
    let filter = EventFilter::all();
    let query = EventQuery { filter, after: gap.end, max_events: PAGE_EVENTS, max_bytes: PAGE_BYTES };
    let page = store.events(org, &query).await?;
    if page.head <= gap.end {
        // The announcement was false. Anyone on the database may send a NOTIFY.
        hub.correct(org, page.head);
        return Ok(());
    }
    let is_whole = page.events.iter().zip(gap.end + 1..).all(|(event, expected)| event.seq() == expected);
    if page.events.is_empty() || !is_whole {
        // Retention removed events meanwhile, or the database is another one. Each subscriber reads it for itself.
        hub.restart(org);
        return Ok(());
    }
    hub.publish(org, &page.events);
    Ok(())
}
