//! UpdateJob: what a queued job asks for is changed, and everybody sees the job as it is then.

use std::{collections::BTreeMap, time::Duration};

use jobledger_client::{
    BulkAction, Change, Claim, Client, Edit, Error, Follow, Item, JobEvent, JobEventKind, JobFilter, JobStatus,
    ListJobsRequest, NewJob, Report,
    proto::{JobChanges, JobEdit, StartBulkOperationRequest, StreamJobEventsRequest, UpdateJobRequest},
    to_value,
};
use jobledger_server::domain::{
    clock::{Clock as _, SystemClock},
    id::Digest,
};
use prost::Message as _;
use prost_types::FieldMask;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use crate::jobs::bulk::ended;
use crate::support::{
    harness::{Database, TestServer, on_both_databases},
    seeded::Seeded,
};

on_both_databases! {
    every_field_of_a_queued_job_can_be_changed,
    an_edit_is_refused_with_its_reason_or_does_nothing,
    labels_are_found_by_lists_and_streams_as_they_are_and_were,
    edits_of_many_callers_leave_jobs_that_verify,
    an_operation_changes_the_jobs_that_match,
}

pub(crate) async fn events(client: &Client, request: impl Into<StreamJobEventsRequest>) -> Vec<JobEvent> {
    let mut events = client.subscribe(request).await.unwrap();
    let mut found = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            found.push(*event);
        }
    }
    found
}

async fn edit_of(client: &Client, job: &str) -> JobEdit {
    let history = events(client, Follow::job(job).history_only()).await;
    let last = history.into_iter().next_back().expect("it was created");
    assert_eq!(
        (last.kind(), last.prev_status(), last.next_status()),
        (JobEventKind::Edited, JobStatus::Queued, JobStatus::Queued)
    );
    last.edit.expect("EDITED has it")
}

async fn listed(client: &Client, labels: &[(&str, &str)]) -> Vec<String> {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let list = client.list(ListJobsRequest { labels, ..Default::default() }).await.unwrap();
    list.jobs.into_iter().map(|job| job.id).collect()
}

fn sha256(text: &str) -> String {
    Digest(Sha256::digest(text).into()).to_string()
}

