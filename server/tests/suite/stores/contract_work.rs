//! What every store must do for claims, leases and lists, whichever database it is on.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use jobledger_server::{
    domain::{
        event::{JobError, JobEvent, Position},
        id::{Digest, JobId, OrgId},
        job::{Ended, Job, JobSpec},
        job_filter::JobFilter,
        json::Json,
        lease::Lease,
        status::JobStatus,
    },
    store::{
        Changed, Changes, ClaimOrder, Differs, DueWork, FoundJob, FoundReady, Head, HeldBy, LARGE_JOB, ListOrder,
        ListQuery, Needs, NewPayload, NextDue, Ready, Store,
    },
};
use uuid::Uuid;

use crate::{
    stores::contract::contract,
    support::factory::{event, head, job, load, org, time, write},
    support::harness::Database,
};

contract! {
    ready_jobs_are_loaded_in_their_order_and_no_more_than_wanted,
    due_jobs_are_loaded_and_the_next_is_known,
    jobs_are_found_by_the_claim_that_holds_them,
    an_org_is_due_no_later_than_its_jobs,
    a_change_without_an_event_leaves_the_log_as_it_is,
    contents_are_read_for_many_and_lists_go_on_where_they_stopped,
    jobs_of_any_orgs_are_read_together,
    jobs_that_are_as_they_were_are_told_from_others,
    what_changes_of_a_job_is_written_whatever_stays,
}

async fn what_changes_of_a_job_is_written_whatever_stays(store: Arc<dyn Store>) {
    let at = Some(time(77));
    type Change = fn(&mut Job);
    let changes: [(Differs, Change); 19] = [
        (Differs::Nowhere, |job| job.last_job_seq = 9),
        (Differs::InMore, |job| job.status = JobStatus::Running),
        (Differs::InMore, |job| job.attempt = 3),
        (Differs::InMore, |job| job.failures = 2),
        (Differs::InMore, |job| job.started_at = Some(time(5))),
        (Differs::InMore, |job| job.attempt_started_at = Some(time(6))),
        (Differs::InMore, |job| job.finished_at = Some(time(7))),
        (Differs::InMore, |job| job.scheduled_at = Some(time(8))),
        (Differs::InMore, |job| job.ready_at = time(99)),
        (Differs::InMore, |job| job.lease_nonce = 4),
        (Differs::InMore, |job| job.due_at = Some(time(3))),
        (Differs::InMore, |job| {
            job.lease = Some(Lease {
                worker: "w".into(),
                granted: Duration::from_secs(9),
                expires_at: time(10),
                request: Some("r".into()),
                is_confirmed: true,
            });
        }),
        (Differs::InMore, |job| job.cancel_requested = true),
        (Differs::InMore, |job| job.retry_request = Some("again".into())),
        (Differs::InMore, |job| job.outcome = Some(Ended { digest: Digest([7; 32]), nonce: Some(2) })),
        (Differs::InMore, |job| job.last_error = Some(JobError { code: "E".into(), message: "m".into() })),
        (Differs::InMore, |job| job.result_at = Some(Position { seq: 1, recorded_at: time(1) })),
        (Differs::InMore, |job| (job.status, job.lease_nonce, job.cancel_requested) = (JobStatus::Running, 5, true)),
        (Differs::Nowhere, |_| {}),
    ];
    let written = async |org: OrgId, before: &[Job], which: &[usize]| {
        let mut changed = Vec::new();
        for n in which {
            let mut job = before[*n].clone();
            job.updated_at = time(77);
            changes[*n].1(&mut job);
            let differs = Differs::between(&before[*n], &job);
            assert_eq!(differs, changes[*n].0, "{n}");
            changed.push(Changed { job, differs });
        }
        let expected: Vec<_> = changed.iter().map(|changed| changed.job.clone()).collect();
        let head = Head { recorded_at: at, ..head(before.len() as i64).unwrap() };
        write(store.as_ref(), org, &Changes { head: Some(head), changed, ..Changes::default() }).await.unwrap();
        // Compares with the database, not with what is cached.
        let list = ListQuery::first(JobFilter::default(), ListOrder::NewestFirst, before.len());
        let mut found = store.list(org, &list).await.unwrap().jobs;
        found.retain(|job| ids(&expected).contains(&job.id));
        found.sort_by_key(|job| job.created_seq);
        assert_eq!(found, expected, "{which:?}");
    };
    let nothing: &dyn Fn(&mut Job) = &|_| {};
    let (org, before) = queued(&*store, &[nothing; 19]).await;
    for n in 0..before.len() {
        written(org, &before, &[n]).await;
    }
    let (org, before) = queued(&*store, &[nothing; 19]).await;
    written(org, &before, &(0..before.len()).collect::<Vec<_>>()).await;
}

