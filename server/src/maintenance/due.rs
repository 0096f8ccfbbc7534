//! Does what is due: ends leases and attempts, and makes jobs ready whose time has come, as commands in the lanes of their
//! orgs.
//!
//! `org_due` leads it, so nothing is looked for where nothing is due. Workers who could not reach the ledger for a while, because this
//! server was not there, or its database, are given time to be heard again before their leases end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::sleep};

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
    loop {
        let taken = store.take_due(DueWork::Jobs, ORGS, HOLD).await;
        let orgs = match taken {
            Ok(orgs) => orgs,
            Err(error) => {
                tracing::warn!(%error, "can't look for what is due; trying again");
                reachable.failed();
                sleep(LOOK).await;
                continue;
            }
        };
        let since = reachable.succeeded();
        if orgs.is_empty() {
            sleep(LOOK).await;
            continue;
        }
        let mut looks = JoinSet::new();
        for org in orgs {
            looks.spawn(look(ledger.clone(), org, since));
        }
        if looks.join_all().await.contains(&false) {
            reachable.failed();
            sleep(LOOK).await;
        }
    }
}

/// Does what is due in one org, as much as one batch may: where there is more, it is due again at once. False if the database
/// was in the way.
async fn look(ledger: Ledger, org: OrgId, since: Instant) -> bool {
    match ledger.look(org, Asked { reachable_since: since, at: Instant::now() }).await {
        Ok(_) | Err(LedgerError::Draining) => true,
        // It falls due again.
        Err(error) => {
            tracing::warn!(org_id = %org, %error, "can't do what is due; trying again");
            false
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
