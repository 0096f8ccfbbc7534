//! How long batch records are kept.

use chrono::TimeDelta;
use jobledger_server::{
    domain::job::Job,
    store::{Changed, Changes, Differs, FoundJob, StoreError},
};

use crate::{
    stores::contract_records::{creates, has, record},
    support::factory::{hold_one, org},
    support::harness::{Database, on_both_databases},
};

on_both_databases! {
    records_go_after_ten_minutes_though_nothing_but_leases_is_extended,
    records_stay_while_a_row_lacks_what_they_say,
}

/// The most batches between two that drop records.
const DROPPED_AFTER: i64 = 512;

const AGE: [&str; 2] = [
    "UPDATE org_record SET written_at = written_at - 660000000",
    "UPDATE org_record SET written_at = written_at - interval '11 minutes'",
];

/// Records are dropped after ten minutes even if batches only extend leases. Their age must not go by the log's time,
/// which such heartbeats do not move on.
async fn records_go_after_ten_minutes_though_nothing_but_leases_is_extended(database: Database) {
    let store = database.open().await;
    let org = org();
    let held = hold_one(&*store, org).await;
    let extends =
        || Changes { changed: vec![Changed { job: held.clone(), differs: Differs::InLease }], ..Changes::default() };
    let first = record(&*store, org, &extends(), true).await.unwrap();
    let mut last = first;
    while last.n < DROPPED_AFTER {
        last = record(&*store, org, &extends(), true).await.unwrap();
    }
    assert!(has(&*store, org, first).await.unwrap(), "it is not old");
    database.tamper(AGE[usize::from(database.is_postgres())]).await;
    while last.n < 3 * DROPPED_AFTER {
        last = record(&*store, org, &extends(), true).await.unwrap();
    }
    let found = has(&*store, org, first).await;
    assert!(matches!(found, Err(StoreError::OutcomeUnknown(_))), "{found:?}");
    assert!(has(&*store, org, last).await.unwrap());
    assert_eq!(store.audit().broken_records(org).await.unwrap(), 0, "what is left is a chain");
    assert_eq!(record(&*store, org, &creates(org, 3), true).await.unwrap().n, last.n + 1, "the log goes on");
    store.close().await;
}

/// A record stays while a row lacks its lease extension, however old it is, because nothing else has the extension.
async fn records_stay_while_a_row_lacks_what_they_say(database: Database) {
    let store = database.open().await;
    let org = org();
    let (mut once, others) = (hold_one(&*store, org).await, hold_one(&*store, org).await);
    let extends = |job: &Job| Changes {
        changed: vec![Changed { job: job.clone(), differs: Differs::InLease }],
        ..Changes::default()
    };
    let lease = once.lease.as_mut().unwrap();
    (lease.expires_at, lease.is_confirmed) = (lease.expires_at + TimeDelta::hours(1), true);
    once.due_at = Some(lease.expires_at);
    let first = record(&*store, org, &extends(&once), true).await.unwrap();
    record(&*store, org, &extends(&others), true).await.unwrap();
    assert_eq!(store.unchanged(&[&once, &others]).await.unwrap(), [true, true]);
    let lease = others.lease.clone();
    assert_eq!(store.unchanged(&[&Job { lease, ..once.clone() }]).await.unwrap(), [false]);
    database.tamper(AGE[usize::from(database.is_postgres())]).await;
    for _ in 0..2 * DROPPED_AFTER {
        record(&*store, org, &extends(&others), true).await.unwrap();
    }
    assert!(has(&*store, org, first).await.unwrap());
    let told = store.job(org, once.id).await.unwrap().unwrap().job;
    assert_eq!(told, once);
    // Finding these leases takes more records than a shared read scans, so each job has to be read alone.
    assert_eq!(store.unchanged(&[&once, &others]).await.unwrap(), [false, false]);
    let names = [once, others].map(|job| (org, job.id));
    assert_eq!(store.jobs(&names).await.unwrap(), [FoundJob::Large, FoundJob::Large]);
    store.close().await;
}