async fn jobs_that_are_as_they_were_are_told_from_others(store: Arc<dyn Store>) {
    type Change = fn(&mut Job);
    let held: &dyn Fn(&mut Job) = &|job| hold(job, "a");
    let nothing: &dyn Fn(&mut Job) = &|_| {};
    let (_, mut stored) = queued(&*store, &[nothing, held]).await;
    stored.extend(queued(&*store, &[held]).await.1);
    let changes: [Change; 7] = [
        |_| {},
        |job| job.last_seq += 1,
        |job| job.due_at = Some(time(5)),
        |job| job.lease = job.lease.take().map(|lease| Lease { expires_at: time(11), ..lease }),
        |job| job.lease = job.lease.take().map(|lease| Lease { is_confirmed: !lease.is_confirmed, ..lease }),
        |job| job.id = JobId(Uuid::now_v7()),
        |job| job.org_id = crate::support::factory::org(),
    ];
    let asked: Vec<_> = changes
        .iter()
        .flat_map(|change| stored.iter().cloned().map(move |mut job| (change(&mut job), job).1))
        .collect();
    let is_same: Vec<_> = asked.iter().map(|job| stored.contains(job)).collect();
    // The job without a lease has no lease fields to differ in.
    assert_eq!(is_same.iter().filter(|is_same| **is_same).count(), 5);
    assert_eq!(store.unchanged(&asked.iter().collect::<Vec<_>>()).await.unwrap(), is_same);
    assert!(store.unchanged(&[]).await.unwrap().is_empty());
}

/// A job's payload, stored where the job says: with its first event, or in a row of its own.
fn new_payload(job: &Job, json: &Json) -> NewPayload {
    NewPayload { job: job.id, json: json.clone(), seq: job.payload_recorded_at.map(|_| job.created_seq) }
}

async fn jobs_of_any_orgs_are_read_together(store: Arc<dyn Store>) {
    let text = |bytes: usize| Json::from_trusted(format!("\"{}\"", "x".repeat(bytes)));
    let mut written = Vec::new();
    for (payload, is_small) in [(None, false), (Some(text(7)), true), (Some(text(LARGE_JOB as usize)), false)] {
        let org = org();
        let mut jobs = [job(org, "t", 1), job(org, "t", 2)];
        spec(&mut jobs[0]).payload_bytes = payload.as_ref().map_or(0, |payload| payload.as_str().len() as u32);
        jobs[0].payload_recorded_at = is_small.then_some(time(1));
        // The second job has a result of the same size.
        jobs[1].result_at = payload.as_ref().map(|_| Position { seq: 2, recorded_at: time(2) });
        let with_result = JobEvent { result: payload.clone(), ..event(&jobs[1], 2) };
        let changes = Changes {
            head: head(2),
            created: jobs.to_vec(),
            payloads: payload.iter().map(|payload| new_payload(&jobs[0], payload)).collect(),
            events: vec![Arc::new(event(&jobs[0], 1)), Arc::new(with_result)],
            ..Changes::default()
        };
        write(&*store, org, &changes).await.unwrap();
        written.extend(jobs);
    }
    let [a, b, c, d, e, f] = [0, 1, 2, 3, 4, 5].map(|n| (written[n].org_id, written[n].id));
    // The names are not in the order of their orgs, and one comes twice. Two match no job: one names a job of another org.
    let names = [f, a, d, (a.0, c.1), c, b, a, e, (org(), JobId(Uuid::now_v7()))];
    let found = store.jobs(&names).await.unwrap();
    let large = [0, 7];
    for (n, (name, found)) in names.iter().zip(found).enumerate() {
        let alone = store.job(name.0, name.1).await.unwrap();
        let expected = match alone {
            None => FoundJob::Nothing,
            Some(_) if large.contains(&n) => FoundJob::Large,
            Some(record) => FoundJob::Whole(Arc::new(record)),
        };
        assert_eq!(found, expected, "{n}");
        assert_eq!(found == FoundJob::Nothing, [3, 8].contains(&n));
    }
    assert!(store.jobs(&[]).await.unwrap().is_empty());
}

