//! What every store must do for transactions that several orgs share.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jobledger_server::{
    domain::{
        id::{Digest, OrgId},
        job::{Idempotency, Job, JobSpec},
        status::JobStatus,
    },
    store::{Changes, Head, Needs, NextDue, StatisticsQuery, Store, StoreError},
};
use tokio::time::timeout;

use crate::{
    stores::contract::contract,
    support::factory::{all, counts, event, fill, job, load, org, tallies, time},
    support::harness::Database,
};

contract! {
    orgs_that_share_a_transaction_are_written_together_and_each_to_its_own,
    what_is_refused_of_one_org_is_written_of_none,
}

/// New orgs with one job each, so that each has a log.
async fn orgs(store: &dyn Store, n: usize) -> Vec<OrgId> {
    let orgs: Vec<_> = (0..n).map(|_| org()).collect();
    for org in &orgs {
        fill(store, *org, "t", 1).await;
    }
    orgs
}

/// The changes that create an org's second job, which has its own type.
fn second(org: OrgId, key: Option<&str>) -> Changes {
    let mut created = job(org, &format!("of {}", org.0), 2);
    let idempotency = key.map(|key| Idempotency { key: key.into(), digest: Some(Digest([1; 32])) });
    created.spec = Arc::new(JobSpec { idempotency, ..(*created.spec).clone() });
    Changes {
        head: Some(Head { seq: 2, recorded_at: Some(time(2)), types: 2, ..Head::EMPTY }),
        events: vec![Arc::new(event(&created, 2))],
        tallies: tallies(&created.spec.job_type, counts(JobStatus::Queued, 1)),
        next_due: Some(NextDue::By(time(9))),
        created: vec![created],
        ..Changes::default()
    }
}

fn created(changes: &Changes) -> &Job {
    &changes.created[0]
}

async fn orgs_that_share_a_transaction_are_written_together_and_each_to_its_own(store: Arc<dyn Store>) {
    let orgs = orgs(&*store, 40).await;
    let mut batch = store.begin(&orgs).await.unwrap();
    assert_eq!(batch.orgs().iter().collect::<BTreeSet<_>>(), orgs.iter().collect());
    let needs = |org: &OrgId| (*org, Needs { types: vec!["t".into(), "u".into()], ..Needs::default() });
    let loaded = batch.load(&orgs.iter().map(needs).collect::<Vec<_>>()).await.unwrap();
    assert!(loaded.iter().all(|loaded| loaded.head.seq == 1 && loaded.types == ["t"]));
    let changes: Vec<_> = orgs.iter().map(|org| second(*org, None)).collect();
    let of_orgs: Vec<_> = orgs.iter().copied().zip(&changes).collect();
    let records = batch.write(&of_orgs).await.unwrap();
    assert!(records.iter().all(|record| record.is_some_and(|record| record.n == 2)));
    batch.commit().await.unwrap();
    for ((org, changes), record) in of_orgs.iter().zip(records) {
        let (org, written) = (*org, created(changes));
        let page = store.events(org, &all(1)).await.unwrap();
        assert_eq!(page.of_jobs().map(|event| event.job_id).collect::<Vec<_>>(), [written.id]);
        assert_eq!(store.job(org, written.id).await.unwrap().unwrap().job, *written);
        let statistics = store.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
        let types: Vec<_> = statistics.types.iter().map(|of_type| &*of_type.job_type).collect();
        assert_eq!(types, [&*written.spec.job_type, "t"]);
        assert!(store.begin(&[org]).await.unwrap().has(org, record.unwrap()).await.unwrap());
    }
}

async fn what_is_refused_of_one_org_is_written_of_none(store: Arc<dyn Store>) {
    let orgs = orgs(&*store, 3).await;
    let mut changes: Vec<_> = orgs.iter().map(|org| second(*org, Some("key"))).collect();
    let twin = second(orgs[1], Some("key"));
    changes[1].created.extend(twin.created);
    let mut batch = store.begin(&orgs).await.unwrap();
    let refused = batch.write(&orgs.iter().copied().zip(&changes).collect::<Vec<_>>()).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    drop(batch);
    for org in orgs {
        let free = timeout(Duration::from_secs(5), load(&*store, org, Needs::default())).await;
        assert_eq!(free.expect("the head is free").head.seq, 1);
    }
}