/// With two servers on PostgreSQL: one edits, the other has the job in its memory.
async fn every_field_of_a_queued_job_can_be_changed(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let elsewhere = other.as_ref().map_or(&client, |(_, client)| client);
    let in_an_hour = SystemClock.now() + Duration::from_secs(3_600);
    // A small payload, which is stored with the first event, and one that has a row of its own.
    for before in ["small".to_owned(), "large ".repeat(20_000)] {
        for after in [Some("other".to_owned()), Some("other ".repeat(20_000)), None] {
            let new = NewJob::new("t").payload(&before).unwrap().idempotency_key(format!(
                "{} {}",
                before.len(),
                after.as_ref().map_or(0, String::len)
            ));
            let new = new.scheduled_at(in_an_hour).label("was", "here").label("stays", "here");
            let job = elsewhere.create(new.clone()).await.unwrap().job;
            let edit = Edit::of(&job.id).at_once().priority(7).max_attempts(5);
            let edit = edit.run_timeout(Some(Duration::from_secs(60))).labels([("stays", "here"), ("is", "new")]);
            let mut edit = match &after {
                Some(after) => edit.payload(after).unwrap(),
                None => edit,
            };
            if after.is_none() {
                let mut request = UpdateJobRequest::from(edit);
                request.update_mask.as_mut().unwrap().paths.push("payload".to_owned());
                client.edit(request.clone()).await.unwrap();
                edit = Edit::of(&job.id).priority(7);
            } else {
                let edited = client.edit(edit.clone()).await.unwrap();
                assert_eq!((edited.priority, edited.max_attempts, edited.last_seq), (7, 5, job.last_seq + 1));
            }
            // Again without effect, on any server.
            let again = elsewhere.edit(edit).await.unwrap();
            assert_eq!(again.last_seq, job.last_seq + 1);

            let seen = elsewhere.get(&job.id).await.unwrap();
            let payload = after.as_ref().map(|after| to_value(after).unwrap());
            assert_eq!((seen.priority, seen.max_attempts, seen.payload), (7, 5, payload.clone()));
            assert_eq!(seen.run_timeout.map(|timeout| timeout.seconds), Some(60));
            let labels: BTreeMap<_, _> =
                [("stays", "here"), ("is", "new")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
            assert_eq!(seen.labels, labels);
            let JobEdit { fields, before: was, after: is } = edit_of(elsewhere, &job.id).await;
            assert_eq!(fields, ["payload", "priority", "scheduled_at", "labels", "max_attempts", "run_timeout"]);
            let (was, is) = (was.unwrap(), is.unwrap());
            assert_eq!((was.priority, is.priority, was.max_attempts, is.max_attempts), (0, 7, 1, 5));
            assert_eq!((was.scheduled_at, is.scheduled_at), (job.scheduled_at, seen.scheduled_at));
            assert_eq!((was.run_timeout, is.run_timeout), (None, seen.run_timeout));
            assert_eq!((&was.labels, &is.labels), (&job.labels, &labels));
            let size = |text: &str| to_value(text).unwrap().encoded_len() as i32;
            assert_eq!((was.payload_bytes, was.payload_sha256), (size(&before), sha256(&json!(before).to_string())));
            let after_mark = after.as_ref().map(|after| (size(after), sha256(&json!(after).to_string())));
            assert_eq!((is.payload_bytes, is.payload_sha256), after_mark.unwrap_or_default());

            // The key still finds the job by the request that created it.
            let repeated = client.create(new).await.unwrap();
            assert!(repeated.deduplicated && repeated.job.id == job.id);
            // A worker of any server gets the job as it is now.
            let lease = client.claim(Claim::new("w")).await.unwrap().remove(0);
            let claimed = lease.job.unwrap();
            assert_eq!((&claimed.id, claimed.payload, claimed.labels), (&job.id, payload, labels));
            client.update(Report::succeeded(&job.id).lease(lease.lease_token)).await.unwrap();
        }
    }
    server.stop().await;
    if let Some((other, _)) = other {
        other.stop().await;
    }
    database.verify().await;
}

fn field_of(error: &Error) -> String {
    match error {
        Error::InvalidRequest { violations, .. } => {
            violations.iter().map(|of| of.field.as_str()).collect::<Vec<_>>().join(" ")
        }
        other => panic!("{other:?}"),
    }
}

async fn an_edit_is_refused_with_its_reason_or_does_nothing(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let job = client.create(NewJob::new("t").max_attempts(3)).await.unwrap().job;
    let masked = |paths: &[&str]| UpdateJobRequest {
        job_id: job.id.clone(),
        update_mask: Some(FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() }),
        ..Default::default()
    };
    for (request, field) in [
        (masked(&[]), "update_mask"),
        (masked(&["priority", "type"]), "update_mask"),
        (masked(&["payload.x"]), "update_mask"),
        (UpdateJobRequest { priority: 3, ..masked(&["labels"]) }, "priority"),
        (UpdateJobRequest { priority: 1_001, ..masked(&["priority"]) }, "priority"),
        (UpdateJobRequest { max_attempts: 101, ..masked(&["max_attempts"]) }, "max_attempts"),
        (UpdateJobRequest { job_id: "x".to_owned(), ..masked(&["labels"]) }, "job_id"),
    ] {
        assert_eq!(field_of(&client.edit(request.clone()).await.unwrap_err()), field, "{request:?}");
    }
    let missing = client.edit(Edit::of(uuid::Uuid::nil().to_string()).priority(1)).await.unwrap_err();
    assert!(matches!(missing, Error::JobNotFound { .. }), "{missing:?}");
    let stale = client.edit(Edit::of(&job.id).priority(1).etag("stale")).await.unwrap_err();
    assert!(matches!(&stale, Error::EtagMismatch { current_etag } if *current_etag == job.etag), "{stale:?}");
    let stale = client.edit(Edit::of(&job.id).payload("x").unwrap().etag("stale")).await.unwrap_err();
    assert!(matches!(stale, Error::EtagMismatch { .. }), "{stale:?}");
    let too_large = client.edit(Edit::of(&job.id).payload(&"x".repeat(1 << 20)).unwrap()).await.unwrap_err();
    assert!(matches!(too_large, Error::PayloadTooLarge { .. }), "{too_large:?}");

    // What the job has already is no change, whatever the etag.
    let same =
        Edit::of(&job.id).priority(0).max_attempts(3).at_once().run_timeout(None).labels([("", ""); 0]).etag("stale");
    assert_eq!(client.edit(same.clone()).await.unwrap().last_seq, job.last_seq);
    let edited = client.edit(Edit::of(&job.id).priority(1).etag(&job.etag)).await.unwrap();
    assert_ne!(edited.etag, job.etag);

    // Only a queued job can be changed: not one at work, nor one that has ended.
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0);
    let change = || Edit::of(&job.id).priority(2);
    let refused = client.edit(change()).await.unwrap_err();
    assert!(matches!(&refused, Error::InvalidTransition { .. }), "{refused:?}");
    let payload = client.edit(Edit::of(&job.id).payload("x").unwrap()).await.unwrap_err();
    assert!(matches!(&payload, Error::InvalidTransition { .. }), "{payload:?}");
    assert_eq!(client.edit(Edit::of(&job.id).priority(1)).await.unwrap().status(), JobStatus::Running);
    // One that waits for its next attempt is queued.
    let failed = Report::failed(&job.id, "E", "").retry_after(Duration::from_secs(3_600)).lease(lease.lease_token);
    client.update(failed).await.unwrap();
    assert!(client.claim(Claim::new("w")).await.unwrap().is_empty());
    client.edit(change().at_once()).await.unwrap();
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0);
    client.update(Report::succeeded(&job.id).lease(lease.lease_token)).await.unwrap();
    let refused = client.edit(Edit::of(&job.id).priority(3)).await.unwrap_err();
    assert!(matches!(&refused, Error::InvalidTransition { .. }), "{refused:?}");
    server.stop().await;
    database.verify().await;
}

