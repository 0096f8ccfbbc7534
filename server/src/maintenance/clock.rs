//! What is done about a clock that somebody sets: it is read every other second; where it jumped ahead, or nobody has seen it for long,
//! retention waits; and it is said.

use std::{future::Future, time::Duration};

use chrono::TimeDelta;
use tokio::time::sleep;

use crate::{
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
/// The wait after something that failed.
const RETRY: Duration = Duration::from_secs(1);

/// Has retention wait if the clock may have been set while no server was there. To be done before anything is removed.
pub(super) async fn after_absence(store: &dyn Store) {
    let unseen = insist("can't note when the clock was seen", || store.note_clock()).await;
    if let Some(unseen) = unseen.filter(|unseen| unseen.abs() > UNSEEN) {
        tracing::warn!(
            seconds = unseen.num_seconds(),
            "no server has seen the clock for long, or it was set: retention waits for an hour, or for `jobledger confirm-clock`"
        );
        hold(store).await;
    }
}

/// Watches the clock.
pub(super) async fn run(ledger: &Ledger, store: &dyn Store) {
    let react = async {
        // It may have been ahead, and have been set back, when no server was there to see it.
        redate_all(ledger, store).await;
        react(ledger, store).await;
    };
    tokio::join!(react, note(store));
}

async fn react(ledger: &Ledger, store: &dyn Store) {
    loop {
        match ledger.clock_step().await {
            ClockStep::Ahead(by) => {
                tracing::error!(
                    seconds = by.num_seconds(),
                    "the database's clock jumped ahead: leases go on as if it had not, retention waits for an hour, or for \
                     `jobledger confirm-clock`"
                );
                hold(store).await;
                ledger.retention_waits();
            }
            ClockStep::Back(by) => {
                tracing::error!(seconds = by.num_seconds(), "the database's clock was set back");
                redate_all(ledger, store).await;
            }
        }
    }
}

/// Has every org's leases and waits dated anew that were dated by a clock that was ahead.
async fn redate_all(ledger: &Ledger, store: &dyn Store) {
    let mut after = None;
    loop {
        let orgs = insist("can't look for what a clock that was ahead has put off", || store.orgs(after, ORGS)).await;
        let Some(last) = orgs.last() else { return };
        after = Some(*last);
        for org in orgs {
            loop {
                match ledger.redate(org).await {
                    Ok(done) if !done.has_more => break,
                    Ok(_) => {}
                    Err(LedgerError::Draining) => return,
                    Err(error) => {
                        tracing::warn!(org_id = %org, %error, "can't date anew what a clock that was ahead has put off; trying again");
                        sleep(RETRY).await;
                    }
                }
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
        if let Err(error) = store.note_clock().await {
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
