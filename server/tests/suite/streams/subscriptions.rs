//! Event streams: order, cursors, filters, ends, and subscribers that are slow or whose server stops.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use jobledger_client::{
    Bookmark, Client, Error, Follow, Item, JobEvent, JobEventKind, JobStatus, NewJob, Report, Subscription,
    proto::{StreamJobEventsRequest, stream_job_events_response},
};
use serde_json::json;
use tokio::{task::JoinSet, time::timeout};
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    support::breaking::Breaking,
    support::harness::{Database, PATIENCE, TestServer, fixed_address, on_both_databases},
};

on_both_databases! {
    the_past_joins_the_present_without_a_gap,
    an_org_is_followed_from_now_from_a_cursor_or_from_the_beginning,
    filters_choose_by_type_and_by_the_status_led_to,
    the_stream_of_a_job_ends_when_the_job_is_finished_and_not_before,
    bookmarks_come_while_nothing_matches,
    a_slow_subscriber_is_ended_and_goes_on_where_it_was,
    a_stop_sends_streams_elsewhere_and_the_client_resumes_by_itself,
    a_thousand_idle_subscribers_cost_no_database_connection,
    subscribers_that_are_live_read_nothing_of_their_own,
}

async fn next(events: &mut Subscription) -> Item {
    let item = timeout(PATIENCE, events.next()).await.expect("something comes").expect("the stream goes on").unwrap();
    without_log_id(item)
}

/// Removes the log id from a bookmark, because it differs from run to run. Every bookmark must have one.
fn without_log_id(item: Item) -> Item {
    let Item::Bookmark(bookmark) = item else { return item };
    Uuid::try_parse(&bookmark.log_id).expect("a bookmark names the log");
    Item::Bookmark(Bookmark { log_id: String::new(), ..bookmark })
}

async fn next_event(events: &mut Subscription) -> JobEvent {
    loop {
        if let Item::Event(event) = next(events).await {
            return *event;
        }
    }
}

/// The remaining items of a stream that ends by itself.
async fn rest(mut events: Subscription) -> Vec<Item> {
    let mut items = Vec::new();
    while let Some(item) = timeout(PATIENCE, events.next()).await.expect("the stream ends") {
        items.push(without_log_id(item.unwrap()));
    }
    items
}

fn seqs(items: &[Item]) -> Vec<i64> {
    items.iter().filter_map(|item| if let Item::Event(event) = item { Some(event.seq) } else { None }).collect()
}

fn caught_up(seq: i64) -> Item {
    Item::Bookmark(Bookmark { seq, caught_up: true, log_id: String::new() })
}

async fn create(client: &Client, job_type: &str) -> String {
    client.create(NewJob::new(job_type)).await.unwrap().job.id
}

async fn the_past_joins_the_present_without_a_gap(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    const JOBS: i64 = 1_500;
    let mut subscribers = JoinSet::new();
    let mut writers = JoinSet::new();
    for writer in 0..10 {
        let client = client.clone();
        writers.spawn(async move {
            for n in 0..JOBS / 10 {
                create(&client, if (n + writer) % 2 == 0 { "even" } else { "odd" }).await;
            }
        });
    }
    // The subscribers begin at every stage of the writing, at the beginning of the log or near its head.
    for subscriber in 0..12i64 {
        let client = client.clone();
        subscribers.spawn(async move {
            let seen = client.statistics(&[]).await.unwrap().as_of_seq;
            let after = if subscriber % 3 == 0 { 0 } else { (seen - subscriber).max(0) };
            let mut events = client.subscribe(Follow::org().after(after)).await.unwrap();
            for expected in after + 1..=JOBS {
                assert_eq!(next_event(&mut events).await.seq, expected);
            }
        });
        tokio::task::yield_now().await;
    }
    writers.join_all().await;
    subscribers.join_all().await;
    server.stop().await;
}