/// Queued jobs of a new org: plain jobs, each changed by one of these functions.
async fn queued(store: &dyn Store, make: &[&dyn Fn(&mut Job)]) -> (OrgId, Vec<Job>) {
    let org = org();
    let mut jobs = Vec::new();
    for (seq, make) in (1..).zip(make) {
        let mut job = job(org, "t", seq);
        make(&mut job);
        jobs.push(job);
    }
    let changes = Changes {
        head: head(jobs.len() as i64),
        created: jobs.clone(),
        events: jobs.iter().map(|job| Arc::new(event(job, job.last_seq))).collect(),
        ..Changes::default()
    };
    write(store, org, &changes).await.unwrap();
    (org, jobs)
}

fn spec(job: &mut Job) -> &mut JobSpec {
    Arc::make_mut(&mut job.spec)
}

fn ids<'a>(jobs: impl IntoIterator<Item = &'a Job>) -> Vec<JobId> {
    jobs.into_iter().map(|job| job.id).collect()
}

async fn ready_jobs_are_loaded_in_their_order_and_no_more_than_wanted(store: Arc<dyn Store>) {
    let (org, jobs) = queued(
        &*store,
        &[
            &|job| job.ready_at = time(50),
            &|job| spec(job).priority = -3,
            &|job| job.ready_at = time(40),
            &|job| spec(job).priority = 7,
            &|job| job.due_at = Some(time(0)),
            &|job| job.status = JobStatus::Running,
            &|job| spec(job).job_type = "u".into(),
        ],
    )
    .await;
    let found = async |ready| load(&*store, org, Needs { ready, ..Needs::default() }).await.ready;
    let ready = async |ready| found(ready).await.jobs.iter().map(|job| job.id).collect::<Vec<_>>();
    let of = |types: &[(&str, usize)]| {
        let of = types.iter().map(|(name, n)| (Arc::from(*name), *n)).collect();
        Ready { of, ..Ready::default() }
    };
    let in_order = [3, 2, 0, 1].map(|n: usize| jobs[n].id);
    assert_eq!(ready(of(&[("t", 9), ("none", 9)])).await, in_order);
    assert_eq!(ready(of(&[("t", 2)])).await, in_order[..2]);
    // The job of the other type has been ready longer than all but the most urgent job.
    let all = [in_order[0], jobs[6].id, in_order[1], in_order[2], in_order[3]];
    for n in [1, 2, 3, 5, 9] {
        assert_eq!(ready(Ready { all: n, ..Ready::default() }).await, all[..n.min(5)]);
    }
    let both: HashSet<_> = ready(Ready { all: 1, ..of(&[("u", 3), ("t", 2)]) }).await.into_iter().collect();
    assert_eq!(both, HashSet::from([in_order[0], in_order[1], jobs[6].id]), "each once");
    // The answer says for each type, and for all types, whether there may be more jobs.
    let FoundReady { jobs: all, cut, is_cut, last_of_all } = found(Ready { all: 6, ..of(&[("t", 4), ("u", 2)]) }).await;
    assert_eq!((all.len(), cut.into_iter().collect::<Vec<_>>(), is_cut), (5, vec!["t".into()], false));
    assert_eq!(last_of_all, None);
    let five = found(Ready { all: 5, ..Ready::default() }).await;
    assert!(five.is_cut && five.last_of_all == five.jobs.iter().map(|job| job.order).max(), "{five:?}");
    let order = all.iter().find(|job| job.id == jobs[0].id).unwrap().order;
    assert_eq!(order, ClaimOrder::of(&jobs[0]));
    // The rows of ready jobs are read separately.
    let mut batch = store.begin(&[org]).await.unwrap();
    let rows = batch.ready_jobs(&[(org, jobs[6].id), (org, jobs[3].id)]).await.unwrap();
    let rows: HashSet<_> = rows.into_iter().map(|job| (job.id, job.spec.priority)).collect();
    assert_eq!(rows, HashSet::from([(jobs[6].id, 0), (jobs[3].id, 7)]));
}

