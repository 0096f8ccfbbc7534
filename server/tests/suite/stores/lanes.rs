//! Queues and turns: what goes first, what is bounded, and what is decided though its caller is gone.

use std::collections::BTreeMap;

use jobledger_server::{
    domain::{
        clock::Time,
        id::OrgId,
        json::Json,
        transition::{self, News, Report},
    },
    ledger::{Command, Delivery, LedgerError, Limits, SubscribeRequest},
};
use tokio::time::timeout;
use uuid::Uuid;

use crate::stores::ledger::{
    Work, breaking, breaking_with, create, create_with, created, poll_once, report, start, submit,
};
use crate::support::harness::{Database, ManualClock, PATIENCE, on_both_databases};

on_both_databases! {
    what_gathers_while_a_head_is_won_goes_with_its_batch,
    a_command_whose_caller_is_gone_before_its_batch_is_never_decided,
    a_command_that_was_taken_is_decided_though_its_caller_is_gone,
    queues_are_bounded_in_commands_and_in_bytes,
    what_keeps_jobs_alive_goes_before_creates_and_finds_room,
    a_large_create_is_not_passed_over_for_ever,
    batches_are_bounded_and_orgs_take_turns,
    batches_are_bounded_in_bytes_but_one_large_command_goes_through,
}