async fn an_org_is_followed_from_now_from_a_cursor_or_from_the_beginning(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for _ in 0..3 {
        create(&client, "t").await;
    }
    let mut live = client.subscribe(Follow::org()).await.unwrap();
    assert_eq!(next(&mut live).await, caught_up(3), "now is where the log ends");
    create(&client, "t").await;
    assert_eq!(next_event(&mut live).await.seq, 4);

    let history = |after| client.subscribe(Follow::org().after(after).history_only());
    let all = rest(history(0).await.unwrap()).await;
    assert_eq!((seqs(&all), all.last()), (vec![1, 2, 3, 4], Some(&caught_up(4))));
    let some = rest(history(2).await.unwrap()).await;
    assert_eq!((seqs(&some), some.len()), (vec![3, 4], 3));
    assert_eq!(rest(history(4).await.unwrap()).await, [caught_up(4)]);
    server.stop().await;
}

async fn filters_choose_by_type_and_by_the_status_led_to(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for n in 0..30 {
        let id = create(&client, if n % 3 == 0 { "a" } else { "b" }).await;
        if n % 2 == 0 {
            client.update(Report::start(&id)).await.unwrap();
            client.update(Report::succeeded(&id)).await.unwrap();
        }
    }
    let live = Follow::org().types(["a"]).statuses([JobStatus::Succeeded]);
    let mut live = client.subscribe(live).await.unwrap();
    assert!(matches!(next(&mut live).await, Item::Bookmark(_)));
    let history = Follow::org().after(0).types(["a", "none"]).statuses([JobStatus::Succeeded]).history_only();
    let found = rest(client.subscribe(history).await.unwrap()).await;
    assert_eq!(found.len(), 5 + 1);
    for item in &found[..5] {
        let Item::Event(event) = item else { panic!("{item:?}") };
        assert_eq!((event.job_type.as_str(), event.kind()), ("a", JobEventKind::Succeeded));
    }
    assert_eq!(found[5], caught_up(60), "the cursor advances past what did not match");

    for job_type in ["b", "a"] {
        let id = create(&client, job_type).await;
        client.update(Report::start(&id)).await.unwrap();
        client.update(Report::succeeded(&id)).await.unwrap();
    }
    let event = next_event(&mut live).await;
    assert_eq!((event.seq, event.job_type.as_str()), (66, "a"));
    server.stop().await;
}

async fn the_stream_of_a_job_ends_when_the_job_is_finished_and_not_before(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let id = client.create(NewJob::new("t").max_attempts(2)).await.unwrap().job.id;
    let mut events = client.subscribe(Follow::job(&id)).await.unwrap();
    assert_eq!(next_event(&mut events).await.kind(), JobEventKind::Created);
    assert_eq!(next(&mut events).await, caught_up(1));
    create(&client, "another job").await;
    client.update(Report::start(&id)).await.unwrap();
    client.update(Report::failed(&id, "E", "")).await.unwrap();
    client.update(Report::start(&id)).await.unwrap();
    client.update(Report::succeeded(&id)).await.unwrap();
    let live = rest(events).await;
    let kinds: Vec<_> =
        live.iter().filter_map(|item| if let Item::Event(event) = item { Some(event.kind()) } else { None }).collect();
    use JobEventKind::{Failed, RetryScheduled, Started, Succeeded};
    assert_eq!(kinds, [Started, Failed, RetryScheduled, Started, Succeeded], "the retried failure is not the end");
    assert_eq!(live.last(), Some(&caught_up(7)));

    // The same from the past, where the old failure is not the end either, and from after the last event.
    assert_eq!(seqs(&rest(client.subscribe(Follow::job(&id)).await.unwrap()).await), [1, 3, 4, 5, 6, 7]);
    assert_eq!(seqs(&rest(client.subscribe(Follow::job(&id).after(5)).await.unwrap()).await), [6, 7]);
    assert_eq!(rest(client.subscribe(Follow::job(&id).after(7)).await.unwrap()).await, [caught_up(7)]);
    let filtered = Follow::job(&id).statuses([JobStatus::Failed]);
    assert_eq!(seqs(&rest(client.subscribe(filtered).await.unwrap()).await), [4]);
    server.stop().await;
}

