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

/// How often it looks.
const LOOK: Duration = Duration::from_millis(250);
/// Orgs looked at in one go.
const ORGS: usize = 64;
/// How long an org is left to the server that took it. Should that one die, another takes over.
const HOLD: Duration = Duration::from_secs(2);

pub(super) async fn run(ledger: &Ledger, store: &Arc<dyn Store>) {
    let mut reachable = Reachable::default();
    // One org that is slow stands in nobody's way.
    let (mut looks, mut busy) = (JoinSet::new(), HashSet::new());
    loop {
        let room = ORGS.saturating_sub(busy.len());
        if room > 0 {
            match store.take_due(DueWork::Jobs, room, HOLD).await {
                Ok(orgs) => {
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
            let Ok((org, looked)) = ended else { continue };
            busy.remove(&org);
            match looked {
                Looked::HasMore => break,
                Looked::Done => {}
                Looked::Failed => reachable.failed(),
            }
        }
        if looks.is_empty() && Instant::now() < until {
            busy.clear();
            sleep_until(until.into()).await;
        }
    }
}

enum Looked {
    Done,
    HasMore,
    Failed,
}

/// Does what is due in one org, as much as one batch may: where there is more, it is due again at once.
async fn look(ledger: &Ledger, org: OrgId, since: Instant) -> Looked {
    match ledger.look(org, Asked { reachable_since: since, at: Instant::now() }).await {
        Ok(looked) if looked.has_more => Looked::HasMore,
        Ok(_) | Err(LedgerError::Draining) => Looked::Done,
        // It falls due again.
        Err(error) => {
            tracing::warn!(org_id = %org, %error, "can't do what is due; trying again");
            Looked::Failed
        }
    }
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
