//! Streams that begin with the jobs as they are, cursors that outlive connections, and what the SDK makes of them.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use jobledger_client::{
    Change, Client, Cursor, Error, Follow, Item, Job, JobStatus, NewJob, Report, View,
    proto::{ListJobsRequest, StreamJobEventsRequest, stream_job_events_response},
};
use jobledger_server::store;
use serde_json::json;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{interval, timeout},
};
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    cluster::OWNER,
    harness::{Database, PATIENCE, TestServer, fixed_address, on_both_databases, short_or_long},
};

on_both_databases! {
    a_snapshot_is_every_job_as_it_is_and_then_what_follows,
    a_filtered_snapshot_sees_jobs_enter_and_leave,
    a_job_is_followed_from_its_snapshot,
    labels_choose_jobs_in_the_past_and_live,
    a_cursor_goes_on_where_its_consumer_was,
    a_restored_log_voids_the_cursors_of_before,
    a_job_is_waited_for,
    a_view_is_the_jobs_of_the_database,
    a_view_is_built_anew_when_its_cursor_has_expired,
    a_view_follows_through_lost_connections,
    a_snapshot_that_is_cut_begins_anew,
    leaving_is_seen_after_a_cut_and_from_a_stored_cursor,
    a_view_and_a_wait_outlive_the_log_that_they_began_in,
}

async fn next(events: &mut jobledger_client::Subscription) -> Item {
    timeout(PATIENCE, events.next()).await.expect("something comes").expect("the stream goes on").unwrap()
}