async fn due_jobs_are_loaded_and_the_next_is_known(store: Arc<dyn Store>) {
    let hour = 3_600_000_000;
    let (org, jobs) = queued(
        &*store,
        &[
            &|job| job.due_at = Some(time(-20)),
            &|_| {},
            &|job| job.due_at = Some(time(-30)),
            &|job| job.due_at = Some(time(2 * hour)),
            &|job| job.due_at = Some(time(hour)),
        ],
    )
    .await;
    let loaded = load(&*store, org, Needs { due: Some(9), ..Needs::default() }).await;
    assert_eq!((loaded.due, loaded.next_due), (vec![jobs[2].id, jobs[0].id], Some(time(hour))));
    assert_eq!(loaded.jobs.len(), 2);
    let loaded = load(&*store, org, Needs { due: Some(1), ..Needs::default() }).await;
    assert_eq!((loaded.due, loaded.next_due), (vec![jobs[2].id], Some(time(hour))));
    let (org, _) = queued(&*store, &[&|_| {}]).await;
    let loaded = load(&*store, org, Needs { due: Some(9), ..Needs::default() }).await;
    assert_eq!((loaded.due, loaded.next_due), (vec![], None));
}

fn hold(job: &mut Job, request: &str) {
    job.status = JobStatus::Running;
    let (worker, granted) = ("w".into(), Duration::from_secs(9));
    let request = Some(request.into());
    job.lease = Some(Lease { worker, granted, expires_at: time(9), request, is_confirmed: false });
}

async fn jobs_are_found_by_the_claim_that_holds_them(store: Arc<dyn Store>) {
    let (org, jobs) =
        queued(&*store, &[&|job| hold(job, "a"), &|job| hold(job, "b"), &|job| hold(job, "a"), &|_| {}]).await;
    let by = |worker: &str, request: &str, limit| HeldBy { worker: worker.into(), request: request.into(), limit };
    let held = async |held| {
        let mut found = ids(&load(&*store, org, Needs { held, ..Needs::default() }).await.jobs);
        found.sort_unstable();
        found
    };
    let (worker, other) = ("w", "another");
    assert_eq!(held(vec![by(worker, "a", 9), by(worker, "none", 9)]).await, [jobs[0].id, jobs[2].id]);
    assert_eq!(held(vec![by(other, "a", 9)]).await, [], "others may number theirs alike");
    assert_eq!(held(vec![by(worker, "a", 1)]).await.len(), 1, "no more than are wanted");
}

async fn an_org_is_due_no_later_than_its_jobs(store: Arc<dyn Store>) {
    let (org, _) = queued(&*store, &[&|_| {}]).await;
    let is_due = async || store.take_due(DueWork::Jobs, 100, Duration::ZERO).await.unwrap().contains(&org);
    let note = async |next_due| {
        write(&*store, org, &Changes { next_due: Some(next_due), ..Changes::default() }).await.unwrap();
    };
    let (past, future) = (time(-1_000_000), time(3_600_000_000));
    assert!(!is_due().await, "nothing was said");
    note(NextDue::By(future)).await;
    assert!(!is_due().await);
    note(NextDue::By(past)).await;
    assert!(is_due().await);
    note(NextDue::By(future)).await;
    assert!(is_due().await, "later is no news");
    note(NextDue::At(Some(future))).await;
    assert!(!is_due().await);
    note(NextDue::At(Some(past))).await;
    note(NextDue::At(None)).await;
    assert!(!is_due().await);
}

