//! Has the database do what it needs now and then.

use std::time::Duration;

use tokio::time::sleep;

use crate::store::Store;

/// How often. Partitions are made months ahead.
const INTERVAL: Duration = Duration::from_secs(3_600);
/// The wait after it failed.
const RETRY: Duration = Duration::from_secs(60);

/// The store did it once when it was opened.
pub(super) async fn run(store: &dyn Store) {
    let mut wait = INTERVAL;
    loop {
        sleep(wait).await;
        wait = match store.maintain().await {
            Ok(()) => INTERVAL,
            Err(error) => {
                tracing::warn!(%error, "the database's upkeep failed; trying again");
                RETRY
            }
        };
    }
}