async fn what_gathers_while_a_head_is_won_goes_with_its_batch(database: Database) {
    let store = database.open().await;
    let (store, ledger) = breaking_with(store, &[], Limits { batch_commands: 3, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    let first = submit(&ledger, org, create("first"));
    store.has_begun(1).await;
    // The batch has room for two more commands.
    let more = ["second", "third", "next batch"].map(|name| Box::pin(ledger.submit(org, create(name))));
    let mut more = Vec::from(more);
    more.iter_mut().for_each(|more| assert!(poll_once(more).is_pending()));
    drop(held);
    let mut jobs = vec![created(first.await.unwrap())];
    for answer in more {
        jobs.push(created(answer.await));
    }
    assert_eq!(jobs.iter().map(|job| job.last_seq).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let batches: Vec<_> = jobs.iter().map(|job| job.last_recorded_at == jobs[0].last_recorded_at).collect();
    assert_eq!(batches, [true, true, true, false]);
    assert_eq!(store.begun(), 2);
}

async fn a_command_whose_caller_is_gone_before_its_batch_is_never_decided(database: Database) {
    let store = database.open().await;
    let (store, ledger) = breaking_with(store, &[], Limits { batch_commands: 1, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    // The first command is in a batch that waits for the head. The others wait behind it.
    let first = submit(&ledger, org, create("taken"));
    store.has_begun(1).await;
    let mut gone = Box::pin(ledger.submit(org, create("gone")));
    assert!(poll_once(&mut gone).is_pending());
    drop(gone);
    let last = submit(&ledger, org, create("stays"));
    drop(held);
    assert_eq!(created(first.await.unwrap()).last_seq, 1);
    assert_eq!(created(last.await.unwrap()).last_seq, 2, "nothing was decided in between");
}

async fn a_command_that_was_taken_is_decided_though_its_caller_is_gone(database: Database) {
    let (store, ledger) = breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    let mut subscription = ledger.subscribe(org, None, SubscribeRequest::default()).await.unwrap();
    let mut taken = Box::pin(ledger.submit(org, create("taken")));
    assert!(poll_once(&mut taken).is_pending());
    store.has_begun(1).await;
    drop(taken);
    drop(held);
    loop {
        match timeout(PATIENCE, subscription.next()).await.expect("the event comes").unwrap() {
            Delivery::Events(events, _) => break assert_eq!(events[0].job().unwrap().job_type.as_ref(), "taken"),
            Delivery::Snapshot(..) | Delivery::Bookmark { .. } => {}
            Delivery::End => panic!("the org's stream does not end"),
        }
    }
}

async fn queues_are_bounded_in_commands_and_in_bytes(database: Database) {
    let store = database.open().await;
    let org = OrgId::DEFAULT;
    let limits = Limits { queued_commands: 3, queued_bytes: 100_000, batch_commands: 1, ..Limits::default() };
    let (store, ledger) = breaking_with(store, &[], limits);
    let held = store.inner.begin(&[org]).await.unwrap();
    let taken = submit(&ledger, org, create("t"));
    store.has_begun(1).await;
    let waiting: Vec<_> = (0..3).map(|_| submit(&ledger, org, create("t"))).collect();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Overloaded));
    drop(held);
    for answer in waiting.into_iter().chain([taken]) {
        created(answer.await.unwrap());
    }
    let large = Json::from_trusted(format!("\"{}\"", "x".repeat(100_000)));
    assert_eq!(ledger.submit(org, create_with("t", Some(large))).await, Err(LedgerError::Overloaded));
    created(ledger.submit(org, create("t")).await);
}

async fn what_keeps_jobs_alive_goes_before_creates_and_finds_room(database: Database) {
    let store = database.open().await;
    let org = OrgId::DEFAULT;
    let limits = Limits { queued_commands: 4, batch_commands: 1, ..Limits::default() };
    let (store, ledger) = breaking_with(store, &[], limits);
    let work = Work { ledger: &ledger, org };
    let running = work.create().await;
    work.begin(running).await;
    let held = store.inner.begin(&[org]).await.unwrap();
    let taken = submit(&ledger, org, create("t"));
    store.has_begun(2 + 1).await;
    let waiting: Vec<_> = (0..4).map(|_| submit(&ledger, org, create("t"))).collect();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Overloaded));
    let progress = |percent| {
        let report = Report { news: News { progress: Some(percent), ..News::default() }, ..report(None) };
        Command::Apply { job: running, command: Box::new(transition::Command::Report(report)) }
    };
    let report = submit(&ledger, org, progress(50));
    assert_eq!(ledger.submit(org, progress(60)).await, Err(LedgerError::Overloaded), "its room is bounded, too");
    drop(held);
    created(taken.await.unwrap());
    let reported = report.await.unwrap().unwrap().job.last_seq;
    for answer in waiting {
        assert!(created(answer.await.unwrap()).created_seq > reported, "whatever was there before");
    }
}

async fn a_large_create_is_not_passed_over_for_ever(database: Database) {
    // Batches that are full by bytes, and by commands.
    for (batch_commands, message_bytes) in [(512, 2_000), (4, 0)] {
        let limits = Limits { batch_bytes: 10_000, batch_commands, ..Limits::default() };
        let (store, ledger) = breaking_with(database.open().await, &[], limits);
        let org = OrgId(Uuid::now_v7());
        let work = Work { ledger: &ledger, org };
        let running = work.create().await;
        work.begin(running).await;
        let progress = |percent: u8| {
            let message = "x".repeat(message_bytes).into();
            let report = Report { news: News { progress: Some(percent), message, ..News::default() }, ..report(None) };
            Command::Apply { job: running, command: Box::new(transition::Command::Report(report)) }
        };
        let held = store.inner.begin(&[org]).await.unwrap();
        let first = submit(&ledger, org, create("t"));
        store.has_begun(3).await;
        let large = Json::from_trusted(format!("\"{}\"", "x".repeat(9_000)));
        let large = submit(&ledger, org, create_with("t", Some(large)));
        let reports: Vec<_> = (0..20).map(|n| submit(&ledger, org, progress(n))).collect();
        drop(held);
        created(first.await.unwrap());
        let created_at = created(large.await.unwrap()).created_seq;
        let mut after = 0;
        for answer in reports {
            after += usize::from(answer.await.unwrap().unwrap().job.last_seq > created_at);
        }
        assert!(after >= 10, "it waited for two batches at most, and {after} reports came after it");
        store.inner.close().await;
    }
}

async fn batches_are_bounded_and_orgs_take_turns(database: Database) {
    // Each transaction reads the clock once, so equal times mean the same transaction.
    let store = database.open_with(ManualClock::stepping(1_000_000)).await;
    let ledger = start(&store, Limits { batch_commands: 10, ..Limits::default() });
    let (busy, quiet) = (OrgId(Uuid::from_u128(1)), OrgId(Uuid::from_u128(2)));
    let held = store.begin(&[busy]).await.unwrap();
    let many: Vec<_> = (0..95).map(|_| submit(&ledger, busy, create("t"))).collect();
    let mut one = submit(&ledger, quiet, create("t"));
    // On PostgreSQL a head is a row, so a wait for one org's head does not delay another org.
    let early = if database.is_postgres() { Some(created((&mut one).await.unwrap())) } else { None };
    drop(held);
    let mut batches: BTreeMap<Time, usize> = BTreeMap::new();
    for answer in many {
        *batches.entry(created(answer.await.unwrap()).created_at).or_default() += 1;
    }
    assert!(batches.values().all(|size| *size <= 10), "{batches:?}");
    let quiet_at = match early {
        Some(job) => job.created_at,
        None => created(one.await.unwrap()).created_at,
    };
    let before = batches.keys().filter(|at| **at < quiet_at).count();
    assert!(before <= 2, "the quiet org waited for {before} batches of the busy one");
}

async fn batches_are_bounded_in_bytes_but_one_large_command_goes_through(database: Database) {
    let store = database.open_with(ManualClock::stepping(1_000_000)).await;
    let ledger = start(&store, Limits { batch_bytes: 10_000, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let held = store.begin(&[org]).await.unwrap();
    let payload = |bytes| Some(Json::from_trusted(format!("\"{}\"", "x".repeat(bytes))));
    let answers: Vec<_> = [4_000, 4_000, 4_000, 50_000, 10]
        .map(|bytes| submit(&ledger, org, create_with("t", payload(bytes))))
        .into_iter()
        .collect();
    drop(held);
    let mut batches: BTreeMap<Time, Vec<i64>> = BTreeMap::new();
    for answer in answers {
        let job = created(answer.await.unwrap());
        batches.entry(job.created_at).or_default().push(job.last_seq);
    }
    // The first command is in a batch when the others arrive. Its batch has it alone or with the second.
    let sizes: Vec<_> = batches.values().map(Vec::len).collect();
    assert!(sizes.iter().all(|size| *size <= 2), "{batches:?}");
    assert!(batches.values().any(|seqs| seqs == &[4]), "the large one goes alone: {batches:?}");
}
