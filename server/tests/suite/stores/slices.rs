//! Retention removes in slices what is more than one batch may remove.

use std::{sync::Arc, time::Duration};

use jobledger_server::{
    domain::{
        event::JobEvent,
        id::{Digest, JobId, OrgId},
        job::Job,
        status::JobStatus,
        transition::{self, News},
    },
    ledger::{Command, Ledger, LedgerError, SubscribeRequest},
    store::{Changes, Needs},
};

use crate::{
    stores::ledger::{Work, report, start, submit},
    stores::retention::{keep, rows},
    support::factory,
    support::harness::{Database, on_both_databases},
};

on_both_databases! {
    the_events_of_a_long_job_go_in_slices_and_those_behind_it_too,
    large_events_go_in_slices_of_bytes,
    what_is_left_of_a_job_goes_at_once_when_it_is_brought_in_again,
}

/// How many jobs each batch removes, until none is left to remove.
async fn retain_all(ledger: &Ledger) -> Vec<usize> {
    let mut removed = Vec::new();
    loop {
        let done = ledger.retain(OrgId::DEFAULT, keep(JobStatus::Succeeded, Duration::ZERO)).await.unwrap();
        removed.push(done.jobs);
        if !done.has_more {
            return removed;
        }
    }
}

/// Reports progress this many times, with a message.
async fn report_often(work: &Work<'_>, job: JobId, times: usize, message: &str) {
    let message: Arc<str> = message.into();
    let report = |n| {
        let news = News { progress: Some((n % 100) as u8), message: Arc::clone(&message), ..News::default() };
        let report = transition::Report { news, ..report(None) };
        let command = Command::Apply { job, command: Box::new(transition::Command::Report(report)) };
        submit(work.ledger, work.org, command)
    };
    // As many at once as the ledger's queue has room for.
    let at_once = if message.len() < 1_000 { times } else { 8 };
    for first in (0..times).step_by(at_once) {
        let answers: Vec<_> = (first..times.min(first + at_once)).map(report).collect();
        for answer in answers {
            answer.await.unwrap().unwrap();
        }
    }
}

async fn the_events_of_a_long_job_go_in_slices_and_those_behind_it_too(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let work = Work { ledger: &ledger, org: OrgId::DEFAULT };
    let long = work.create().await;
    work.begin(long).await;
    report_often(&work, long, 20_500, "").await;
    work.end(long).await;
    work.finish(work.create().await).await;
    work.create().await;
    let first = ledger.retain(OrgId::DEFAULT, keep(JobStatus::Succeeded, Duration::ZERO)).await.unwrap();
    assert_eq!((first.jobs, first.has_more), (1, true));
    assert_eq!(ledger.job(OrgId::DEFAULT, long).await.map(|_| ()), Err(LedgerError::JobNotFound { job: long }));
    assert_eq!((rows(&database, "job_event").await, rows(&database, "job_remains").await), (20_507, 1));
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let expired = ledger.subscribe(OrgId::DEFAULT, None, request).await.map(|_| ());
    assert_eq!(expired, Err(LedgerError::CursorExpired { oldest: 20_504, head: 20_507 }), "nobody reads what is left");
    store.close().await;
    database.verify().await;

    // Another server goes on with the slices.
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    assert_eq!(retain_all(&ledger).await, [0, 0, 0, 1]);
    assert_eq!((rows(&database, "job_event").await, rows(&database, "job_remains").await), (1, 0));
    store.close().await;
    database.verify().await;
}

async fn large_events_go_in_slices_of_bytes(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let work = Work { ledger: &ledger, org: OrgId::DEFAULT };
    let text = "x".repeat(1 << 20);
    let mut jobs = Vec::new();
    // Three jobs of 7 MiB, and one of 40 MiB.
    for times in [7, 7, 7, 40] {
        jobs.push(work.create().await);
        work.begin(jobs[jobs.len() - 1]).await;
        report_often(&work, jobs[jobs.len() - 1], times, &text).await;
        work.end(jobs[jobs.len() - 1]).await;
    }
    work.create().await;
    assert_eq!(retain_all(&ledger).await, [2, 1, 1, 0, 0, 0, 0]);
    assert_eq!((rows(&database, "job_event").await, rows(&database, "job_remains").await), (1, 0));
    store.close().await;
    database.verify().await;
}

async fn what_is_left_of_a_job_goes_at_once_when_it_is_brought_in_again(database: Database) {
    database.is_made_up();
    let store = database.open().await;
    let org = factory::org();
    let job = factory::job(org, "t", 1);
    let events = (1..=3).map(|seq| Arc::new(JobEvent { job_seq: seq, ..factory::event(&job, seq) })).collect();
    let gone = Job { last_seq: 3, last_job_seq: 3, last_recorded_at: factory::time(3), ..job.clone() };
    let before = Changes { head: factory::head(3), created: vec![gone.clone()], events, ..Changes::default() };
    factory::write(&*store, org, &before).await.unwrap();
    let remaining = [gone.id].into();
    let removed = Changes { head: factory::head(3), removed: vec![gone], remaining, ..Changes::default() };
    factory::write(&*store, org, &removed).await.unwrap();
    assert_eq!((rows(&database, "job_event").await, rows(&database, "job_remains").await), (3, 1));

    let mut batch = store.begin(&[org]).await.unwrap();
    let needs = Needs { jobs: vec![job.id], imports: vec![(job.id, Digest([1; 32]))], ..Needs::default() };
    batch.load(&[(org, needs)]).await.unwrap();
    let again = factory::job(org, "t", 4);
    let again = Job { id: job.id, ..again };
    let events = vec![Arc::new(factory::event(&again, 4))];
    let after = Changes { head: factory::head(4), created: vec![again], events, ..Changes::default() };
    batch.write(&[(org, &after)]).await.unwrap();
    batch.commit().await.unwrap();
    assert_eq!((rows(&database, "job_event").await, rows(&database, "job_remains").await), (1, 0));
}