async fn labels_are_found_by_lists_and_streams_as_they_are_and_were(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let with =
        |labels: &[(&str, &str)]| labels.iter().fold(Follow::org(), |follow, (key, value)| follow.label(*key, *value));
    let mut live = client.subscribe(with(&[("customer", "new")])).await.unwrap();
    let mut view = client.view(with(&[("customer", "new")])).await.unwrap();
    let new = NewJob::new("t").label("customer", "old").label("kept", "v");
    let job = client.create(new).await.unwrap().job.id;
    let next = async |labels: [(&str, &str); 2]| client.edit(Edit::of(&job).labels(labels)).await.unwrap().last_seq;
    let edited = next([("customer", "new"), ("kept", "v")]).await;
    assert_eq!(listed(&client, &[("customer", "old")]).await, [""; 0]);
    assert_eq!(listed(&client, &[("customer", "new"), ("kept", "v")]).await, std::slice::from_ref(&job));
    let again = next([("customer", "newer"), ("kept", "v")]).await;
    client.cancel(&job, "").await.unwrap();

    // EDITED passes a filter by the labels from before it, too: whoever follows these learns that the job has left.
    let kinds = async |labels: &[(&str, &str)]| {
        let events = events(&client, with(labels).after(0).history_only()).await;
        events.iter().map(|event| (event.seq, event.kind())).collect::<Vec<_>>()
    };
    let (created, ended) = ((1, JobEventKind::Created), (again + 1, JobEventKind::Canceled));
    let (first, second) = ((edited, JobEventKind::Edited), (again, JobEventKind::Edited));
    assert_eq!(kinds(&[("customer", "old")]).await, [created, first]);
    assert_eq!(kinds(&[("customer", "new")]).await, [first, second]);
    assert_eq!(kinds(&[("customer", "newer")]).await, [second, ended]);
    assert_eq!(kinds(&[("kept", "v")]).await, [created, first, second, ended]);
    assert_eq!(kinds(&[("customer", "none")]).await, []);
    let mut found = Vec::new();
    while found.len() < 2 {
        if let Item::Event(event) = live.next().await.unwrap().unwrap() {
            found.push((event.seq, event.kind()));
        }
    }
    assert_eq!(found, [first, second]);
    let mut changes = Vec::new();
    while changes.len() < 2 {
        // Bookmarks change nothing.
        changes.extend(Some(view.next().await.unwrap().unwrap()).filter(|change| *change != Change::Nothing));
    }
    assert_eq!(changes, [Change::Changed(job.clone()), Change::Left(job)]);
    assert!(view.is_empty());
    drop((live, view));
    server.stop().await;
    database.verify().await;
}

