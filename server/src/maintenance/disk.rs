//! Keeps a reserve of the disk for what is there already: reports, heartbeats and retention write in it, creates don't. As much again above
//! it is shared: no org takes more than a third of that.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    ledger::{DiskSpace, Ledger},
    store::{Disk, Store},
};

/// How often it is looked at. What creates write meanwhile is bounded by what a disk takes.
const LOOK: Duration = Duration::from_millis(500);
/// The reserve, where none is said: a part of the disk, and no more than this.
const PART: u64 = 20;
const MOST: u64 = 1 << 30;
/// One org's part of what is shared: a third, of which its jobs and events are a third, the rest being indexes, statistics and logs.
const SHARE: u64 = 9;

/// Where the database's disk can't be seen from here, it is for whoever looks after that.
pub(super) async fn run(ledger: &Ledger, store: &dyn Store, reserve: Option<u64>) {
    let (mut space, mut was_seen) = (DiskSpace::Enough, false);
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
        let found = space_of(free, reserve, space);
        if found != space {
            let (free_mib, reserve_mib) = (free >> 20, reserve >> 20);
            match found {
                DiskSpace::Enough => tracing::info!(free_mib, reserve_mib, "there is room on the disk again"),
                DiskSpace::Scarce { .. } => {
                    tracing::warn!(
                        free_mib,
                        reserve_mib,
                        "the disk fills up: each org may take a part of what is left"
                    );
                }
                DiskSpace::Reserved => {
                    tracing::error!(free_mib, reserve_mib, "the disk is nearly full: no more jobs are taken");
                }
            }
            ledger.has_disk_space(found);
            space = found;
        }
        sleep(LOOK).await;
    }
}

/// How much there is with so much free. Somewhat more makes an end of what was less: otherwise jobs come and go with each look.
fn space_of(free: u64, reserve: u64, was: DiskSpace) -> DiskSpace {
    let more = reserve / 10;
    let to_be_scarce = reserve.saturating_add(if was == DiskSpace::Reserved { more } else { 0 });
    let to_be_enough = reserve.saturating_mul(2).saturating_add(if was == DiskSpace::Enough { 0 } else { more });
    if free < to_be_scarce {
        DiskSpace::Reserved
    } else if free < to_be_enough {
        DiskSpace::Scarce { each: reserve / SHARE }
    } else {
        DiskSpace::Enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_space_is_shared_and_the_reserve_is_nobodys() {
        let scarce = DiskSpace::Scarce { each: 100 };
        let mut space = DiskSpace::Enough;
        let path = [
            (2_000, DiskSpace::Enough),
            (1_799, scarce),
            (1_850, scarce),
            (900, scarce),
            (899, DiskSpace::Reserved),
            (950, DiskSpace::Reserved),
            (990, scarce),
            (1_900, DiskSpace::Enough),
        ];
        for (free, expected) in path {
            space = space_of(free, 900, space);
            assert_eq!(space, expected, "{free} free");
        }
        assert_eq!(space_of(0, 0, DiskSpace::Enough), DiskSpace::Enough, "without a reserve");
    }
}