async fn bookmarks_come_while_nothing_matches(database: Database) {
    let mut config = database.config();
    config.limits.bookmark_interval = Duration::from_millis(50);
    let server = TestServer::start(config).await;
    let client = server.client();
    create(&client, "t").await;
    let mut events = client.subscribe(Follow::org().types(["other"])).await.unwrap();
    for _ in 0..3 {
        assert_eq!(next(&mut events).await, caught_up(1), "again and again");
    }
    create(&client, "t").await;
    // One bookmark may have been on its way when the event came.
    let Item::Bookmark(mut bookmark) = next(&mut events).await else { panic!("no bookmark") };
    while bookmark.seq == 1 {
        let Item::Bookmark(later) = next(&mut events).await else { panic!("no bookmark") };
        bookmark = later;
    }
    assert_eq!((bookmark.seq, bookmark.caught_up), (2, true), "it passes what did not match");
    server.stop().await;
}

async fn a_slow_subscriber_is_ended_and_goes_on_where_it_was(database: Database) {
    let mut config = database.config();
    // The error waits ten times this long to be read.
    let slow_after = Duration::from_secs(2);
    config.slow_consumer_after = slow_after;
    let address = fixed_address();
    let server = TestServer::start_on(&address, config).await;
    let client = server.client();
    let raw = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() };
    let mut stream = client.raw().stream_job_events(raw.clone()).await.unwrap().into_inner();
    let mut patient = client.subscribe(Follow::org().after(0)).await.unwrap();
    // More than the transport and the server's queue have room for, and then for long enough.
    const ENOUGH: i64 = 60;
    let result = json!("x".repeat(200_000));
    let (mut jobs, mut full) = (0, None);
    while full.is_none_or(|full: Instant| full.elapsed() < 3 * slow_after) {
        let id = create(&client, "t").await;
        client.update(Report::start(&id)).await.unwrap();
        let report = Report::succeeded(&id);
        client.update(if full.is_none() { report.result(&result).unwrap() } else { report }).await.unwrap();
        jobs += 1;
        full = full.or_else(|| (jobs == ENOUGH).then(Instant::now));
    }
    // The late reader gets an unbroken beginning, then the error. The SDK would go on from there.
    let mut last = 0;
    let error = loop {
        match timeout(PATIENCE, stream.message()).await.expect("the server ends it") {
            Ok(message) => match message.expect("the stream does not just end").item.unwrap() {
                stream_job_events_response::Item::Event(event) => {
                    assert_eq!(event.seq, last + 1);
                    last = event.seq;
                }
                stream_job_events_response::Item::Bookmark(bookmark) => assert!(bookmark.seq <= last),
                stream_job_events_response::Item::Snapshot(_) | stream_job_events_response::Item::OrgEvent(_) => {
                    panic!("there is none")
                }
            },
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(error.get_details_error_info().unwrap().reason, "SLOW_CONSUMER");
    assert!(error.get_details_retry_info().is_some());
    assert!(last < jobs * 3, "it was slow");
    // The SDK's subscription was not read either. It resumes by itself, here at a server with more patience.
    server.stop().await;
    let server = TestServer::start_on(&address, database.config()).await;
    let resumed = StreamJobEventsRequest { after_seq: Some(last), history_only: true, ..raw };
    let mut stream = server.client().raw().stream_job_events(resumed).await.unwrap().into_inner();
    while let Some(message) = timeout(PATIENCE, stream.message()).await.expect("history ends").unwrap() {
        if let stream_job_events_response::Item::Event(event) = message.item.unwrap() {
            assert_eq!(event.seq, last + 1);
            last = event.seq;
        }
    }
    assert_eq!(last, jobs * 3);
    for expected in 1..=jobs * 3 {
        assert_eq!(next_event(&mut patient).await.seq, expected);
    }
    server.stop().await;
}

async fn a_stop_sends_streams_elsewhere_and_the_client_resumes_by_itself(database: Database) {
    let address = fixed_address();
    let mut server = TestServer::start_on(&address, database.config()).await;
    let client = server.client();
    let raw = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() };
    let mut stream = client.raw().stream_job_events(raw).await.unwrap().into_inner();
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    create(&client, "before").await;
    assert_eq!(next_event(&mut events).await.seq, 1);

    server.begin_stop();
    let mut last = None;
    let error = loop {
        match timeout(PATIENCE, stream.message()).await.expect("the stream ends") {
            Ok(message) => last = message.expect("the stream does not just end").item,
            Err(error) => break error,
        }
    };
    let Some(stream_job_events_response::Item::Bookmark(bookmark)) = last else { panic!("{last:?}") };
    assert_eq!(bookmark.seq, 1, "where to go on elsewhere");
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert_eq!(error.get_details_error_info().unwrap().reason, "DRAINING");
    assert!(error.get_details_retry_info().is_some());
    let started = Instant::now();
    server.stop().await;
    assert!(started.elapsed() < Duration::from_secs(5), "open streams don't use up the grace period");

    // No server runs. A call that must not wait fails, and one that may wait succeeds later.
    let impatient = Client::builder(format!("http://{address}")).timeout(Duration::from_millis(300)).build().unwrap();
    let error = impatient.get("01890a5d-ac96-774b-bcce-b302099a8057").await.unwrap_err();
    assert!(error.is_unavailable() || matches!(error, Error::DeadlineExceeded), "{error}");
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { create(&client, "after").await }
    });
    let server = TestServer::start_on(&address, database.config()).await;
    waiting.await.unwrap();
    let event = next_event(&mut events).await;
    assert_eq!((event.seq, event.job_type.as_str()), (2, "after"));
    server.stop().await;
}

