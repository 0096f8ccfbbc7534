//! Streams that begin with a snapshot, cursors that outlive connections, and what the SDK does with them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use jobledger_client::{
    Client, Cursor, Error, Follow, Item, Job, JobStatus, NewJob, Report,
    proto::{StreamJobEventsRequest, stream_job_events_response},
};
use jobledger_server::{domain::id::LogId, store::DatabaseUrl};
use serde_json::json;
use tokio::time::timeout;
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    support::cluster::OWNER,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::wire::Wire,
};

on_both_databases! {
    a_snapshot_is_every_job_as_it_is_and_then_what_follows,
    a_filtered_snapshot_sees_jobs_enter_and_leave,
    a_job_is_followed_from_its_snapshot,
    labels_choose_jobs_in_the_past_and_live,
    a_cursor_goes_on_where_its_consumer_was,
    a_restored_log_voids_the_cursors_of_before,
    a_job_is_waited_for,
    a_snapshot_that_is_cut_begins_anew,
    leaving_is_seen_after_a_cut_and_from_a_stored_cursor,
}

/// Gives the log a new id, as after a restore.
pub(crate) async fn renew_log_id(database: &Database) -> LogId {
    let (url, log_id): (DatabaseUrl, _) = (database.url_as(OWNER).parse().unwrap(), LogId(Uuid::new_v4()));
    url.database().unwrap().set_log_id(log_id).await.expect("the log gets a new id");
    log_id
}

async fn next(events: &mut jobledger_client::Subscription) -> Item {
    timeout(PATIENCE, events.next()).await.expect("something comes").expect("the stream goes on").unwrap()
}

/// The jobs of a snapshot, and the `seq` that it shows.
async fn snapshot(events: &mut jobledger_client::Subscription) -> (HashMap<String, Job>, i64) {
    let mut jobs = HashMap::new();
    loop {
        match next(events).await {
            Item::Snapshot(job) => assert!(jobs.insert(job.id.clone(), *job).is_none(), "each job once"),
            Item::Bookmark(bookmark) => return (jobs, bookmark.seq),
            other => panic!("{other:?} within a snapshot"),
        }
    }
}

async fn next_seq(events: &mut jobledger_client::Subscription) -> i64 {
    loop {
        if let Item::Event(event) = next(events).await {
            return event.seq;
        }
    }
}

async fn create(client: &Client, job_type: &str) -> String {
    client.create(NewJob::new(job_type)).await.unwrap().job.id
}

async fn a_snapshot_is_every_job_as_it_is_and_then_what_follows(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    // More jobs than a page has. Some are large, so that pages are cut by bytes, too.
    let large = json!("x".repeat(300_000));
    for n in 0..150 {
        let job = NewJob::new("t").label("n", n.to_string());
        let job = if n % 30 == 0 { job.payload(&large).unwrap() } else { job.payload(&n).unwrap() };
        let id = client.create(job).await.unwrap().job.id;
        if n % 50 == 0 {
            client.update(Report::start(&id).stage("s").percent(7)).await.unwrap();
            client.update(Report::succeeded(&id).result(&json!({ "n": n })).unwrap()).await.unwrap();
        }
    }
    let mut events = client.subscribe(Follow::org().snapshot()).await.unwrap();
    assert_eq!(events.cursor(), None, "there is no place to go on from within a snapshot");
    let (jobs, as_of) = snapshot(&mut events).await;
    assert_eq!((jobs.len(), as_of), (150, 156));
    assert_eq!(events.cursor().unwrap().seq, 156);
    for (id, job) in &jobs {
        assert_eq!(job, &client.get(id).await.unwrap(), "with payload and result, as GetJob reads it");
    }
    create(&client, "t").await;
    assert_eq!(next_seq(&mut events).await, 157);

    // With `history_only` the stream ends once the snapshot is consistent.
    let mut history = client.subscribe(Follow::org().snapshot().history_only()).await.unwrap();
    assert_eq!(snapshot(&mut history).await.0.len(), 151);
    while let Some(item) = timeout(PATIENCE, history.next()).await.expect("it ends") {
        assert!(matches!(item.unwrap(), Item::Bookmark(bookmark) if bookmark.seq == 157));
    }
    // An org without jobs has a snapshot too.
    let other = Client::builder(server.endpoint()).org(Uuid::new_v4()).build().unwrap();
    let mut nothing = other.subscribe(Follow::org().snapshot()).await.unwrap();
    assert_eq!(snapshot(&mut nothing).await, (HashMap::new(), 0));
    server.stop().await;
}

