//! What every store must do for batch records, which tell whether a batch happened.

use std::sync::Arc;

use jobledger_server::{
    domain::id::OrgId,
    store::{Changed, Changes, Differs, NextDue, RecordId, Store, StoreError},
};

use crate::{
    stores::contract::contract,
    support::factory::{event, fill, head, job, org, time, write_in},
    support::harness::Database,
};

contract! {
    records_tell_which_batches_happened,
    whatever_changes_leaves_a_record_and_nothing_else_does,
}

/// Writes a batch, and commits it if `is_committed`. Returns its batch record.
pub(crate) async fn record(store: &dyn Store, org: OrgId, changes: &Changes, is_committed: bool) -> Option<RecordId> {
    let mut batch = store.begin(&[org]).await.unwrap();
    let record = write_in(&mut *batch, org, changes).await.unwrap();
    if is_committed {
        batch.commit().await.unwrap();
    }
    record
}

pub(crate) async fn has(store: &dyn Store, org: OrgId, record: RecordId) -> Result<bool, StoreError> {
    store.begin(&[org]).await.unwrap().has(org, record).await
}

pub(crate) fn creates(org: OrgId, seq: i64) -> Changes {
    let created = job(org, "t", seq);
    let events = vec![Arc::new(event(&created, seq))];
    Changes { head: head(seq), created: vec![created], events, ..Changes::default() }
}

async fn records_tell_which_batches_happened(store: Arc<dyn Store>) {
    let (ours, theirs) = (org(), org());
    let first = record(&*store, ours, &creates(ours, 1), true).await.unwrap();
    let given_up = record(&*store, ours, &creates(ours, 2), false).await.unwrap();
    assert_eq!((first.n, given_up.n), (1, 2));
    assert!(has(&*store, ours, first).await.unwrap());
    assert!(!has(&*store, ours, given_up).await.unwrap(), "the log has not come so far");
    let second = record(&*store, ours, &creates(ours, 2), true).await.unwrap();
    assert_eq!(second.n, 2);
    assert!(has(&*store, ours, second).await.unwrap());
    assert!(!has(&*store, ours, given_up).await.unwrap(), "another is in its place");
    assert!(!has(&*store, theirs, first).await.unwrap(), "each org has a log of its own");
}

async fn whatever_changes_leaves_a_record_and_nothing_else_does(store: Arc<dyn Store>) {
    let org = org();
    let held = fill(&*store, org, "t", 1).await.remove(0);
    let waits = Changes { next_due: Some(NextDue::By(time(1))), ..Changes::default() };
    assert_eq!(record(&*store, org, &waits, true).await, None);
    // As when a lease is extended, which has no event.
    let changed = vec![Changed { job: held, differs: Differs::InLease }];
    let extends = Changes { changed, ..Changes::default() };
    let second = record(&*store, org, &extends, true).await.unwrap();
    assert_eq!(second.n, 2);
    assert!(has(&*store, org, second).await.unwrap());
    assert_eq!(record(&*store, org, &creates(org, 2), true).await.unwrap().n, 3);
    assert_eq!(store.reaches(&[org]).await.unwrap()[0].1.seq, 2);
}
