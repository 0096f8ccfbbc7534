//! Commits that break, conflict or stay undecided.

use std::time::Duration;

use jobledger_server::{
    domain::id::OrgId,
    ledger::{Delivery, LedgerError, Limits, SubscribeRequest},
    store::StatisticsQuery,
};
use tokio::time::timeout;

use crate::stores::ledger::{breaking, create, created, head, start, submit};
use crate::{
    support::breaking::Break,
    support::harness::{Database, on_both_databases},
};

on_both_databases! {
    one_command_that_the_database_refuses_fails_alone,
    a_commit_that_broke_after_it_happened_is_answered_and_not_repeated,
    a_commit_that_broke_before_it_happened_is_run_again,
    an_outcome_that_stays_unknown_is_said_to_be,
    a_commit_without_room_says_so_and_is_not_repeated,
    a_batch_that_got_in_the_way_of_another_is_run_again,
    subscribers_hear_of_an_undecided_commit_once_it_is_decided,
}

async fn one_command_that_the_database_refuses_fails_alone(database: Database) {
    let store = database.open().await;
    database.refuse_jobs_of_type("poison").await;
    let ledger = start(&store, Limits::default());
    let org = OrgId::DEFAULT;
    let held = store.begin(&[org]).await.unwrap();
    let answers: Vec<_> =
        ["a", "b", "poison", "c"].map(|job_type| submit(&ledger, org, create(job_type))).into_iter().collect();
    drop(held);
    let mut seqs = Vec::new();
    for (at, answer) in answers.into_iter().enumerate() {
        match answer.await.unwrap() {
            Err(error) => assert_eq!((at, error), (2, LedgerError::Refused)),
            reply => seqs.push(created(reply).last_seq),
        }
    }
    assert_eq!(seqs, [1, 2, 3], "and leaves no hole");
    let statistics = ledger.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!(statistics.types.len(), 3);
}

async fn a_commit_that_broke_after_it_happened_is_answered_and_not_repeated(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::After]).await;
    let org = OrgId::DEFAULT;
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    assert!(matches!(subscription.next().await.unwrap(), Delivery::Bookmark { seq: 0, caught_up: true }));

    // The subscriber is live, and the tail never gets the first event. The event is delivered all the same, and at once.
    for (job_type, seq) in [("t", 1), ("u", 2)] {
        assert_eq!(created(ledger.submit(org, create(job_type)).await).last_seq, seq);
        assert_eq!(head(&*store, org).await, seq);
        let delivered = async {
            loop {
                match subscription.next().await.unwrap() {
                    Delivery::Events(events, _) => break events.iter().map(|event| event.seq()).collect::<Vec<_>>(),
                    Delivery::Snapshot(..) | Delivery::Bookmark { .. } => {}
                    Delivery::End => panic!("the org's stream does not end"),
                }
            }
        };
        let delivered = timeout(Duration::from_secs(10), delivered).await.expect("sooner than the next bookmark");
        assert_eq!(delivered, [seq]);
    }
}

async fn a_commit_that_broke_before_it_happened_is_run_again(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Before]).await;
    assert_eq!(created(ledger.submit(OrgId::DEFAULT, create("t")).await).last_seq, 1);
    assert_eq!(head(&*store, OrgId::DEFAULT).await, 1);
    assert_eq!(store.begun(), 3, "the batch, the look, and the batch again");
}

async fn an_outcome_that_stays_unknown_is_said_to_be(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Away]).await;
    let org = OrgId::DEFAULT;
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::OutcomeUnknown));
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Unavailable));
    store.come_back().await;
    assert_eq!(created(ledger.submit(org, create("t")).await).last_seq, 1);
}

async fn a_commit_without_room_says_so_and_is_not_repeated(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Full]).await;
    assert_eq!(ledger.submit(OrgId::DEFAULT, create("t")).await, Err(LedgerError::StorageFull));
    assert_eq!(store.begun(), 1);
    assert_eq!(created(ledger.submit(OrgId::DEFAULT, create("t")).await).last_seq, 1);
}

async fn a_batch_that_got_in_the_way_of_another_is_run_again(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Conflict; 7]).await;
    let org = OrgId::DEFAULT;
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Unavailable), "not for ever");
    assert_eq!(store.begun(), 4);
    assert_eq!(created(ledger.submit(org, create("t")).await).last_seq, 1);
    assert_eq!(store.begun(), 8);
}

async fn subscribers_hear_of_an_undecided_commit_once_it_is_decided(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Late]).await;
    let org = OrgId::DEFAULT;
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::OutcomeUnknown));
    // The subscriber has read the log, found nothing, and is live again.
    assert!(matches!(subscription.next().await.unwrap(), Delivery::Bookmark { seq: 0, caught_up: true }));
    store.come_back().await;
    let heard = async {
        loop {
            if let Delivery::Events(events, _) = subscription.next().await.unwrap() {
                break events[0].seq();
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(10), heard).await.expect("sooner than the next bookmark"), 1);
    assert_eq!(created(ledger.submit(org, create("t")).await).last_seq, 2);
}