async fn a_filtered_snapshot_sees_jobs_enter_and_leave(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let [running, queued, other] = [create(&client, "t").await, create(&client, "t").await, create(&client, "u").await];
    client.update(Report::start(&running)).await.unwrap();
    client.update(Report::start(&other)).await.unwrap();
    let follow = || Follow::org().types(["t"]).statuses([JobStatus::Running]);
    let mut events = client.subscribe(follow().snapshot()).await.unwrap();
    let (jobs, as_of) = snapshot(&mut events).await;
    assert_eq!((jobs.keys().collect::<Vec<_>>(), as_of), (vec![&running], 5));
    client.update(Report::succeeded(&running)).await.unwrap();
    client.update(Report::succeeded(&other)).await.unwrap();
    client.update(Report::start(&queued)).await.unwrap();
    client.update(Report::failed(&queued, "E", "")).await.unwrap();
    for expected in [6, 8, 9] {
        assert_eq!(next_seq(&mut events).await, expected);
    }
    // A client that goes on after the snapshot has to set `include_leaving`. Otherwise it gets only events of jobs that enter.
    let request = StreamJobEventsRequest {
        types: vec!["t".to_owned()],
        statuses: vec![JobStatus::Running.into()],
        after_seq: Some(5),
        history_only: true,
        ..Default::default()
    };
    for (include_leaving, expected) in [(true, vec![6, 8, 9]), (false, vec![8])] {
        let request = StreamJobEventsRequest { include_leaving, ..request.clone() };
        let mut stream = client.raw().stream_job_events(request).await.unwrap().into_inner();
        let mut seqs = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            if let Some(stream_job_events_response::Item::Event(event)) = message.item {
                seqs.push(event.seq);
            }
        }
        assert_eq!(seqs, expected);
    }
    server.stop().await;
}

async fn a_job_is_followed_from_its_snapshot(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let id = create(&client, "t").await;
    client.update(Report::start(&id).percent(10)).await.unwrap();
    let mut events = client.subscribe(Follow::job(&id).snapshot()).await.unwrap();
    let (jobs, as_of) = snapshot(&mut events).await;
    assert_eq!((jobs[&id].progress, as_of), (Some(10), 2));
    create(&client, "t").await;
    client.update(Report::succeeded(&id)).await.unwrap();
    assert_eq!(next_seq(&mut events).await, 4);
    while let Some(item) = timeout(PATIENCE, events.next()).await.expect("it ends with the job") {
        assert!(matches!(item.unwrap(), Item::Bookmark(_)));
    }
    let unknown = client.subscribe(Follow::job(Uuid::now_v7()).snapshot()).await;
    assert!(matches!(unknown, Err(Error::JobNotFound { .. })), "{unknown:?}");
    server.stop().await;
}

