//! Sweeps orgs with due jobs: ends leases and attempts, and makes scheduled jobs ready, by commands in the orgs' lanes.
//!
//! `org_due` has the next time of each org, so orgs without due jobs cost nothing. After an outage of this server or
//! its database, workers get time to report before their leases end.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{sleep_until, timeout_at},
};

use crate::{
    domain::id::OrgId,
    ledger::{Ledger, LedgerError, SweepRequest, Swept},
    store::{DueWork, Store},
};

/// The pause when nothing was due.
const LOOK: Duration = Duration::from_millis(250);
/// Orgs that are swept at the same time: as many as a few transactions carry.
const ORGS: usize = 256;
/// Batches of one sweep of an org. What is left falls due again, after orgs that were due before.
const BATCHES: usize = 10;
/// An org's callers are expected again for this long after a batch that had their commands.
const COMPANY: Duration = Duration::from_millis(100);
/// How long an org is reserved for the server that took it. If that server dies, another takes over.
const HOLD: Duration = Duration::from_secs(2);

pub(super) async fn run(ledger: &Ledger, store: &Arc<dyn Store>) {
    let mut reachable = Reachable::default();
    // Orgs are swept concurrently, so that a slow one does not delay others.
    let (mut sweeps, mut busy) = (JoinSet::new(), HashSet::new());
    // Until when orgs with more due jobs are expected to have callers.
    let mut company = HashMap::new();
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
                        let company = company.remove(&org).unwrap_or_else(|| Instant::now() + COMPANY);
                        sweeps.spawn(async move { (org, sweep(&ledger, org, since, company).await) });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "can't query for orgs with due jobs; trying again");
                    reachable.failed();
                }
            }
        }
        let until = Instant::now() + LOOK;
        let mut has_failed = false;
        while let Ok(Some(ended)) = timeout_at(until.into(), sweeps.join_next()).await {
            // A panic in a sweep is a defect, which the next sweep will show again.
            let Ok((org, swept)) = ended else { continue };
            busy.remove(&org);
            match swept {
                Ended::Done => {}
                Ended::HasMore { company_until } => {
                    company.insert(org, company_until);
                    is_more_due |= !has_failed;
                }
                Ended::Failed => {
                    reachable.failed();
                    // Don't retry a failing org at once.
                    (has_failed, is_more_due) = (true, false);
                }
            }
            if is_more_due && busy.len() <= ORGS / 2 {
                break;
            }
        }
        if sweeps.is_empty() && !is_more_due {
            busy.clear();
            company.clear();
            sleep_until(until.into()).await;
        }
    }
}

/// How a sweep ended.
enum Ended {
    /// Nothing is due.
    Done,
    /// There is more, and callers of the org are expected until then.
    HasMore { company_until: Instant },
    /// The org falls due again.
    Failed,
}

/// Runs batches in one org until nothing is due, at most [`BATCHES`].
async fn sweep(ledger: &Ledger, org: OrgId, since: Instant, mut company_until: Instant) -> Ended {
    for _ in 0..BATCHES {
        let at = Instant::now();
        match ledger.sweep(org, SweepRequest { reachable_since: since, at, has_company: at < company_until }).await {
            Ok(Swept { has_more: false, .. }) | Err(LedgerError::Draining) => return Ended::Done,
            Ok(swept) if swept.has_company => company_until = Instant::now() + COMPANY,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(org_id = %org, %error, "can't sweep the org's due jobs; trying again");
                return Ended::Failed;
            }
        }
    }
    Ended::HasMore { company_until }
}

/// Since when workers can reach the ledger through this server.
#[derive(Default)]
struct Reachable {
    /// When the current stretch began, and the last time that the database answered.
    known: Option<(Instant, Instant)>,
}

impl Reachable {
    fn failed(&mut self) {
        self.known = None;
    }

    fn succeeded(&mut self) -> Instant {
        let now = Instant::now();
        // A longer gap means that the database or this process was down.
        let (since, _) = self.known.filter(|(_, last)| now - *last < SweepRequest::OUTAGE).unwrap_or((now, now));
        self.known = Some((since, now));
        since
    }
}
