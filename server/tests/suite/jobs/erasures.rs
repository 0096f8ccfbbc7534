//! EraseJob: nothing that people have put into a job is left of it, wherever it was kept.

use std::{collections::HashSet, fs, time::Duration};

use jobledger_client::{
    BulkAction, BulkOperation, BulkStatus, Claim, Client, Edit, Error, Follow, Item, Job, JobEvent, JobEventKind,
    JobFilter, JobStatus, ListJobsRequest, NewJob, Report, Subscription,
    proto::{
        BatchUpdateJobStatusRequest, EraseJobRequest, HeartbeatRequest, LeaseHeartbeat, RetryJobRequest,
        StartBulkOperationRequest, UpdateJobStatusRequest,
    },
    to_value,
};
use sqlx::{AssertSqlSafe, Row as _};
use tokio::time::{sleep, timeout};

use crate::{
    jobs::bulk::ended,
    jobs::edits::events,
    support::{
        harness::{Database, PATIENCE, TestServer, on_both_databases},
        program::Program,
    },
};

on_both_databases! {
    nothing_is_left_of_an_erased_job,
    an_erasure_is_refused_with_its_reason_or_does_nothing,
    a_job_that_has_not_finished_is_canceled_and_erased,
    a_long_history_is_erased_whole_though_the_server_is_killed,
    an_operation_erases_all_data_of_a_customer,
    a_view_by_labels_loses_an_erased_job,
    an_operation_is_not_over_before_a_long_history_is_blank,
    retention_and_erasures_count_each_byte_once,
}

/// A text that only the erased jobs have.
const SECRET: &str = "Xq7ZkSecret";

fn erase(job: &str) -> EraseJobRequest {
    EraseJobRequest { job_id: job.to_owned(), ..EraseJobRequest::default() }
}

fn cancel_and_erase(job: &str) -> EraseJobRequest {
    EraseJobRequest { cancel: true, ..erase(job) }
}

/// Where the secret still is: tables of PostgreSQL, files of SQLite.
async fn traces(database: &Database) -> Vec<String> {
    if database.is_postgres() {
        let mut connection = database.connect_as("postgres").await;
        let sql = "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'jobledger'::regnamespace AND c.relkind = 'r'";
        let tables: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut connection).await.unwrap();
        assert!(tables.len() > 15, "{tables:?}");
        let mut found = Vec::new();
        for table in tables {
            let sql = format!("SELECT count(*) FROM jobledger.\"{table}\" t WHERE t::text LIKE '%{SECRET}%'");
            let rows = sqlx::query(AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap();
            if rows.get::<i64, _>(0) > 0 {
                found.push(table);
            }
        }
        return found;
    }
    let folder = database.path().parent().unwrap().to_owned();
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let has_secret = |file: &std::path::PathBuf| {
        let bytes = fs::read(file).unwrap_or_default();
        bytes.windows(SECRET.len()).any(|part| part == SECRET.as_bytes())
    };
    files.filter(has_secret).map(|file| file.display().to_string()).collect()
}

