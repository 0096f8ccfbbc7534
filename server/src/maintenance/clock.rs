//! Reacts to steps of the database's clock. `health.rs` reads the clock every other second. Retention waits after a
//! step, and after a time in which no server saw the clock. Each step is logged.

use std::{future::Future, time::Duration};

use chrono::TimeDelta;
use tokio::{sync::watch, time::sleep};

use crate::{
    domain::{id::OrgId, lease::LONGEST_LEASE},
    ledger::{ClockStep, Ledger, LedgerError},
    store::{Store, StoreError},
};

/// How long retention waits after a step, unless somebody confirms the clock.
const DOUBT: Duration = Duration::from_secs(3_600);
/// The longest gap between two sightings of the clock after which it is still trusted.
const UNSEEN: TimeDelta = TimeDelta::hours(1);
/// How often the sighting of the clock is written.
const NOTE: Duration = Duration::from_secs(60);
/// Orgs in one page.
const ORGS: usize = 100;
/// The pause after a failed call, and the pause before all orgs are redated again because one failed.
const RETRY: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_secs(10);

/// Makes retention wait if the clock may have been set while no server ran. Must complete before anything is removed.
pub(super) async fn after_absence(store: &dyn Store) {
    let unseen = insist("can't record the time of this clock check", || store.note_clock(UNSEEN, DOUBT)).await;
    if let Some(unseen) = unseen.filter(|unseen| unseen.abs() > UNSEEN) {
        tracing::warn!(
            seconds = unseen.num_seconds(),
            "no server ran for an hour, or the clock was set: retention pauses for an hour, or until `jobledger confirm-clock`"
        );
    }
}

/// Reacts to steps until it is dropped.
pub(super) async fn run(ledger: &Ledger, store: &dyn Store) {
    // The clock may have been ahead and set back while no server ran, so each start redates once.
    let set_back = watch::Sender::new(Some(LONGEST_LEASE));
    tokio::join!(react(ledger, store, &set_back), redate(ledger, store, set_back.subscribe()), note(store));
}

async fn react(ledger: &Ledger, store: &dyn Store, set_back: &watch::Sender<Option<Duration>>) {
    loop {
        let step = ledger.clock_step().await;
        // Also after a step back: a clock that was a year ahead may have been set back by only an hour.
        hold(store).await;
        match step {
            ClockStep::Ahead(by) => {
                ledger.retention_waits();
                tracing::error!(
                    seconds = by.num_seconds(),
                    "the database's clock jumped ahead: leases are not affected, retention pauses for an hour, or until \
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

/// After each step back, redates the leases and waits of every org that were dated while the clock was ahead.
async fn redate(ledger: &Ledger, store: &dyn Store, mut set_back: watch::Receiver<Option<Duration>>) {
    loop {
        let by = (*set_back.borrow_and_update()).unwrap_or(LONGEST_LEASE);
        let mut is_done = true;
        let mut after = None;
        loop {
            let orgs =
                insist("can't list orgs to correct times set by a clock that was ahead", || store.orgs(after, ORGS))
                    .await;
            let Some(last) = orgs.last() else { break };
            after = Some(*last);
            for org in orgs {
                is_done &= redate_org(ledger, org, by).await;
            }
        }
        if is_done {
            // Can't fail: the caller keeps the sender.
            let _ = set_back.changed().await;
        } else {
            sleep(AGAIN).await;
        }
    }
}

/// Returns false if the org has to be redated again.
async fn redate_org(ledger: &Ledger, org: OrgId, by: Duration) -> bool {
    loop {
        match ledger.redate(org, by).await {
            Ok(done) if !done.has_more => return true,
            Ok(_) => {}
            Err(LedgerError::Draining) => return true,
            Err(error) => {
                tracing::warn!(org_id = %org, %error, "can't correct times set by a clock that was ahead; trying again");
                return false;
            }
        }
    }
}

async fn hold(store: &dyn Store) {
    insist("can't pause retention", || store.audit().pause_retention(DOUBT)).await;
}

async fn note(store: &dyn Store) {
    loop {
        sleep(NOTE).await;
        if let Err(error) = store.note_clock(UNSEEN, DOUBT).await {
            tracing::debug!(%error, "can't note that the clock was seen");
        }
    }
}

/// Repeats the attempt until it succeeds.
async fn insist<T, F: Future<Output = Result<T, StoreError>>>(failure: &'static str, attempt: impl Fn() -> F) -> T {
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => tracing::warn!(%error, "{failure}; trying again"),
        }
        sleep(RETRY).await;
    }
}
