//! Runs the store's own maintenance.

use std::time::Duration;

use tokio::time::sleep;

use crate::store::Store;

/// The interval. Partitions are made months ahead.
const INTERVAL: Duration = Duration::from_secs(3_600);
/// The pause after a failure.
const RETRY: Duration = Duration::from_secs(60);

/// Begins with a pause: opening the store has run the maintenance once.
pub(super) async fn run(store: &dyn Store) {
    let mut wait = INTERVAL;
    loop {
        sleep(wait).await;
        wait = match store.maintain().await {
            Ok(()) => INTERVAL,
            Err(error) => {
                tracing::warn!(%error, "database maintenance failed; trying again");
                RETRY
            }
        };
    }
}