/// The jobs of a snapshot, and where in the log it belongs.
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
    // More than a page by number; some of them large, so that pages are cut by bytes too.
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

    // As a history it ends once it is consistent.
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
    // To go on after it by hand takes saying so; without, only what enters is told.
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
    // The third was handed out and not dealt with yet: nobody has come for the next.
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

    let renewed = store::renew_log_id(&database.url_as(OWNER).parse().unwrap()).await.unwrap().to_string();
    assert_ne!(renewed, log_id);
    let (server, client) = TestServer::on(&database).await;
    let refused = client.subscribe(Follow::org().resume(&cursor)).await;
    assert!(matches!(&refused, Err(Error::EpochChanged { log_id }) if *log_id == renewed), "{refused:?}");
    let error = client.raw().stream_job_events(StreamJobEventsRequest { log_id, ..request }).await.unwrap_err();
    assert_eq!((error.code(), &*error.get_details_error_info().unwrap().reason), (Code::OutOfRange, "EPOCH_CHANGED"));
    // Who doesn't say which log it was in is not refused.
    let unchecked = Cursor { log_id: String::new(), ..cursor };
    drop(client.subscribe(Follow::org().resume(&unchecked)).await.expect("nothing to check"));
    // A stream that is open while it happens hears of it too, within a look of the server's.
    if database.is_postgres() {
        let mut open = client.subscribe(Follow::org()).await.unwrap();
        store::renew_log_id(&database.url_as(OWNER).parse().unwrap()).await.unwrap();
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

/// Follows until the view has come to a place in the log.
async fn catch_up(view: &mut View, seq: i64) -> Vec<Change> {
    let mut changes = Vec::new();
    while view.as_of_seq() < seq {
        changes.push(timeout(PATIENCE, view.next()).await.expect("it goes on").expect("without an end").unwrap());
    }
    changes
}

/// Every job of the org, as it is read.
async fn jobs(client: &Client) -> HashMap<String, Job> {
    let mut jobs = HashMap::new();
    let mut request = ListJobsRequest { view: 2, page_size: 1_000, ..Default::default() };
    loop {
        let page = client.list(request.clone()).await.unwrap();
        jobs.extend(page.jobs.into_iter().map(|job| (job.id.clone(), job)));
        if page.next_page_token.is_empty() {
            return jobs;
        }
        request.page_token = page.next_page_token;
    }
}

fn assert_is(view: &View, jobs: HashMap<String, Job>) {
    assert_eq!(view.len(), jobs.len());
    for (id, job) in jobs {
        assert_eq!(view.get(&id), Some(&job.into()));
    }
}

async fn a_view_is_the_jobs_of_the_database(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let old = create(&client, "t").await;
    let mut all = client.view(Follow::org()).await.unwrap();
    let mut open = client.view(Follow::org().statuses([JobStatus::Queued, JobStatus::Running])).await.unwrap();
    assert_eq!((all.len(), open.len()), (1, 1));
    let retried = client.create(NewJob::new("t").max_attempts(2)).await.unwrap().job.id;
    for id in [&old, &retried] {
        client.update(Report::start(id).stage("a").percent(5)).await.unwrap();
    }
    client.update(Report::failed(&retried, "E", "once").retry_after(Duration::from_secs(3_600))).await.unwrap();
    let done = client.update(Report::succeeded(&old).result(&json!([1, null])).unwrap()).await.unwrap().job;
    catch_up(&mut all, done.last_seq).await;
    assert_is(&all, jobs(&client).await);
    let changes = catch_up(&mut open, done.last_seq).await;
    assert!(changes.contains(&Change::Left(old.clone())), "{changes:?}");
    assert_eq!(open.jobs().map(|job| &job.id).collect::<Vec<_>>(), [&retried]);
    assert_eq!(open.get(&retried), all.get(&retried));
    // A job that comes back is there again.
    let canceled = client.cancel(&retried, "").await.unwrap();
    catch_up(&mut open, canceled.last_seq).await;
    assert!(open.is_empty());
    let again = client.retry(&retried).await.unwrap();
    let changes = catch_up(&mut open, again.last_seq).await;
    assert!(changes.contains(&Change::Changed(retried.clone())), "{changes:?}");
    assert_eq!(open.len(), 1);
    server.stop().await;
}

async fn a_view_is_built_anew_when_its_cursor_has_expired(database: Database) {
    let address = fixed_address();
    let server = TestServer::start_on(&address, database.config()).await;
    let client = server.client();
    let gone = create(&client, "t").await;
    client.update(Report::start(&gone)).await.unwrap();
    client.update(Report::succeeded(&gone)).await.unwrap();
    let mut view = client.view(Follow::org()).await.unwrap();
    server.stop().await;
    // While it is away, more happens than is kept.
    let store = database.open().await;
    let ledger = crate::ledger::start(&store, Default::default());
    let org = jobledger_server::domain::id::OrgId::DEFAULT;
    let work = crate::ledger::Work { ledger: &ledger, org };
    work.finish(work.create().await).await;
    let kept = work.create().await.to_string();
    let mut retention = jobledger_server::store::Retention::default();
    retention.set(jobledger_server::domain::status::JobStatus::Succeeded, Duration::ZERO);
    assert_eq!(ledger.retain(org, retention).await.unwrap().jobs, 2);
    ledger.close();
    store.close().await;
    drop(store);
    let server = TestServer::start_on(&address, database.config()).await;
    loop {
        let change = timeout(PATIENCE, view.next()).await.expect("it goes on").expect("without an end").unwrap();
        if change == Change::Rebuilt {
            break;
        }
        assert_eq!(change, Change::Nothing);
    }
    assert_eq!(view.jobs().map(|job| &job.id).collect::<Vec<_>>(), [&kept]);
    server.stop().await;
}

/// Passes bytes on between callers and a server, and cuts all connections when told to.
struct Wire {
    address: String,
    cuts: watch::Sender<u64>,
}

impl Wire {
    async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let (cuts, cut) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut caller, _)) = listener.accept().await {
                let (server, mut cut) = (server.clone(), cut.clone());
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    cut.mark_unchanged();
                    tokio::select! {
                        _ = copy_bidirectional(&mut caller, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { address, cuts }
    }
}

async fn a_view_follows_through_lost_connections(database: Database) {
    let (runs, a_second) = short_or_long((3, 500), (20, 2_000));
    let (server, writer) = TestServer::on(&database).await;
    let wire = Wire::to(server.address.to_string()).await;
    let client = Client::builder(format!("http://{}", wire.address)).timeout(PATIENCE).build().unwrap();
    let (mut views, mut cut) = (HashSet::new(), 0);
    for run in 0..runs {
        // Writers at a steady rate, as far as the machine can, with what is under way cut off again and again.
        let is_over = Arc::new(AtomicBool::new(false));
        let last = Arc::new(AtomicI64::new(0));
        let mut writers = JoinSet::new();
        for _ in 0..16 {
            let (writer, is_over, last) = (writer.clone(), Arc::clone(&is_over), Arc::clone(&last));
            let mut tick = interval(Duration::from_secs(16) / a_second);
            writers.spawn(async move {
                while !is_over.load(Ordering::Relaxed) {
                    let id = create(&writer, "t").await;
                    for report in [
                        Report::start(&id),
                        Report::progress(&id).stage("s").percent(run),
                        Report::succeeded(&id).result(&run).unwrap(),
                    ] {
                        tick.tick().await;
                        let seq = writer.update(report).await.unwrap().job.last_seq;
                        last.fetch_max(seq, Ordering::Relaxed);
                    }
                    tick.tick().await;
                }
            });
        }
        let mut view = client.view(Follow::org()).await.unwrap();
        let written = short_or_long(500, 4_000) + view.as_of_seq();
        // Where it is cut differs from run to run, and falls into the snapshot at times.
        let mut next_cut = view.as_of_seq() + 50 + i64::from(run) * 13;
        while view.as_of_seq() < written {
            timeout(PATIENCE, view.next()).await.expect("it goes on").expect("without an end").unwrap();
            if view.as_of_seq() >= next_cut {
                wire.cuts.send_modify(|cuts| *cuts += 1);
                cut += 1;
                next_cut = view.as_of_seq() + 120 + i64::from(run) * 7;
            }
        }
        // One more is begun while the connection is cut under it.
        let beginning = client.view(Follow::org());
        tokio::pin!(beginning);
        let mut second = loop {
            match timeout(Duration::from_millis(20), &mut beginning).await {
                Ok(view) => break view.unwrap(),
                Err(_) if cut < i64::from(run + 1) * 40 => {
                    wire.cuts.send_modify(|cuts| *cuts += 1);
                    cut += 1;
                }
                Err(_) => break timeout(PATIENCE, beginning).await.expect("it begins").unwrap(),
            }
        };
        is_over.store(true, Ordering::Relaxed);
        writers.join_all().await;
        let last = last.load(Ordering::Relaxed);
        catch_up(&mut view, last).await;
        catch_up(&mut second, last).await;
        let jobs = jobs(&writer).await;
        assert_is(&view, jobs.clone());
        assert_is(&second, jobs);
        views.insert(view.as_of_seq());
    }
    println!("{runs} runs, {cut} cuts: each view is the database");
    assert_eq!(views.len() as i32, runs);
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
    // More than can be on its way is still to come.
    assert!(matches!(next(&mut events).await, Item::Snapshot(_)));
    wire.cuts.send_modify(|cuts| *cuts += 1);
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
    wire.cuts.send_modify(|cuts| *cuts += 1);
    let seq = writer.update(Report::succeeded(&running[0])).await.unwrap().job.last_seq;
    assert_eq!(next_seq(&mut events).await, seq);
    let cursor = events.cursor().unwrap().clone();
    drop(events);
    let seq = writer.update(Report::succeeded(&running[1])).await.unwrap().job.last_seq;
    let mut resumed = client.subscribe(follow().leaving().resume(&cursor)).await.unwrap();
    assert_eq!(next_seq(&mut resumed).await, seq);
    server.stop().await;
}

async fn a_view_and_a_wait_outlive_the_log_that_they_began_in(database: Database) {
    let address = fixed_address();
    let server = TestServer::start_on(&address, database.config()).await;
    let client = server.client();
    let id = create(&client, "t").await;
    let mut view = client.view(Follow::org()).await.unwrap();
    let waiting = tokio::spawn({
        let (client, id) = (client.clone(), id.clone());
        async move { client.wait_for(id).await }
    });
    server.stop().await;
    store::renew_log_id(&database.url_as(OWNER).parse().unwrap()).await.unwrap();
    let server = TestServer::start_on(&address, database.config()).await;
    // Whoever waits for the next change gives up again and again meanwhile, later each time.
    let mut change = Change::Nothing;
    let mut patience = Duration::from_millis(1);
    let rebuilt = async {
        while change == Change::Nothing {
            match timeout(patience, view.next()).await {
                Ok(next) => change = next.expect("without an end").unwrap(),
                Err(_) => patience = patience.mul_f64(1.2),
            }
        }
    };
    timeout(PATIENCE, rebuilt).await.expect("it is built anew");
    assert_eq!(change, Change::Rebuilt);
    assert_is(&view, jobs(&client).await);
    client.update(Report::start(&id)).await.unwrap();
    let done = client.update(Report::succeeded(&id)).await.unwrap().job;
    let waited = timeout(PATIENCE, waiting).await.expect("it ends").unwrap().unwrap();
    assert_eq!((waited.status(), waited.last_seq), (JobStatus::Succeeded, done.last_seq));
    catch_up(&mut view, done.last_seq).await;
    assert_is(&view, jobs(&client).await);
    server.stop().await;
}
