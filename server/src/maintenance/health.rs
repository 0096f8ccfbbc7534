//! Checks every other second whether this server is ready, and reads the database's clock.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    ledger::{ClockReading, Ledger, Moment},
    readiness::Readiness,
    store::Store,
};

/// How often readiness is checked.
const LOOK: Duration = Duration::from_secs(2);
/// The time limit for an answer of the database.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long commands may wait while none is decided. Longer than the writer looks for the outcome of a broken commit.
const STALLED_AFTER: Duration = Duration::from_secs(30);

pub(super) async fn run(ledger: &Ledger, store: &dyn Store, readiness: &watch::Sender<Readiness>) {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let asked = Moment::now();
        let found = match timeout(ANSWER_WITHIN, store.ping()).await {
            Ok(Ok(clock)) => {
                ledger.observe_clock(ClockReading { asked, clock, heard: Moment::now() });
                match timeout(ANSWER_WITHIN, store.newer_migration()).await {
                    Ok(Ok(Some(version))) => {
                        tracing::error!(version, "a newer jobledger has migrated the database: this server stops");
                        Readiness::Outdated
                    }
                    Ok(Ok(None)) if ledger.stalled_for() > STALLED_AFTER => Readiness::Stalled,
                    Ok(Ok(None)) => Readiness::Ready,
                    Ok(Err(_)) | Err(_) => Readiness::NoDatabase,
                }
            }
            Ok(Err(_)) | Err(_) => Readiness::NoDatabase,
        };
        readiness.send_if_modified(|readiness| {
            let is_news = *readiness != found && *readiness != Readiness::Stopping;
            if is_news {
                tracing::warn!(was = %readiness, is = %found, "readiness has changed");
                *readiness = found;
            }
            is_news
        });
    }
}
