//! Bulk operations over the wire: which jobs they reach, and that they reach each once, whatever happens meanwhile.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::{
    BulkAction, BulkOperation, BulkStatus, Claim, Client, Error, Follow, Item, JobEventKind, JobFilter, JobOrder,
    JobStatus, ListJobsRequest, NewJob, Report,
    proto::{ListBulkOperationsRequest, StartBulkOperationRequest, StreamJobEventsRequest, org_event},
};
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::{
    harness::{Database, PATIENCE, TestServer, fixed_address, on_both_databases, short_or_long},
    program::Program,
};

on_both_databases! {
    an_operation_reaches_the_jobs_that_match_each_once,
    an_operation_counts_first_and_does_nothing_if_another_count_was_expected,
    jobs_that_failed_are_retried,
    an_operation_is_stopped_at_once,
    an_operation_survives_kills_while_jobs_come_and_go,
    creates_go_on_beside_an_operation,
    the_same_request_starts_one_operation,
    operations_take_turns_and_are_listed,
    requests_for_bulk_operations_that_make_no_sense_are_refused,
}

fn of_type(job_type: &str) -> Option<JobFilter> {
    Some(JobFilter { types: vec![job_type.to_owned()], ..JobFilter::default() })
}

fn cancel(filter: Option<JobFilter>) -> StartBulkOperationRequest {
    StartBulkOperationRequest { action: BulkAction::Cancel.into(), filter, ..StartBulkOperationRequest::default() }
}

/// The operation once it has ended.
pub(crate) async fn ended(client: &Client, id: &str) -> BulkOperation {
    // No job has this type, so only the org's own events come.
    let mut follow = StreamJobEventsRequest::from(Follow::org().after(0).types(["none"]));
    follow.include_org_events = true;
    let mut events = client.subscribe(follow).await.unwrap();
    loop {
        if let Item::OrgEvent(event) = events.next().await.expect("it goes on").unwrap()
            && let Some(org_event::Change::BulkOperationEnded(over)) = event.change
            && over.operation_id == id
        {
            return client.bulk_operation(id).await.unwrap();
        }
    }
}

async fn create(client: &Client, n: usize, job_type: &str) -> Vec<String> {
    let mut ids = Vec::new();
    for first in (0..n).step_by(1_000) {
        let jobs = (first..n.min(first + 1_000)).map(|_| NewJob::new(job_type));
        ids.extend(client.create_all(jobs).await.unwrap().into_iter().map(|created| created.unwrap().job.id));
    }
    ids
}

/// How often the log says that each job was canceled by the operation.
async fn canceled(client: &Client, operation: &str) -> HashMap<String, usize> {
    let follow = Follow::org().after(0).history_only().statuses([JobStatus::Canceled]);
    let mut events = client.subscribe(follow).await.unwrap();
    let mut found: HashMap<_, usize> = HashMap::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap()
            && event.bulk_operation_id == operation
        {
            *found.entry(event.job_id).or_default() += 1;
        }
    }
    found
}

async fn an_operation_reaches_the_jobs_that_match_each_once(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let wanted = create(&client, 400, "a").await;
    let others = create(&client, 20, "b").await;
    // One of them runs under a lease, one without, and one has ended.
    let held = client.claim(Claim::new("w").types(["a"])).await.unwrap().remove(0);
    client.update(Report::start(&wanted[1])).await.unwrap();
    client.update(Report::start(&wanted[2])).await.unwrap();
    client.update(Report::succeeded(&wanted[2])).await.unwrap();
    let request = StartBulkOperationRequest { reason: "no longer needed".to_owned(), ..cancel(of_type("a")) };
    let started = client.start_bulk(request).await.unwrap();
    assert_eq!((started.status(), started.finished_at), (BulkStatus::Counting, None));
    let late = create(&client, 3, "a").await;
    let done = ended(&client, &started.id).await;
    assert_eq!(done.status(), BulkStatus::Succeeded);
    assert_eq!((done.matched, done.reached, done.changed, done.unchanged), (399, 399, 399, 0), "{done:?}");
    assert_eq!((done.no_longer_matching, done.failed.len(), &*done.reason), (0, 0, "no longer needed"));
    let found = canceled(&client, &started.id).await;
    let mut expected: HashMap<_, _> = wanted.iter().map(|id| (id.clone(), 1)).collect();
    expected.remove(&wanted[0]);
    expected.remove(&wanted[2]);
    assert_eq!(found, expected, "all but the one that is held, and the one that had ended");
    assert!(client.get(&wanted[0]).await.unwrap().cancel_requested);
    for id in others.iter().chain(&late) {
        assert_eq!(client.get(id).await.unwrap().status(), JobStatus::Queued);
    }
    client.update(Report::canceled(&wanted[0]).lease(&held.lease_token)).await.unwrap();
    // The events of jobs name the operation, and the log says when it began and ended.
    let mut events = client.subscribe(Follow::job(&wanted[5]).after(0).history_only()).await.unwrap();
    let mut messages = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            messages.push((event.kind(), event.message));
        }
    }
    let expected = [(JobEventKind::Created, String::new()), (JobEventKind::Canceled, "no longer needed".to_owned())];
    assert_eq!(messages, expected);
    let mut events = client.subscribe(Follow::org().after(0).history_only()).await.unwrap();
    let mut changes = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::OrgEvent(event) = item.unwrap() {
            changes.push(event.change.unwrap());
        }
    }
    let [org_event::Change::BulkOperationStarted(begun), org_event::Change::BulkOperationEnded(over)] = &changes[..]
    else {
        panic!("{changes:?}")
    };
    assert_eq!((&begun.operation_id, &over.operation_id), (&started.id, &started.id));
    assert_eq!((over.status(), over.matched, over.changed), (BulkStatus::Succeeded, 399, 399));
    server.stop().await;
}