async fn a_thousand_idle_subscribers_cost_no_database_connection(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    create(&client, "t").await;
    let mut subscribers = Vec::new();
    for n in 0..1_000 {
        let follow = if n % 2 == 0 { Follow::org() } else { Follow::org().types(["t"]) };
        let mut events = client.subscribe(follow).await.unwrap();
        assert_eq!(next(&mut events).await, caught_up(1));
        subscribers.push(events);
    }
    // All connections for reads are free: 16 on SQLite, 20 on PostgreSQL.
    let mut reads = JoinSet::new();
    for _ in 0..200 {
        let client = client.clone();
        reads.spawn(async move { client.statistics(&[]).await.unwrap().as_of_seq });
    }
    assert_eq!(reads.join_all().await.into_iter().collect::<HashSet<_>>(), HashSet::from([1]));
    create(&client, "t").await;
    for events in &mut subscribers {
        assert_eq!(next_event(events).await.seq, 2);
    }
    server.stop().await;
}

async fn subscribers_that_are_live_read_nothing_of_their_own(database: Database) {
    const SUBSCRIBERS: usize = 300;
    const EVENTS: usize = 100;
    let store = Breaking::new(database.open().await, &[]);
    let server = TestServer::start_with(database.config(), store.clone()).await;
    let client = server.client();
    let mut subscribers = Vec::new();
    for _ in 0..SUBSCRIBERS {
        let mut events = client.subscribe(Follow::org()).await.unwrap();
        assert_eq!(next(&mut events).await, caught_up(0));
        subscribers.push(events);
    }
    let mut seen = 0;
    let mut all_see = async |writer: &Client| {
        let before = store.reads_of_logs();
        for _ in 0..EVENTS {
            create(writer, "t").await;
        }
        for events in &mut subscribers {
            for n in 1..=EVENTS as i64 {
                assert_eq!(next_event(events).await.seq, seen + n);
            }
        }
        seen += EVENTS as i64;
        store.reads_of_logs() - before
    };
    assert_eq!(all_see(&client).await, 0, "what this server commits is in its memory");
    if database.is_postgres() {
        // The events of another server are read once for all subscribers.
        let (other, writer) = TestServer::on(&database).await;
        let reads = all_see(&writer).await;
        assert!((1..=2 * EVENTS).contains(&reads), "{reads} reads of {EVENTS} events for {SUBSCRIBERS} subscribers");
        other.stop().await;
    }
    server.stop().await;
}
