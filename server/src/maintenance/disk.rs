//! Keeps a reserve of the disk for what is there already: reports, heartbeats and retention write in it, creates don't.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    ledger::Ledger,
    store::{Disk, Store},
};

/// How often it is looked at. What creates write meanwhile is bounded by what a disk takes.
const LOOK: Duration = Duration::from_millis(500);
/// The reserve, where none is said: a part of the disk, and no more than this.
const PART: u64 = 20;
const MOST: u64 = 1 << 30;

/// Where the database's disk can't be seen from here, it is for whoever looks after that.
pub(super) async fn run(ledger: &Ledger, store: &dyn Store, reserve: Option<u64>) {
    let (mut was_short, mut was_seen) = (false, false);
    loop {
        let Some(Disk { free, total }) = store.disk().await else {
            // One that was seen will be again.
            if !was_seen {
                return;
            }
            sleep(LOOK).await;
            continue;
        };
        was_seen = true;
        let reserve = reserve.unwrap_or((total / PART).min(MOST));
        // Somewhat more makes an end of it: otherwise jobs come and go with each look.
        let is_short = free < if was_short { reserve.saturating_add(reserve / 10) } else { reserve };
        if is_short != was_short {
            let (free_mib, reserve_mib) = (free >> 20, reserve >> 20);
            if is_short {
                tracing::error!(free_mib, reserve_mib, "the disk is nearly full: no more jobs are taken");
            } else {
                tracing::info!(free_mib, reserve_mib, "there is room on the disk again: jobs are taken");
            }
            ledger.takes_jobs(!is_short);
            was_short = is_short;
        }
        sleep(LOOK).await;
    }
}