/// Callers of two servers on PostgreSQL edit, claim, release and fail the same few jobs.
async fn edits_of_many_callers_leave_jobs_that_verify(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let clients = [client.clone(), other.as_ref().map_or(&client, |(_, client)| client).clone()];
    let mut jobs = Vec::new();
    for n in 0..4 {
        let new = NewJob::new("t").max_attempts(100).label("n", n.to_string()).payload(&n).unwrap();
        jobs.push(client.create(new).await.unwrap().job.id);
    }
    let seed = Seeded::from_environment("edits");
    let mut callers = JoinSet::new();
    for n in 0..8 {
        let (client, jobs) = (clients[n % 2].clone(), jobs.clone());
        callers.spawn(async move {
            let mut random = Seeded::new(seed ^ n as u64);
            for _ in 0..60 {
                let edit = Edit::of(&jobs[random.below(4) as usize]);
                let edit = match random.below(5) {
                    0 => edit.priority(random.below(3) as i32),
                    1 => edit.payload(&"p".repeat(random.below(3) as usize * 3_000)).unwrap(),
                    2 => edit.labels([("n", random.below(3).to_string())]),
                    3 => edit.scheduled_at(SystemClock.now() + Duration::from_millis(random.below(50))),
                    _ => {
                        let leases = client.claim(Claim::new(format!("w{n}"))).await.unwrap();
                        for lease in leases {
                            let id = lease.job.unwrap().id;
                            let report = match random.below(2) {
                                0 => Report::released(id),
                                _ => Report::failed(id, "E", "").retry_after(Duration::ZERO),
                            };
                            client.update(report.lease(lease.lease_token)).await.unwrap();
                        }
                        continue;
                    }
                };
                match client.edit(edit).await {
                    Ok(_) | Err(Error::InvalidTransition { .. } | Error::EtagMismatch { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
    }
    callers.join_all().await;
    // A view that followed only the events has what the rows have.
    for id in &jobs {
        let [here, there] = [clients[0].get(id).await.unwrap(), clients[1].get(id).await.unwrap()];
        assert_eq!(here, there);
        assert_eq!(listed(&client, &[("n", &here.labels["n"])]).await.iter().filter(|found| *found == id).count(), 1);
    }
    server.stop().await;
    if let Some((other, _)) = other {
        other.stop().await;
    }
    database.verify().await;
}

async fn an_operation_changes_the_jobs_that_match(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let in_an_hour = SystemClock.now() + Duration::from_secs(3_600);
    let mut jobs = Vec::new();
    for n in 0..700 {
        let job = NewJob::new("t").scheduled_at(in_an_hour).label("customer", (n % 2).to_string()).payload(&n).unwrap();
        jobs.push(job);
    }
    client.create_all(jobs).await.unwrap();
    let filter = JobFilter { labels: [("customer".to_owned(), "1".to_owned())].into(), ..JobFilter::default() };
    let changes = JobChanges {
        update_mask: Some(FieldMask { paths: vec!["scheduled_at".to_owned(), "labels".to_owned()] }),
        labels: [("moved".to_owned(), "yes".to_owned())].into(),
        ..JobChanges::default()
    };
    let request = StartBulkOperationRequest {
        action: BulkAction::Update.into(),
        filter: Some(filter),
        update: Some(changes.clone()),
        expected_count: Some(350),
        ..StartBulkOperationRequest::default()
    };
    let started = client.start_bulk(request.clone()).await.unwrap();
    let done = ended(&client, &started.id).await;
    assert_eq!((done.matched, done.changed, done.update), (350, 350, Some(changes)));
    assert_eq!(client.job_type("t").await.unwrap().claimable, 350);
    assert_eq!(listed(&client, &[("customer", "1")]).await, [""; 0]);
    // Those who follow the jobs of a customer learn which have left, by which operation.
    let follow = Follow::org().label("customer", "1").after(0).history_only();
    let left: Vec<_> =
        events(&client, follow).await.into_iter().filter(|event| event.bulk_operation_id == done.id).collect();
    assert_eq!(left.len(), 350);
    let leases = client.claim(Claim::new("w").max_jobs(100)).await.unwrap();
    assert!(leases.iter().all(|lease| lease.job.as_ref().unwrap().labels.contains_key("moved")));

    let refused = async |request| field_of(&client.start_bulk(request).await.unwrap_err());
    assert_eq!(refused(StartBulkOperationRequest { update: None, ..request.clone() }).await, "update");
    let cancel = BulkAction::Cancel.into();
    assert_eq!(refused(StartBulkOperationRequest { action: cancel, ..request.clone() }).await, "update");
    let payload =
        JobChanges { update_mask: Some(FieldMask { paths: vec!["payload".to_owned()] }), ..Default::default() };
    assert_eq!(refused(StartBulkOperationRequest { update: Some(payload), ..request }).await, "update.update_mask");
    server.stop().await;
    database.verify().await;
}
