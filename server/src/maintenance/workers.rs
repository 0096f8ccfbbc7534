//! Writes which workers this server has heard of, so that every server knows all.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::{domain::id::OrgId, ledger::Ledger, store::Store};

/// How often new ones are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// The pause before the next write, where one did not take all.
const PAUSE: Duration = Duration::from_millis(50);
/// Workers in one write.
const AT_ONCE: usize = 500;

pub(super) async fn run(ledger: &Ledger, store: &dyn Store) {
    // Orgs of which workers were written, until their last worker must be gone.
    let mut orgs = HashMap::<OrgId, Instant>::new();
    forget_of_all(store, ledger.workers_known_for()).await;
    let (known_for, mut has_more) = (ledger.workers_known_for(), false);
    loop {
        sleep(if has_more { PAUSE } else { LOOK }).await;
        let (mut heard, are_more) = ledger.take_heard_workers(AT_ONCE);
        let now = Instant::now();
        let gone: Vec<_> = orgs.extract_if(|_, last| now - *last > known_for + LOOK).map(|(org, _)| org).collect();
        if heard.is_empty() && gone.is_empty() {
            has_more = false;
            continue;
        }
        // Servers that write the same workers take them in the same order.
        heard.sort_by(|a, b| (a.org, &a.id).cmp(&(b.org, &b.id)));
        let mut of: Vec<_> = heard.iter().map(|heard| heard.org).chain(gone).collect();
        of.sort();
        of.dedup();
        match store.note_workers(&heard, &of, known_for).await {
            Ok(()) => {
                has_more = are_more;
                orgs.extend(heard.iter().map(|heard| (heard.org, now)));
            }
            Err(error) => {
                has_more = false;
                tracing::debug!(%error, "can't write which workers were heard of; trying again");
                ledger.put_heard_workers_back(&heard);
                orgs.extend(of.into_iter().map(|org| (org, now)));
            }
        }
    }
}

/// Removes what servers that are gone have left behind, once. What can't be removed now is removed with the next start.
async fn forget_of_all(store: &dyn Store, known_for: Duration) {
    let mut after = None;
    loop {
        let Ok(orgs) = store.orgs(after, AT_ONCE).await else { return };
        let Some(last) = orgs.last().copied() else { return };
        if let Err(error) = store.note_workers(&[], &orgs, known_for).await {
            tracing::debug!(%error, "can't remove workers that are gone");
            return;
        }
        after = Some(last);
    }
}
