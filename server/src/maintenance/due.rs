//! Does what is due: ends leases and attempts, and makes jobs ready whose time has come, as commands in the lanes of their
//! orgs.
//!
//! `org_due` leads it, so nothing is looked for where nothing is due. Workers who could not reach the ledger for a while, because this
//! server was not there, or its database, are given time to be heard again before their leases end.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{sleep_until, timeout_at},
};

use crate::{
    domain::id::OrgId,
    ledger::{Asked, Ledger, LedgerError},
    store::{DueWork, Store},
};

/// How often it looks where nothing was due.
const LOOK: Duration = Duration::from_millis(250);
/// Orgs looked at in one go: as many as a few transactions carry.
const ORGS: usize = 256;
/// Batches that one look has do what is due in an org; what is left falls due again.
const BATCHES: usize = 100;
/// How long an org is left to the server that took it. Should that one die, another takes over.
const HOLD: Duration = Duration::from_secs(2);

pub(super) async fn run(ledger: &Ledger, store: &Arc<dyn Store>) {
    let mut reachable = Reachable::default();
    // One org that is slow stands in nobody's way.
    let (mut looks, mut busy) = (JoinSet::new(), HashSet::new());
    loop {
        let room = ORGS.saturating_sub(busy.len());
        let mut is_more_due = false;
        if room > 0 {
            match store.take_due(DueWork::Jobs, room, HOLD).await {
                Ok(orgs) => {
                    is_more_due = orgs.len() >= room;
                    let since = reachable.succeeded();
                    for org in orgs.into_iter().filter(|org| busy.insert(*org)) {
                        let ledger = ledger.clone();
                        looks.spawn(async move { (org, look(&ledger, org, since).await) });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "can't look for what is due; trying again");
                    reachable.failed();
                }
            }
        }
        let until = Instant::now() + LOOK;
        while let Ok(Some(ended)) = timeout_at(until.into(), looks.join_next()).await {
            // A panic in a look is a defect that the next one will show again.
            let Ok((org, has_succeeded)) = ended else { continue };
            busy.remove(&org);
            if !has_succeeded {
                reachable.failed();
                // Not at once again.
                is_more_due = false;
            }
            if is_more_due && busy.len() <= ORGS / 2 {
                break;
            }
        }
        if looks.is_empty() && !is_more_due {
            busy.clear();
            sleep_until(until.into()).await;
        }
    }
}

/// Does all that is due in one org, a batch after the other. False if that failed: it falls due again.
async fn look(ledger: &Ledger, org: OrgId, since: Instant) -> bool {
    for _ in 0..BATCHES {
        match ledger.look(org, Asked { reachable_since: since, at: Instant::now() }).await {
            Ok(looked) if looked.has_more => {}
            Ok(_) | Err(LedgerError::Draining) => return true,
            Err(error) => {
                tracing::warn!(org_id = %org, %error, "can't do what is due; trying again");
                return false;
            }
        }
    }
    true
}

/// Since when workers can reach the ledger here.
#[derive(Default)]
struct Reachable {
    /// Since when, and the last sign of it.
    known: Option<(Instant, Instant)>,
}

impl Reachable {
    fn failed(&mut self) {
        self.known = None;
    }

    fn succeeded(&mut self) -> Instant {
        let now = Instant::now();
        // The database was not there, or this process was not, if there was no sign of them for so long.
        let (since, _) = self.known.filter(|(_, last)| now - *last < Asked::OUTAGE).unwrap_or((now, now));
        self.known = Some((since, now));
        since
    }
}