/// Waits until no trace is left. SQLite's WAL is cut a moment after the answer.
async fn no_trace_stays(database: &Database) {
    let gone = async {
        while !traces(database).await.is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    if timeout(PATIENCE, gone).await.is_err() {
        panic!("there is still something in {:?}", traces(database).await);
    }
}

/// A job with the secret wherever there is room for one, that has run twice.
async fn full_of_secrets(client: &Client, size: usize) -> String {
    let secret = |what: &str| format!("{what} {SECRET}");
    let large = |what: &str| format!("{} {}", secret(what), "x".repeat(size));
    let new = NewJob::new("t").payload(&large("payload")).unwrap().idempotency_key(secret(&format!("key {size}")));
    let new = new.requested_by(secret("who")).label("customer", SECRET).label(SECRET, "label").max_attempts(3);
    let job = client.create(new).await.unwrap().job.id;
    client.edit(Edit::of(&job).payload(&large("other")).unwrap().labels([("is", SECRET)])).await.unwrap();
    client.update(Report::start(&job).stage(secret("stage")).message(secret("message"))).await.unwrap();
    client.update(Report::progress(&job).stage(secret("later")).percent(40).message(secret("long"))).await.unwrap();
    let failed = Report::failed(&job, secret("CODE"), secret("failed")).permanent().result(&large("why")).unwrap();
    client.update(failed).await.unwrap();
    let mut raw = client.raw();
    let again = RetryJobRequest { job_id: job.clone(), request_id: secret("again"), ..RetryJobRequest::default() };
    raw.retry_job(again).await.unwrap();
    let lease = client.claim(Claim::new("worker").types(["t"]).request_id(secret("claim"))).await.unwrap().remove(0);
    let done = Report::succeeded(&job).lease(&lease.lease_token).stage(secret("end")).message(secret("done"));
    client.update(done.result(&large("result")).unwrap()).await.unwrap();
    job
}

/// What the job and its events tell, apart from contents.
fn shape(events: &[JobEvent]) -> Vec<(i64, JobEventKind, i32, i32, Option<prost_types::Timestamp>)> {
    events.iter().map(|event| (event.seq, event.kind(), event.next_status, event.attempt, event.ts)).collect()
}

/// Waits for the event of the job's erasure. False if the stream ends before.
async fn is_told(events: &mut Subscription, job: &str) -> bool {
    let told = async {
        while let Some(item) = events.next().await {
            if let Item::Event(event) = item.unwrap()
                && event.kind() == JobEventKind::Erased
                && event.job_id == job
            {
                return true;
            }
        }
        false
    };
    timeout(PATIENCE, told).await.unwrap()
}

/// With two servers on PostgreSQL: one erases, the other has the job in its memory.
async fn nothing_is_left_of_an_erased_job(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let elsewhere = other.as_ref().map_or(&client, |(_, client)| client);
    let mut live = elsewhere.subscribe(Follow::org().after(0)).await.unwrap();
    // What fits into events and rows, and what has rows of its own.
    for size in [1, 50_000] {
        let job = full_of_secrets(&client, size).await;
        let beside =
            client.create(NewJob::new("other").label("customer", "kept").payload(&"kept").unwrap()).await.unwrap();
        assert!(!traces(&database).await.is_empty());
        let before: Job = elsewhere.get(&job).await.unwrap();
        assert!(format!("{before:?}").contains(SECRET));
        let history = events(elsewhere, Follow::job(&job).history_only()).await;

        let left = client.erase(erase(&job)).await.unwrap();
        assert!(left.erased_at.is_some() && left.status() == JobStatus::Succeeded, "{left:?}");
        no_trace_stays(&database).await;
        for client in [&client, elsewhere] {
            let now = client.get(&job).await.unwrap();
            assert_eq!(now, left);
            let expected = Job {
                erased_at: now.erased_at,
                updated_at: now.updated_at,
                etag: now.etag.clone(),
                last_seq: now.last_seq,
                idempotency_key: String::new(),
                requested_by: String::new(),
                labels: Default::default(),
                last_error_code: String::new(),
                last_error_message: String::new(),
                payload: None,
                result: None,
                stage: None,
                ..before.clone()
            };
            assert_eq!(now, expected);
            let blank = events(client, Follow::job(&job).history_only()).await;
            assert!(!format!("{blank:?}").contains(SECRET), "{blank:?}");
            let (last, others) = blank.split_last().unwrap();
            assert_eq!(shape(others), shape(&history));
            assert_eq!(
                (last.kind(), last.prev_status(), last.next_status()),
                (JobEventKind::Erased, JobStatus::Succeeded, JobStatus::Succeeded)
            );
            let labels = [("is".to_owned(), SECRET.to_owned())].into();
            let list = client.list(ListJobsRequest { labels, ..Default::default() }).await.unwrap();
            assert!(list.jobs.is_empty());
        }
        // The other servers' subscribers hear of it, whatever their labels.
        let labeled = elsewhere.subscribe(Follow::org().after(history[0].seq).label("customer", "kept")).await;
        for events in [&mut live, &mut labeled.unwrap()] {
            assert!(is_told(events, &job).await);
        }
        // Who reads again gets nothing from the memory of any server.
        let again = events(elsewhere, Follow::org().after(0).history_only()).await;
        assert!(!format!("{again:?}").contains(SECRET));
        assert_eq!(client.get(&beside.job.id).await.unwrap().payload, Some(to_value("kept").unwrap()));
    }
    database.verify().await;
    // A backup that is made afterwards has nothing either: it is a copy of these files.
    server.stop().await;
    no_trace_stays(&database).await;
}

async fn an_erasure_is_refused_with_its_reason_or_does_nothing(database: Database) {
    let (_server, client) = TestServer::on(&database).await;
    let job = client.create(NewJob::new("t").idempotency_key("key")).await.unwrap().job;
    let refused = client.erase(erase(&job.id)).await.unwrap_err();
    assert!(matches!(refused, Error::InvalidTransition { current: JobStatus::Queued }), "{refused:?}");
    client.update(Report::start(&job.id)).await.unwrap();
    let refused = client.erase(erase(&job.id)).await.unwrap_err();
    assert!(matches!(refused, Error::InvalidTransition { current: JobStatus::Running }), "{refused:?}");
    client.update(Report::failed(&job.id, "E", "")).await.unwrap();
    let outdated = EraseJobRequest { etag: job.etag, ..erase(&job.id) };
    assert!(matches!(client.erase(outdated).await, Err(Error::EtagMismatch { .. })));
    let unknown = client.erase(erase("01a202c1-14cb-75f7-8263-5ef8e4054d47")).await;
    assert!(matches!(unknown, Err(Error::JobNotFound { .. })), "{unknown:?}");
    assert!(matches!(client.erase(erase("x")).await, Err(Error::InvalidRequest { .. })));

    let erased = client.erase(erase(&job.id)).await.unwrap();
    // Once more, without effect and whatever the etag.
    assert_eq!(client.erase(EraseJobRequest { etag: "1".to_owned(), ..erase(&job.id) }).await.unwrap(), erased);
    let retry = RetryJobRequest { job_id: job.id.clone(), ..RetryJobRequest::default() };
    let refused = Error::from(client.raw().retry_job(retry).await.unwrap_err());
    assert!(matches!(refused, Error::InvalidTransition { current: JobStatus::Failed }), "{refused:?}");
    let late = client.update(Report::failed(&job.id, "E", "")).await;
    assert!(matches!(late, Err(Error::InvalidTransition { .. })), "{late:?}");
    // Its key is free, and this is another job.
    let new = client.create(NewJob::new("t").idempotency_key("key")).await.unwrap();
    assert!(!new.deduplicated && new.job.id != job.id);
    assert!(client.create(NewJob::new("t").idempotency_key("key")).await.unwrap().deduplicated);
}

async fn a_job_that_has_not_finished_is_canceled_and_erased(database: Database) {
    let (_server, client) = TestServer::on(&database).await;
    let new = || NewJob::new("t").payload(&SECRET).unwrap().label("who", SECRET);
    let queued = client.create(new()).await.unwrap().job.id;
    let erased = client.erase(cancel_and_erase(&queued)).await.unwrap();
    assert_eq!((erased.status(), erased.erased_at.is_some()), (JobStatus::Canceled, true));
    assert_eq!(client.job_type("t").await.unwrap().claimable, 0);

    let running = client.create(new()).await.unwrap().job.id;
    let lease = client.claim(Claim::new("worker").types(["t"])).await.unwrap().remove(0);
    assert_eq!(client.erase(cancel_and_erase(&running)).await.unwrap().status(), JobStatus::Canceled);
    let leases = vec![LeaseHeartbeat { lease_token: lease.lease_token.clone(), ..Default::default() }];
    let beat = HeartbeatRequest { worker_id: "worker".to_owned(), leases, ..Default::default() };
    assert!(client.raw().heartbeat(beat).await.unwrap().into_inner().results[0].lease_lost);
    let late = client.update(Report::succeeded(&running).lease(&lease.lease_token).result(&SECRET).unwrap()).await;
    assert!(matches!(late, Err(Error::LeaseLost)), "{late:?}");
    for job in [&queued, &running] {
        let kinds: Vec<_> = events(&client, Follow::job(job).history_only()).await.iter().map(JobEvent::kind).collect();
        assert!(kinds.ends_with(&[JobEventKind::Canceled, JobEventKind::Erased]), "{kinds:?}");
    }
    no_trace_stays(&database).await;
}

/// A job with so many thousand events, and three more.
async fn long_history(client: &Client, thousands: usize) -> String {
    let job = client.create(NewJob::new("long").requested_by(SECRET).label("who", SECRET)).await.unwrap().job.id;
    client.update(Report::start(&job)).await.unwrap();
    for n in 0..thousands {
        let report = |m| UpdateJobStatusRequest::from(Report::progress(&job).message(format!("{SECRET} {n} {m}")));
        let updates = (0..1_000).map(report).collect();
        client.raw().batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await.unwrap();
    }
    client.update(Report::succeeded(&job)).await.unwrap();
    job
}

async fn an_operation_is_not_over_before_a_long_history_is_blank(database: Database) {
    let (_server, client) = TestServer::on(&database).await;
    let job = long_history(&client, 12).await;
    let filter = Some(JobFilter { types: vec!["long".to_owned()], ..JobFilter::default() });
    let request = StartBulkOperationRequest { action: BulkAction::Erase.into(), filter, ..Default::default() };
    let id = client.start_bulk(request).await.unwrap().id;
    let done = ended(&client, &id).await;
    assert_eq!((done.status(), done.reached, done.changed), (BulkStatus::Succeeded, 1, 1), "{done:?}");
    let history = events(&client, Follow::job(&job).history_only()).await;
    assert!(!format!("{history:?}").contains(SECRET));
}

/// An operation erases the jobs that retention removes at the same time. At the end `verify` compares what is counted.
async fn retention_and_erasures_count_each_byte_once(database: Database) {
    let mut config = database.config();
    config.retention.set(jobledger_server::domain::status::JobStatus::Succeeded, Duration::from_millis(500));
    let server = TestServer::start(config).await;
    let client = server.client();
    let kept = client.create(NewJob::new("kept")).await.unwrap().job.id;
    for _ in 0..3 {
        let new = (0..300).map(|n| NewJob::new("t").label("n", n.to_string()).payload(&"x".repeat(900)).unwrap());
        let created = client.create_all(new).await.unwrap().into_iter().map(|created| created.unwrap().job.id);
        let reports = created.flat_map(|id| [Report::start(&id).message("begun"), Report::succeeded(&id)]);
        let updates: Vec<_> = reports.map(UpdateJobStatusRequest::from).collect();
        client.raw().batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await.unwrap();
        let filter = Some(JobFilter { types: vec!["t".to_owned()], ..JobFilter::default() });
        let request = StartBulkOperationRequest { action: BulkAction::Erase.into(), filter, ..Default::default() };
        let id = client.start_bulk(request).await.unwrap().id;
        // Retention removes the events of which a stream from the beginning would tell.
        let is_over = async {
            while client.bulk_operation(&id).await.unwrap().status() != BulkStatus::Succeeded {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, is_over).await.unwrap();
    }
    let gone = async {
        while client.list(ListJobsRequest::default()).await.unwrap().jobs.len() > 1 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    assert!(client.get(&kept).await.is_ok());
    server.stop().await;
}

/// More events than one batch blanks. The server is killed once the first batch is committed, and others finish it.
async fn a_long_history_is_erased_whole_though_the_server_is_killed(database: Database) {
    const THOUSANDS: usize = 25;
    let program = Program::start(&database);
    let client = program.client();
    let job = long_history(&client, THOUSANDS).await;
    let erasing = tokio::spawn({
        let (client, request) = (client.clone(), erase(&job));
        async move { client.erase(request).await }
    });
    assert!(is_told(&mut client.subscribe(Follow::org().after(0)).await.unwrap(), &job).await);
    assert!(!program.end_by("KILL").success());
    erasing.abort();

    let program = Program::start(&database);
    let client = program.client();
    no_trace_stays(&database).await;
    // Once it answers, all of it is gone.
    client.erase(erase(&job)).await.unwrap();
    let history = events(&client, Follow::job(&job).history_only()).await;
    assert_eq!(history.len(), THOUSANDS * 1_000 + 4);
    assert!(!format!("{history:?}").contains(SECRET));
    database.verify().await;
    assert!(program.end_by("TERM").success());
}

async fn an_operation_erases_all_data_of_a_customer(database: Database) {
    let (_server, client) = TestServer::on(&database).await;
    let mut theirs = HashSet::new();
    for n in 0..40 {
        let new = NewJob::new("t").label("customer", SECRET).payload(&SECRET).unwrap().requested_by(SECRET);
        let job = client.create(new.idempotency_key(format!("{SECRET} {n}"))).await.unwrap().job.id;
        match n % 4 {
            0 => {}
            1 => _ = client.update(Report::start(&job)).await.unwrap(),
            2 => {
                client.update(Report::start(&job)).await.unwrap();
                client.update(Report::succeeded(&job).result(&SECRET).unwrap()).await.unwrap();
            }
            _ => {
                client.update(Report::start(&job).message(SECRET)).await.unwrap();
                client.update(Report::failed(&job, "E", SECRET)).await.unwrap();
            }
        }
        theirs.insert(job);
    }
    let others = client.create_all((0..10).map(|_| NewJob::new("t").label("customer", "other"))).await.unwrap();
    let filter = JobFilter { labels: [("customer".to_owned(), SECRET.to_owned())].into(), ..JobFilter::default() };
    let start = |action: BulkAction| StartBulkOperationRequest {
        operation_id: uuid::Uuid::now_v7().to_string(),
        action: action.into(),
        filter: Some(filter.clone()),
        reason: format!("{SECRET} asked for it"),
        ..StartBulkOperationRequest::default()
    };
    // First what has finished, then all.
    let request = start(BulkAction::Erase);
    let started = client.start_bulk(request.clone()).await.unwrap();
    assert!(format!("{started:?}").contains(SECRET));
    let finished = ended(&client, &request.operation_id).await;
    assert_eq!(
        (finished.status(), finished.matched, finished.changed),
        (BulkStatus::Succeeded, 20, 20),
        "{finished:?}"
    );
    let all = start(BulkAction::CancelAndErase);
    client.start_bulk(all.clone()).await.unwrap();
    let done = ended(&client, &all.operation_id).await;
    assert_eq!((done.status(), done.matched, done.changed), (BulkStatus::Succeeded, 20, 20), "{done:?}");
    // It has forgotten whose jobs they were, and the call may still be repeated.
    let BulkOperation { filter, reason, .. } = &done;
    assert_eq!((filter, &**reason), (&Some(JobFilter::default()), ""));
    assert_eq!(client.start_bulk(all).await.unwrap(), done);

    no_trace_stays(&database).await;
    for job in &theirs {
        assert!(client.get(job).await.unwrap().erased_at.is_some());
        let last = events(&client, Follow::job(job).history_only()).await.pop().unwrap();
        let by = [&finished.id, &done.id].contains(&&last.bulk_operation_id);
        assert!(last.kind() == JobEventKind::Erased && by, "{last:?}");
    }
    for other in others {
        assert!(client.get(&other.unwrap().job.id).await.unwrap().erased_at.is_none());
    }
}

async fn a_view_by_labels_loses_an_erased_job(database: Database) {
    let (_server, client) = TestServer::on(&database).await;
    let job = client.create(NewJob::new("t").label("a", "b")).await.unwrap().job.id;
    let mut labeled = client.view(Follow::org().label("a", "b")).await.unwrap();
    let mut all = client.view(Follow::org()).await.unwrap();
    let until = async |view: &mut jobledger_client::View, is_there: bool| {
        while view.get(&job).is_some() != is_there {
            timeout(PATIENCE, view.next()).await.unwrap().unwrap().unwrap();
        }
    };
    until(&mut labeled, true).await;
    client.update(Report::start(&job)).await.unwrap();
    client.update(Report::failed(&job, "E", SECRET)).await.unwrap();
    client.erase(erase(&job)).await.unwrap();
    until(&mut labeled, false).await;
    let erased = client.get(&job).await.unwrap();
    while all.get(&job).is_none_or(|job| job.last_seq < erased.last_seq) {
        timeout(PATIENCE, all.next()).await.unwrap().unwrap().unwrap();
    }
    assert_eq!(all.get(&job).unwrap().last_error_message, "");
}