async fn labels_choose_jobs_in_the_past_and_live(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let write = async || {
        for (team, size) in [("red", "s"), ("red", "l"), ("blue", "s"), ("", "")] {
            let job = NewJob::new("t");
            let job = if team.is_empty() { job } else { job.label("team", team).label("size", size) };
            let id = client.create(job).await.unwrap().job.id;
            client.update(Report::start(&id)).await.unwrap();
        }
    };
    write().await;
    let follow = || Follow::org().label("team", "red");
    let mut red = client.subscribe(follow().after(0)).await.unwrap();
    let mut red_and_small = client.subscribe(follow().label("size", "s").after(0)).await.unwrap();
    let mut snapshot_of_red = client.subscribe(follow().snapshot()).await.unwrap();
    assert_eq!(snapshot(&mut snapshot_of_red).await.0.len(), 2);
    for expected in [1, 2, 3, 4] {
        assert_eq!(next_seq(&mut red).await, expected);
    }
    for expected in [1, 2] {
        assert_eq!(next_seq(&mut red_and_small).await, expected);
    }
    write().await;
    for expected in [9, 10, 11, 12] {
        assert_eq!(next_seq(&mut red).await, expected);
        assert_eq!(next_seq(&mut snapshot_of_red).await, expected);
    }
    for expected in [9, 10] {
        assert_eq!(next_seq(&mut red_and_small).await, expected);
    }
    server.stop().await;
}

async fn a_cursor_goes_on_where_its_consumer_was(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for _ in 0..4 {
        create(&client, "t").await;
    }
    let stored = Arc::new(Mutex::new(Vec::new()));
    let hook = Arc::clone(&stored);
    let events = client.subscribe(Follow::org().after(0)).await.unwrap();
    let mut events = events.on_cursor(move |cursor| hook.lock().unwrap().push(cursor.to_string()));
    for expected in [1, 2, 3] {
        assert_eq!(next_seq(&mut events).await, expected);
    }
    // The third event was delivered but not processed: the caller has not asked for the next one.
    drop(events);
    let stored = stored.lock().unwrap().clone();
    let cursors: Vec<Cursor> = stored.iter().map(|text| text.parse().unwrap()).collect();
    assert_eq!(cursors.iter().map(|cursor| cursor.seq).collect::<Vec<_>>(), [1, 2]);
    let mut resumed = client.subscribe(Follow::org().resume(&cursors[1])).await.unwrap();
    assert_eq!(next_seq(&mut resumed).await, 3);
    server.stop().await;
}

async fn a_restored_log_voids_the_cursors_of_before(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    create(&client, "t").await;
    let request = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() };
    let answer = client.raw().stream_job_events(request.clone()).await.unwrap();
    let log_id =
        answer.metadata().get("jobledger-log-id").expect("the answer names the log").to_str().unwrap().to_owned();
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    let Item::Event(_) = next(&mut events).await else { panic!("an event comes first") };
    let Item::Bookmark(bookmark) = next(&mut events).await else { panic!("then a bookmark") };
    assert_eq!(bookmark.log_id, log_id);
    let cursor = events.cursor().unwrap().clone();
    assert_eq!(cursor, Cursor { log_id: log_id.clone(), seq: 1 });
    drop(client.subscribe(Follow::org().resume(&cursor)).await.expect("it is the same log"));
    server.stop().await;

    let renewed = renew_log_id(&database).await.to_string();
    assert_ne!(renewed, log_id);
    let (server, client) = TestServer::on(&database).await;
    let refused = client.subscribe(Follow::org().resume(&cursor)).await;
    assert!(matches!(&refused, Err(Error::EpochChanged { log_id }) if *log_id == renewed), "{refused:?}");
    let error = client.raw().stream_job_events(StreamJobEventsRequest { log_id, ..request }).await.unwrap_err();
    assert_eq!((error.code(), &*error.get_details_error_info().unwrap().reason), (Code::OutOfRange, "EPOCH_CHANGED"));
    // A cursor without a log id is not refused.
    let unchecked = Cursor { log_id: String::new(), ..cursor };
    drop(client.subscribe(Follow::org().resume(&unchecked)).await.expect("nothing to check"));
    // An open stream gets the error, too, as soon as the server reads the log id again.
    if database.is_postgres() {
        let mut open = client.subscribe(Follow::org()).await.unwrap();
        renew_log_id(&database).await;
        let error = loop {
            match timeout(PATIENCE, open.next()).await.expect("it is told").expect("not just ended") {
                Ok(item) => assert!(matches!(item, Item::Bookmark(_))),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::EpochChanged { .. }), "{error}");
    }
    server.stop().await;
}

