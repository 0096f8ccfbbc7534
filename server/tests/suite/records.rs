//! How long batch records stay.

use jobledger_server::store::{Changed, Changes, Parts, StoreError};

use crate::{
    contract_records::{creates, has, record},
    factory::{fill, org},
    harness::{Database, on_both_databases},
};

on_both_databases! {
    records_go_after_ten_minutes_though_nothing_but_leases_is_extended,
}

/// Batches between two of those that drop records, at most.
const DROPPED_AFTER: i64 = 512;

/// A worker that sends heartbeats alone, for hours, moves the log's time on no more.
async fn records_go_after_ten_minutes_though_nothing_but_leases_is_extended(database: Database) {
    let store = database.open().await;
    let org = org();
    let held = fill(&*store, org, "t", 1).await.remove(0);
    let extends =
        || Changes { changed: vec![Changed { job: held.clone(), parts: Parts::LEASE }], ..Changes::default() };
    let first = record(&*store, org, &extends(), true).await.unwrap();
    let mut last = first;
    while last.n < DROPPED_AFTER {
        last = record(&*store, org, &extends(), true).await.unwrap();
    }
    assert!(has(&*store, org, first).await.unwrap(), "it is not old");
    let age = match database.is_postgres() {
        true => "UPDATE org_record SET written_at = written_at - interval '11 minutes'",
        false => "UPDATE org_record SET written_at = written_at - 660000000",
    };
    database.tamper(age).await;
    while last.n < 3 * DROPPED_AFTER {
        last = record(&*store, org, &extends(), true).await.unwrap();
    }
    let found = has(&*store, org, first).await;
    assert!(matches!(found, Err(StoreError::OutcomeUnknown(_))), "{found:?}");
    assert!(has(&*store, org, last).await.unwrap());
    assert_eq!(store.audit().broken_records(org).await.unwrap(), 0, "what is left is a chain");
    assert_eq!(record(&*store, org, &creates(org, 2), true).await.unwrap().n, last.n + 1, "the log goes on");
    store.close().await;
}
