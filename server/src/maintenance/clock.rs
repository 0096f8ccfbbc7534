//! What is done about a clock that somebody sets: it is read every other second; where it jumped ahead, or nobody has seen it for long,
//! retention waits; and it is said.

use std::{future::Future, time::Duration};

use chrono::TimeDelta;
use tokio::{sync::watch, time::sleep};

use crate::{
    domain::{id::OrgId, lease::LONGEST_LEASE},
    ledger::{ClockStep, Ledger, LedgerError},
    store::{Store, StoreError},
};

/// How long retention waits after a jump, unless somebody says that the clock is right.
const DOUBT: Duration = Duration::from_secs(3_600);
/// Where no server has seen the clock for longer, it may have been set meanwhile.
const UNSEEN: TimeDelta = TimeDelta::hours(1);
/// How often it is noted that it was seen.
const NOTE: Duration = Duration::from_secs(60);
/// Orgs looked at in one go.
const ORGS: usize = 100;
/// The wait after something that failed, and before all orgs are gone through again because of one.
const RETRY: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_secs(10);

/// Has retention wait if the clock may have been set while no server was there. To be done before anything is removed.
pub(super) async fn after_absence(store: &dyn Store) {
    let unseen = insist("can't note when the clock was seen", || store.note_clock(UNSEEN, DOUBT)).await;
    if let Some(unseen) = unseen.filter(|unseen| unseen.abs() > UNSEEN) {
        tracing::warn!(
            seconds = unseen.num_seconds(),
            "no server has seen the clock for long, or it was set: retention waits for an hour, or for `jobledger confirm-clock`"
        );
    }
}

/// Watches the clock.
pub(super) async fn run(ledger: &Ledger, store: &dyn Store) {
    // It may have been ahead, and have been set back, when no server was there to see it.
    let set_back = watch::Sender::new(Some(LONGEST_LEASE));
    tokio::join!(react(ledger, store, &set_back), redate(ledger, store, set_back.subscribe()), note(store));
}

async fn react(ledger: &Ledger, store: &dyn Store, set_back: &watch::Sender<Option<Duration>>) {
    loop {
        let step = ledger.clock_step().await;
        // Also where it was set back: of what was ahead by a year that may be an hour.
        hold(store).await;
        match step {
            ClockStep::Ahead(by) => {
                ledger.retention_waits();
                tracing::error!(
                    seconds = by.num_seconds(),
                    "the database's clock jumped ahead: leases go on as if it had not, retention waits for an hour, or for \
                     `jobledger confirm-clock`"
                );
            }
            ClockStep::Back(by) => {
                tracing::error!(seconds = by.num_seconds(), "the database's clock was set back");
                set_back.send_modify(|known| *known = (*known).max(by.to_std().ok()));
            }
        }
    }
}

/// Has every org's leases and waits dated anew that were dated by a clock that was ahead, whenever it was set back.
async fn redate(ledger: &Ledger, store: &dyn Store, mut set_back: watch::Receiver<Option<Duration>>) {
    loop {
        let by = (*set_back.borrow_and_update()).unwrap_or(LONGEST_LEASE);
        let mut is_done = true;
        let mut after = None;
        loop {
            let orgs =
                insist("can't look for what a clock that was ahead has put off", || store.orgs(after, ORGS)).await;
            let Some(last) = orgs.last() else { break };
            after = Some(*last);
            for org in orgs {
                is_done &= redate_org(ledger, org, by).await;
            }
        }
        if is_done {
            // The sender lives as long as this.
            let _ = set_back.changed().await;
        } else {
            sleep(AGAIN).await;
        }
    }
}

/// False if it has to be done again.
async fn redate_org(ledger: &Ledger, org: OrgId, by: Duration) -> bool {
    loop {
        match ledger.redate(org, by).await {
            Ok(done) if !done.has_more => return true,
            Ok(_) => {}
            Err(LedgerError::Draining) => return true,
            Err(error) => {
                tracing::warn!(org_id = %org, %error, "can't date anew what a clock that was ahead has put off; trying again");
                return false;
            }
        }
    }
}

async fn hold(store: &dyn Store) {
    insist("can't have retention wait", || store.audit().pause_retention(DOUBT)).await;
}

async fn note(store: &dyn Store) {
    loop {
        sleep(NOTE).await;
        if let Err(error) = store.note_clock(UNSEEN, DOUBT).await {
            tracing::debug!(%error, "can't note that the clock was seen");
        }
    }
}

/// Does it until it is done.
async fn insist<T, F: Future<Output = Result<T, StoreError>>>(failure: &'static str, attempt: impl Fn() -> F) -> T {
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => tracing::warn!(%error, "{failure}; trying again"),
        }
        sleep(RETRY).await;
    }
}