async fn an_operation_counts_first_and_does_nothing_if_another_count_was_expected(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    create(&client, 30, "a").await;
    let dry = StartBulkOperationRequest { dry_run: true, ..cancel(of_type("a")) };
    let counted = ended(&client, &client.start_bulk(dry).await.unwrap().id).await;
    assert_eq!((counted.status(), counted.matched, counted.reached), (BulkStatus::Succeeded, 30, 0), "{counted:?}");
    create(&client, 1, "a").await;
    let expecting = |n| StartBulkOperationRequest { expected_count: Some(n), ..cancel(of_type("a")) };
    let refused = ended(&client, &client.start_bulk(expecting(30)).await.unwrap().id).await;
    assert_eq!((refused.status(), refused.matched, refused.changed), (BulkStatus::Refused, 31, 0), "{refused:?}");
    assert_eq!(client.statistics(&["a"]).await.unwrap().claimable, 31);
    let done = ended(&client, &client.start_bulk(expecting(31)).await.unwrap().id).await;
    assert_eq!((done.status(), done.changed), (BulkStatus::Succeeded, 31), "{done:?}");
    // Nothing is left; a filter that matches nothing is no error.
    let done = ended(&client, &client.start_bulk(expecting(0)).await.unwrap().id).await;
    assert_eq!((done.status(), done.changed), (BulkStatus::Succeeded, 0), "{done:?}");
    // Jobs with this status are none that can be canceled.
    let filter = JobFilter { statuses: vec![JobStatus::Succeeded.into()], ..JobFilter::default() };
    let done = client.start_bulk(cancel(Some(filter))).await.unwrap();
    assert_eq!((done.status(), done.matched), (BulkStatus::Succeeded, 0), "{done:?}");
    server.stop().await;
}

async fn jobs_that_failed_are_retried(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let ids = create(&client, 40, "a").await;
    for (n, id) in ids.iter().enumerate() {
        client.update(Report::start(id)).await.unwrap();
        client.update(Report::failed(id, ["DISK", "OTHER"][n % 2], "")).await.unwrap();
    }
    let filter = JobFilter { error_code: "DISK".to_owned(), ..JobFilter::default() };
    let request = StartBulkOperationRequest {
        action: BulkAction::Retry.into(),
        filter: Some(filter),
        ..StartBulkOperationRequest::default()
    };
    let done = ended(&client, &client.start_bulk(request).await.unwrap().id).await;
    assert_eq!((done.matched, done.changed), (20, 20), "{done:?}");
    for (n, id) in ids.iter().enumerate() {
        let expected = [JobStatus::Queued, JobStatus::Failed][n % 2];
        assert_eq!(client.get(id).await.unwrap().status(), expected);
    }
    assert_eq!(client.claim(Claim::new("w").max_jobs(100)).await.unwrap().len(), 20, "and workers get them");
    server.stop().await;
}

async fn an_operation_is_stopped_at_once(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    create(&client, 3_000, "a").await;
    let id = client.start_bulk(cancel(of_type("a"))).await.unwrap().id;
    let mut events = client.subscribe(Follow::org().after(0).statuses([JobStatus::Canceled])).await.unwrap();
    // It is under way once the first job was canceled.
    while !matches!(timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap(), Item::Event(_)) {}
    let stopped = client.stop_bulk(&id).await.unwrap();
    assert_eq!(stopped.status(), BulkStatus::Stopped);
    assert!((1..3_000).contains(&stopped.changed), "{stopped:?}");
    assert_eq!(client.stop_bulk(&id).await.unwrap(), stopped, "a second time");
    create(&client, 1, "b").await;
    assert_eq!(canceled(&client, &id).await.len() as i64, stopped.changed, "nothing after the answer");
    assert_eq!(client.statistics(&["a"]).await.unwrap().claimable, 3_000 - stopped.changed);
    server.stop().await;
}

