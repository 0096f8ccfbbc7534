//! Reserves disk space for existing jobs: reports, heartbeats and retention may use the reserve, creates may not. The
//! same amount above the reserve is shared: no org may take more than a third of it.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    ledger::{DiskSpace, Ledger},
    store::{Disk, Store},
};

/// How often the disk is checked. What creates write in between is bounded by the disk's speed.
const LOOK: Duration = Duration::from_millis(500);
/// The default reserve: a twentieth of the disk, at most 1 GiB.
const PART: u64 = 20;
const MOST: u64 = 1 << 30;
/// One org may take a third of the shared space. Of that, a third is jobs and events, the rest indexes, statistics and logs.
const SHARE: u64 = 9;

/// Returns if this server can't see the database's disk, as with PostgreSQL. Its operator has to watch it then.
pub(super) async fn run(ledger: &Ledger, store: &dyn Store, reserve: Option<u64>) {
    let (mut space, mut was_seen) = (DiskSpace::Enough, false);
    loop {
        let Some(Disk { free, total }) = store.disk().await else {
            // A disk that was seen before is tried again.
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
                        "the disk is filling up: each org may use only a share of the free space"
                    );
                }
                DiskSpace::Reserved => {
                    tracing::error!(
                        free_mib,
                        reserve_mib,
                        "the disk is nearly full: new jobs are refused with STORAGE_FULL"
                    );
                }
            }
            ledger.has_disk_space(found);
            space = found;
        }
        sleep(LOOK).await;
    }
}

/// Classifies the free space. A better state takes a tenth of the reserve more, so that the state does not flip.
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