async fn a_change_without_an_event_leaves_the_log_as_it_is(store: Arc<dyn Store>) {
    let (org, jobs) = queued(&*store, &[&|_| {}, &|_| {}]).await;
    let before = load(&*store, org, Needs::default()).await.head;
    let mut changed = jobs[1].clone();
    hold(&mut changed, "a");
    write(&*store, org, &Changes { changed: vec![changed.clone().into()], ..Changes::default() }).await.unwrap();
    assert_eq!(load(&*store, org, Needs::default()).await.head, before);
    assert_eq!(store.job(org, changed.id).await.unwrap().unwrap().job, changed);
    // A higher `ready_gen` is stored and announced without an event, too.
    let raised = jobledger_server::store::Head { ready_gen: before.ready_gen + 1, ..before };
    write(&*store, org, &Changes { head: Some(raised), ..Changes::default() }).await.unwrap();
    assert_eq!(load(&*store, org, Needs::default()).await.head, raised);
    assert_eq!(store.reaches(&[org]).await.unwrap(), [(org, raised.reach())]);
}

async fn contents_are_read_for_many_and_lists_go_on_where_they_stopped(store: Arc<dyn Store>) {
    let (org, jobs) = queued(&*store, &[&|_| {}, &|_| {}, &|_| {}, &|_| {}, &|_| {}]).await;
    let payload = Json::from_trusted("{\"a\": 1}");
    let mut with = job(org, "t", 6);
    let mut small = job(org, "t", 7);
    for job in [&mut with, &mut small] {
        spec(job).payload_bytes = 10;
    }
    small.payload_recorded_at = Some(time(7));
    spec(&mut with).labels = Arc::new(BTreeMap::from([("k".to_owned(), "v".to_owned())]));
    let changes = Changes {
        head: head(7),
        created: vec![with.clone(), small.clone()],
        payloads: vec![new_payload(&with, &payload), new_payload(&small, &payload)],
        events: vec![Arc::new(event(&with, 6)), Arc::new(event(&small, 7))],
        ..Changes::default()
    };
    write(&*store, org, &changes).await.unwrap();
    let wanted = [with.id, JobId(Uuid::now_v7()), jobs[0].id, small.id];
    let contents: BTreeMap<_, _> = store.contents(org, &wanted).await.unwrap().into_iter().collect();
    assert_eq!((contents.len(), &contents[&with.id].payload), (3, &Some(payload.clone())));
    assert_eq!(contents[&small.id].payload, Some(payload));
    assert_eq!((&contents[&jobs[0].id].payload, &contents[&jobs[0].id].result), (&None, &None));

    let mut list = ListQuery::first(JobFilter::default(), ListOrder::NewestFirst, 4);
    let page = store.list(org, &list).await.unwrap();
    assert_eq!(
        (ids(&page.jobs), page.next, page.as_of_seq),
        (vec![small.id, with.id, jobs[4].id, jobs[3].id], Some(4), 7)
    );
    list.after = page.next.unwrap();
    let page = store.list(org, &list).await.unwrap();
    assert_eq!((ids(&page.jobs), page.next), (vec![jobs[2].id, jobs[1].id, jobs[0].id], None));
    list.filter.labels = BTreeMap::from([("k".to_owned(), "v".to_owned())]);
    list.after = i64::MAX;
    assert_eq!(store.list(org, &list).await.unwrap().jobs, [with]);
    assert!(store.list(crate::support::factory::org(), &list).await.unwrap().jobs.is_empty());
}