async fn an_operation_survives_kills_while_jobs_come_and_go(database: Database) {
    let n = short_or_long(4_000, 1_000_000);
    let address = fixed_address();
    let start = || Program::start_on(&address, &database);
    let mut program = start();
    let client = program.client();
    let wanted = create(&client, n, "a").await;
    let is_over = Arc::<AtomicBool>::default();
    // Others go on: creates of the same type, and a worker that takes jobs away.
    let going = |client: Client, is_over: Arc<AtomicBool>| async move {
        let (mut created, mut claimed) = (Vec::new(), Vec::new());
        while !is_over.load(Ordering::Relaxed) {
            // A call that is cut off may have been decided: the worker's claims are repeated by the SDK.
            if let Ok(job) = client.create(NewJob::new("a")).await {
                created.push(job.job.id);
            }
            if let Ok(leases) = client.claim(Claim::new("w").types(["a"])).await {
                claimed.extend(leases.into_iter().map(|lease| lease.job.unwrap().id));
            }
        }
        (created, claimed)
    };
    let id = client.start_bulk(cancel(of_type("a"))).await.unwrap().id;
    let others = tokio::spawn(going(client.clone(), Arc::clone(&is_over)));
    for kill in 1..=3 {
        // At a quarter, a half and three quarters of the way, as far as one can tell from outside.
        let wait = async {
            loop {
                match client.bulk_operation(&id).await {
                    Ok(found) if found.finished_at.is_some() => break,
                    Ok(found) if found.reached >= n as i64 * kill / 4 => break,
                    _ => tokio::task::yield_now().await,
                }
            }
        };
        timeout(PATIENCE * 20, wait).await.unwrap();
        program.kill();
        program = start();
    }
    let done = timeout(PATIENCE * 20, ended(&client, &id)).await.unwrap();
    is_over.store(true, Ordering::Relaxed);
    let (created, claimed) = others.await.unwrap();
    assert_eq!(done.status(), BulkStatus::Succeeded);
    assert_eq!((done.failed.len(), done.unchanged), (0, 0), "{done:?}");
    assert_eq!(done.matched, done.reached + done.no_longer_matching, "{done:?}");
    let found = canceled(&client, &id).await;
    assert!(found.values().all(|times| *times == 1), "each once");
    let is_wanted: HashSet<_> = wanted.iter().collect();
    assert!(found.keys().all(|id| is_wanted.contains(id)), "none that came later");
    // Every job that was there is canceled, or was a worker's when it was reached.
    let mut left = ListJobsRequest {
        types: vec!["a".to_owned()],
        statuses: vec![JobStatus::Queued.into()],
        order: JobOrder::OldestFirst.into(),
        page_size: 1_000,
        ..ListJobsRequest::default()
    };
    loop {
        let page = client.list(left.clone()).await.unwrap();
        for job in &page.jobs {
            assert!(!is_wanted.contains(&job.id), "{job:?} was there and matches");
        }
        left.page_token = page.next_page_token;
        if left.page_token.is_empty() {
            break;
        }
    }
    assert!(!created.is_empty() && !claimed.is_empty(), "the others went on");
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

/// The 99th percentile of creates, one after another by four callers, until `is_over`.
async fn p99_of_creates(client: &Client, is_over: impl Fn() -> bool) -> Duration {
    let is_over = &is_over;
    let creating = async |client: Client| {
        let mut took = Vec::new();
        while !is_over() {
            let began = Instant::now();
            client.create(NewJob::new("b")).await.unwrap();
            took.push(began.elapsed());
        }
        took
    };
    let (a, b, c, d) = tokio::join!(
        creating(client.clone()),
        creating(client.clone()),
        creating(client.clone()),
        creating(client.clone())
    );
    let mut took = [a, b, c, d].concat();
    took.sort_unstable();
    took.get(took.len() * 99 / 100).copied().unwrap_or_default()
}

async fn creates_go_on_beside_an_operation(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    create(&client, short_or_long(2_000, 300_000), "a").await;
    // As much processor time as an operation takes, of another program.
    let until = Instant::now() + short_or_long(Duration::from_millis(200), Duration::from_secs(10));
    let burning = std::thread::spawn(move || {
        while Instant::now() < until {
            std::hint::spin_loop()
        }
    });
    let beside_burning = p99_of_creates(&client, || Instant::now() >= until).await;
    burning.join().unwrap();
    let id = client.start_bulk(cancel(of_type("a"))).await.unwrap().id;
    let is_over = Arc::<AtomicBool>::default();
    let ends = async {
        let done = ended(&client, &id).await;
        is_over.store(true, Ordering::Relaxed);
        done
    };
    let (done, beside_bulk) = tokio::join!(ends, p99_of_creates(&client, || is_over.load(Ordering::Relaxed)));
    assert_eq!(done.status(), BulkStatus::Succeeded);
    let took = (done.finished_at.unwrap().seconds - done.created_at.unwrap().seconds).max(1);
    println!(
        "{} jobs canceled in {took} s; creates' p99 {beside_bulk:?} beside that, {beside_burning:?} beside a busy processor",
        done.changed
    );
    let most = short_or_long(100.0, 2.0);
    assert!(
        beside_bulk <= beside_burning.max(Duration::from_millis(5)).mul_f64(most),
        "{beside_bulk:?}, {beside_burning:?}"
    );
    assert!(program.end_by("TERM").success());
}

async fn the_same_request_starts_one_operation(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    create(&client, 5, "a").await;
    let request = StartBulkOperationRequest { operation_id: Uuid::new_v4().to_string(), ..cancel(of_type("a")) };
    let first = client.start_bulk(request.clone()).await.unwrap();
    let done = ended(&client, &first.id).await;
    assert_eq!(client.start_bulk(request.clone()).await.unwrap(), done, "as it stands");
    let other = StartBulkOperationRequest { reason: "another".to_owned(), ..request.clone() };
    let refused = client.start_bulk(other).await.unwrap_err();
    let is_said = matches!(&refused, Error::BulkOperationExists { operation_id } if *operation_id == first.id);
    assert!(is_said, "{refused}");
    let missing = Uuid::new_v4().to_string();
    for refused in [client.bulk_operation(&missing).await.unwrap_err(), client.stop_bulk(&missing).await.unwrap_err()] {
        let is_said = matches!(&refused, Error::BulkOperationNotFound { operation_id } if *operation_id == missing);
        assert!(is_said, "{refused}");
    }
    server.stop().await;
}

async fn operations_take_turns_and_are_listed(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut expected = Vec::new();
    for n in 0..7 {
        create(&client, 200, &format!("t{n}")).await;
    }
    for n in 0..7 {
        expected.push(client.start_bulk(cancel(of_type(&format!("t{n}")))).await.unwrap().id);
    }
    let mut done = Vec::new();
    for id in &expected {
        let operation = ended(&client, id).await;
        assert_eq!((operation.changed, operation.status()), (200, BulkStatus::Succeeded), "{operation:?}");
        done.push(operation.finished_at.map(|at| (at.seconds, at.nanos)));
    }
    assert!(done.is_sorted(), "the oldest goes first");
    expected.reverse();
    let (mut found, mut list) =
        (Vec::new(), ListBulkOperationsRequest { page_size: 3, ..ListBulkOperationsRequest::default() });
    loop {
        let page = client.bulk_operations(list.clone()).await.unwrap();
        found.extend(page.operations.into_iter().map(|operation| operation.id));
        list.page_token = page.next_page_token;
        if list.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, expected);
    server.stop().await;
}

async fn requests_for_bulk_operations_that_make_no_sense_are_refused(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let fields = async |request| match client.start_bulk(request).await {
        Err(Error::InvalidRequest { violations, .. }) => {
            violations.into_iter().map(|violation| violation.field).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(fields(StartBulkOperationRequest::default()).await, ["action", "filter"]);
    assert_eq!(fields(cancel(None)).await, ["filter"]);
    assert_eq!(fields(StartBulkOperationRequest { action: 77, ..cancel(of_type("a")) }).await, ["action"]);
    let odd = JobFilter {
        statuses: vec![0],
        types: vec![String::new()],
        error_code: "x".repeat(101),
        ..JobFilter::default()
    };
    let request = StartBulkOperationRequest {
        operation_id: "x".to_owned(),
        reason: "x".repeat(201),
        expected_count: Some(-1),
        ..cancel(Some(odd))
    };
    let expected = ["operation_id", "filter.statuses", "filter.types", "filter.error_code", "reason", "expected_count"];
    assert_eq!(fields(request).await, expected);
    let before_all = format!("-8000000000000000000.{}", Uuid::nil());
    for page_token in ["x", "1.2", &before_all] {
        let list = ListBulkOperationsRequest { page_size: -1, page_token: page_token.to_owned() };
        let Err(Error::InvalidRequest { violations, .. }) = client.bulk_operations(list).await else { panic!() };
        let fields: Vec<_> = violations.iter().map(|violation| &*violation.field).collect();
        assert_eq!(fields, ["page_size", "page_token"]);
    }
    // An org may have eight under way.
    create(&client, 3_000, "a").await;
    let mut refused = None;
    for _ in 0..30 {
        if let Err(error) = client.start_bulk(cancel(of_type("a"))).await {
            refused = Some(error);
            break;
        }
    }
    let refused = refused.expect("thirty are too many");
    assert!(refused.to_string().contains("bulk_operations"), "{refused}");
    server.stop().await;
}