async fn a_job_is_waited_for(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let id = client.create(NewJob::new("t").max_attempts(2)).await.unwrap().job.id;
    let waiting = tokio::spawn({
        let (client, id) = (client.clone(), id.clone());
        async move { client.wait_for(id).await }
    });
    client.update(Report::start(&id)).await.unwrap();
    client.update(Report::failed(&id, "E", "")).await.unwrap();
    assert!(!waiting.is_finished(), "a failure that is retried is not the end");
    client.update(Report::start(&id)).await.unwrap();
    client.update(Report::succeeded(&id).result(&json!("done")).unwrap()).await.unwrap();
    let job = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!((job.status(), job.attempt), (JobStatus::Succeeded, 2));
    assert_eq!(jobledger_client::from_value::<String>(job.result.as_ref()).unwrap(), "done");
    assert_eq!(client.wait_for(&id).await.unwrap(), job, "at once, if it has finished");
    assert!(matches!(client.wait_for(Uuid::now_v7()).await, Err(Error::JobNotFound { .. })));
    server.stop().await;
}

async fn a_snapshot_that_is_cut_begins_anew(database: Database) {
    const JOBS: usize = 150;
    let (server, writer) = TestServer::on(&database).await;
    let large = json!("x".repeat(50_000));
    for _ in 0..JOBS {
        writer.create(NewJob::new("t").payload(&large).unwrap()).await.unwrap();
    }
    let wire = Wire::to(server.address.to_string()).await;
    let client = Client::builder(format!("http://{}", wire.address)).timeout(PATIENCE).build().unwrap();
    let mut events = client.subscribe(Follow::org().snapshot()).await.unwrap();
    // More of the snapshot is still to come than can be on its way.
    assert!(matches!(next(&mut events).await, Item::Snapshot(_)));
    wire.cut();
    let mut before = 1;
    let restarted = loop {
        match next(&mut events).await {
            Item::Snapshot(_) => before += 1,
            other => break other,
        }
    };
    assert_eq!(restarted, Item::SnapshotRestarted);
    assert!(before < JOBS, "{before} jobs came before the cut was noticed");
    assert_eq!(events.cursor(), None);
    let (jobs, as_of) = snapshot(&mut events).await;
    assert_eq!((jobs.len(), as_of), (JOBS, JOBS as i64));
    server.stop().await;
}

async fn leaving_is_seen_after_a_cut_and_from_a_stored_cursor(database: Database) {
    let (server, writer) = TestServer::on(&database).await;
    let wire = Wire::to(server.address.to_string()).await;
    let client = Client::builder(format!("http://{}", wire.address)).timeout(PATIENCE).build().unwrap();
    let mut running = Vec::new();
    for _ in 0..2 {
        let id = create(&writer, "t").await;
        writer.update(Report::start(&id)).await.unwrap();
        running.push(id);
    }
    let follow = || Follow::org().statuses([JobStatus::Running]);
    let mut events = client.subscribe(follow().snapshot()).await.unwrap();
    assert_eq!(snapshot(&mut events).await.0.len(), 2);
    wire.cut();
    let seq = writer.update(Report::succeeded(&running[0])).await.unwrap().job.last_seq;
    assert_eq!(next_seq(&mut events).await, seq);
    let cursor = events.cursor().unwrap().clone();
    drop(events);
    let seq = writer.update(Report::succeeded(&running[1])).await.unwrap().job.last_seq;
    let mut resumed = client.subscribe(follow().leaving().resume(&cursor)).await.unwrap();
    assert_eq!(next_seq(&mut resumed).await, seq);
    server.stop().await;
}
