//! Removes expired jobs, org by org, by commands in the orgs' lanes.
//!
//! `org_due` has the time of each org's next sweep. At the server's start every org is swept once, since the
//! retention times may have changed.

use std::{future::pending, time::Duration};

use tokio::time::sleep;

use crate::{
    domain::id::OrgId,
    ledger::{Ledger, LedgerError, Retention},
    store::{DueWork, Store, StoreError},
};

/// Orgs in one query.
const ORGS: usize = 100;
/// Batches of one sweep of an org. What is left stays due, behind what fell due before.
const BATCHES: usize = 10;
/// How long an org is reserved for the server that took it. If that server dies, another takes over.
const HOLD: Duration = Duration::from_secs(60);
/// How often a paused retention checks whether it may continue.
const PAUSED_LOOK: Duration = Duration::from_millis(500);
/// The bounds of the pause between two queries for due orgs: a hundredth of the shortest retention time.
const LEAST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

pub(super) async fn run(ledger: &Ledger, store: &dyn Store, retention: Retention) {
    let Some(shortest) = retention.shortest() else { return pending().await };
    let wait = (shortest / 100).clamp(LEAST_WAIT, LONGEST_WAIT);
    while let Err(error) = sweep_all(ledger, store, retention).await {
        tracing::warn!(%error, "can't query for jobs whose retention is over; trying again");
        sleep(wait).await;
    }
    loop {
        match store.take_due(DueWork::Retention, ORGS, HOLD).await {
            Ok(orgs) if orgs.is_empty() => sleep(wait).await,
            Ok(orgs) => {
                if !sweep(ledger, store, &orgs, retention).await {
                    sleep(wait).await;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "can't query for jobs whose retention is over; trying again");
                sleep(wait).await;
            }
        }
    }
}

/// Waits while retention is paused. If that can't be read, removing will fail too, and its error is logged.
async fn await_turn(store: &dyn Store) {
    while store.about().await.is_ok_and(|about| about.is_retention_paused) {
        sleep(PAUSED_LOOK).await;
    }
}

async fn sweep_all(ledger: &Ledger, store: &dyn Store, retention: Retention) -> Result<(), StoreError> {
    let mut after = None;
    loop {
        await_turn(store).await;
        let orgs = store.orgs(after, ORGS).await?;
        let Some(last) = orgs.last() else { return Ok(()) };
        after = Some(*last);
        sweep(ledger, store, &orgs, retention).await;
    }
}

/// Removes expired jobs of some orgs, one batch of each org in turn, so that no org waits until another is done.
/// Returns false if any batch failed.
async fn sweep(ledger: &Ledger, store: &dyn Store, orgs: &[OrgId], retention: Retention) -> bool {
    let mut left: Vec<_> = orgs.iter().map(|org| (*org, 0)).collect();
    let mut is_done = true;
    for _ in 0..BATCHES {
        let mut with_more = Vec::new();
        for (org, mut jobs) in std::mem::take(&mut left) {
            await_turn(store).await;
            match ledger.retain(org, retention).await {
                Ok(removed) => {
                    jobs += removed.jobs;
                    if removed.has_more {
                        with_more.push((org, jobs));
                        continue;
                    }
                }
                Err(LedgerError::Draining) => return false,
                // The org stays due, or falls due again.
                Err(error) => {
                    tracing::warn!(org_id = %org, %error, "can't remove finished jobs; trying again later");
                    is_done = false;
                }
            }
            say(org, jobs);
        }
        left = with_more;
        if left.is_empty() {
            break;
        }
    }
    left.into_iter().for_each(|(org, jobs)| say(org, jobs));
    is_done
}

fn say(org: OrgId, jobs: usize) {
    if jobs > 0 {
        tracing::info!(org_id = %org, jobs, "removed finished jobs past their retention time");
    }
}
