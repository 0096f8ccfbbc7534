//! The pages of a snapshot are consistent with the events after it, whatever happens in between.

use std::collections::HashMap;

use jobledger_server::{
    domain::{
        id::{JobId, OrgId},
        job::JobRecord,
        status::JobStatus,
    },
    ledger::{Delivery, EventFilter, SubscribeRequest, Subscription},
};

use crate::{
    stores::ledger::{Work, start},
    support::harness::{Database, on_both_databases},
};

on_both_databases! {
    a_snapshot_is_consistent_whatever_happens_between_its_pages,
}

/// What a subscriber derives: each job's status and last event.
type Folded = HashMap<JobId, (JobStatus, i64)>;

fn take(folded: &mut Folded, jobs: Vec<JobRecord>) {
    assert!(jobs.len() <= 64);
    for JobRecord { job, .. } in jobs {
        assert!(folded.insert(job.id, (job.status, job.last_seq)).is_none(), "each job once");
    }
}

async fn next(subscription: &mut Subscription) -> Delivery {
    subscription.next().await.unwrap()
}

async fn a_snapshot_is_consistent_whatever_happens_between_its_pages(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    // Pages have 64 jobs, the newest first.
    let mut ids = Vec::new();
    for _ in 0..130 {
        ids.push(work.create().await);
    }
    for id in &ids[..10] {
        work.begin(*id).await;
    }
    work.finish(ids[20]).await;
    let as_of = 130 + 10 + 2;
    let statuses = vec![JobStatus::Queued, JobStatus::Succeeded];
    let filter = EventFilter { statuses, is_leaving: true, ..EventFilter::default() };
    let request = SubscribeRequest { filter: filter.clone(), with_snapshot: true, ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    let mut folded = Folded::new();
    let Delivery::Snapshot(first, _) = next(&mut subscription).await else { panic!("jobs come first") };
    assert!(first.iter().all(|record| record.job.created_seq > 60));
    take(&mut folded, first);
    // Among the jobs that were sent and those still to come, some leave the filter, some enter it, and one is new.
    work.begin(ids[129]).await;
    work.begin(ids[30]).await;
    work.end(ids[5]).await;
    work.begin(ids[128]).await;
    work.end(ids[128]).await;
    let new = work.create().await;
    let head = as_of + 6;
    let bookmark = loop {
        match next(&mut subscription).await {
            Delivery::Snapshot(jobs, _) => take(&mut folded, jobs),
            Delivery::Bookmark { seq, caught_up } => break (seq, caught_up),
            other => panic!("{other:?} within a snapshot"),
        }
    };
    assert_eq!(bookmark, (as_of, false));
    let mut last = as_of;
    while last < head {
        match next(&mut subscription).await {
            Delivery::Events(events, _) => {
                for event in events.iter().filter_map(|event| event.job()) {
                    assert!(event.seq > last && filter.matches(event));
                    last = event.seq;
                    if folded.get(&event.job_id).is_some_and(|(_, seq)| *seq >= event.seq) {
                        continue;
                    }
                    if filter.statuses.contains(&event.next_status) {
                        folded.insert(event.job_id, (event.next_status, event.seq));
                    } else {
                        folded.remove(&event.job_id);
                    }
                }
            }
            Delivery::Bookmark { seq, .. } => last = seq,
            other => panic!("{other:?} after the snapshot"),
        }
    }
    for id in ids.iter().chain([&new]) {
        let job = ledger.job(org, *id).await.unwrap().0.job.clone();
        let expected = filter.matches_job(&job).then_some((job.status, job.last_seq));
        assert_eq!(folded.get(id).copied(), expected, "{job:?}");
    }
}
