//! A server's background services, one in each file. Each runs until it is dropped, and on every server: there is no leader.

mod clock;
mod disk;
mod due;
mod health;
mod retention;
mod upkeep;
mod workers;

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    ledger::{Ledger, Retention},
    readiness::Readiness,
    store::Store,
};

/// Runs all services for as long as it is polled.
pub(crate) async fn run(
    ledger: Ledger,
    store: Arc<dyn Store>,
    retention: Retention,
    disk_reserve: Option<u64>,
    readiness: watch::Sender<Readiness>,
) {
    tokio::join!(
        due::run(&ledger, &store),
        health::run(&ledger, &*store, &readiness),
        async {
            clock::after_absence(&*store).await;
            tokio::join!(clock::run(&ledger, &*store), retention::run(&ledger, &*store, retention));
        },
        upkeep::run(&*store),
        disk::run(&ledger, &*store, disk_reserve),
        workers::run(&ledger, &*store),
    );
}
