//! Statistics over time report what happened.

use std::{collections::BTreeMap, time::Duration};

use chrono::TimeDelta;
use jobledger_client::{Client, GetStatisticsRequest, NewJob, Report, Statistics, prost_types};
use jobledger_server::domain::clock::{Clock as _, SystemClock};

use crate::support::harness::{Database, PATIENCE, TestServer, on_both_databases};

on_both_databases! {
    what_happened_is_counted_by_type_and_in_all,
    jobs_that_may_be_claimed_are_told_from_those_that_wait_for_their_time,
    a_series_adds_up_to_what_happened,
}

async fn of(client: &Client, request: GetStatisticsRequest) -> Statistics {
    client.statistics_of(request).await.unwrap()
}

/// In this order: created, started, succeeded, failed, retried, canceled, lost.
fn counts(happened: Option<&jobledger_client::proto::Happened>) -> [i64; 7] {
    let happened = happened.expect("it is always told");
    let of = happened;
    [of.created, of.started, of.succeeded, of.failed, of.retried, of.canceled, of.lost]
}

async fn what_happened_is_counted_by_type_and_in_all(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let create = async |job: NewJob| client.create(job).await.unwrap().job.id;
    let finished = create(NewJob::new("a")).await;
    client.update(Report::start(&finished)).await.unwrap();
    client.update(Report::progress(&finished).percent(50)).await.unwrap();
    client.update(Report::succeeded(&finished)).await.unwrap();
    let failing = create(NewJob::new("a").max_attempts(2)).await;
    for _ in 0..2 {
        client.update(Report::start(&failing)).await.unwrap();
        client.update(Report::failed(&failing, "E", "").retry_after(Duration::ZERO)).await.unwrap();
    }
    client.retry(&failing).await.unwrap();
    let canceled = create(NewJob::new("b")).await;
    client.cancel(&canceled, "").await.unwrap();
    let given_back = create(NewJob::new("b")).await;
    client.update(Report::start(&given_back)).await.unwrap();
    client.update(Report::released(&given_back)).await.unwrap();

    let statistics = of(&client, GetStatisticsRequest::default()).await;
    let expected = [[2, 3, 1, 2, 2, 0, 0], [2, 1, 0, 0, 0, 1, 0]];
    let of_types: Vec<_> = statistics.types.iter().map(|of_type| counts(of_type.happened.as_ref())).collect();
    assert_eq!(of_types, expected);
    assert_eq!(counts(statistics.happened.as_ref()), [4, 4, 1, 2, 2, 1, 0]);
    let durations: Vec<_> = [&statistics.types[0], &statistics.types[1]]
        .map(|of_type| (of_type.waits.unwrap().count, of_type.runs.unwrap().count))
        .into_iter()
        .collect();
    assert_eq!(durations, [(3, 3), (1, 0)], "what is given back has not run");
    let waits = statistics.waits.unwrap();
    assert_eq!((waits.count, waits.p50.is_some(), waits.p99.is_some()), (4, true, true));
    let (as_of, start) = (statistics.as_of.unwrap(), statistics.window_start.unwrap());
    assert_eq!(start.seconds % 60, 0);
    let minutes = (as_of.seconds - start.seconds) as f64 / 60.0;
    let rate = statistics.per_minute.unwrap().created;
    assert!((60.0..=61.1).contains(&minutes) && (rate * minutes - 4.0).abs() < 0.01, "{rate} in {minutes} min");
    // One type alone.
    let one = of(&client, GetStatisticsRequest { types: vec!["b".to_owned()], ..Default::default() }).await;
    assert_eq!((one.types.len(), counts(one.happened.as_ref())), (1, expected[1]));
    server.stop().await;
}

async fn jobs_that_may_be_claimed_are_told_from_those_that_wait_for_their_time(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let later = SystemClock.now() + TimeDelta::hours(1);
    let soon = SystemClock.now() + TimeDelta::milliseconds(300);
    for n in 0..5 {
        let job = NewJob::new(["a", "b"][n % 2]);
        client.create(if n < 3 { job.scheduled_at(later) } else { job }).await.unwrap();
    }
    let canceled = client.create(NewJob::new("a").scheduled_at(later)).await.unwrap().job.id;
    client.cancel(&canceled, "").await.unwrap();
    let all = of(&client, GetStatisticsRequest::default()).await;
    assert_eq!((all.counts.unwrap().queued, all.claimable, all.scheduled), (5, 2, 3));
    assert_eq!(
        all.types.iter().map(|of_type| (of_type.claimable, of_type.scheduled)).collect::<Vec<_>>(),
        [(1, 2), (1, 1)]
    );
    // A job whose time comes becomes ready without an event.
    client.create(NewJob::new("b").scheduled_at(soon)).await.unwrap();
    let promoted = async {
        loop {
            let all = of(&client, GetStatisticsRequest::default()).await;
            if (all.claimable, all.scheduled) == (3, 3) {
                break;
            }
            assert_eq!((all.claimable, all.scheduled), (2, 4));
        }
    };
    tokio::time::timeout(PATIENCE, promoted).await.expect("its time comes");
    server.stop().await;
}

async fn a_series_adds_up_to_what_happened(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for n in 0..30 {
        let id = client.create(NewJob::new(["a", "b"][n % 2])).await.unwrap().job.id;
        client.update(Report::start(&id)).await.unwrap();
        if n % 3 == 0 {
            client.update(Report::succeeded(&id)).await.unwrap();
        }
    }
    for (hours, width) in [(24, 60), (25, 3_600), (168, 3_600)] {
        let window = Some(prost_types::Duration { seconds: hours * 3_600, nanos: 0 });
        for (types, names) in [(vec![], vec![""]), (vec!["a".to_owned(), "b".to_owned()], vec!["a", "b"])] {
            let request = GetStatisticsRequest { types, window, series: true };
            let statistics = of(&client, request).await;
            assert_eq!(statistics.series_width.unwrap().seconds, width);
            let mut sums: BTreeMap<&str, [i64; 7]> = BTreeMap::new();
            for series in &statistics.series {
                let mut last = 0;
                for point in &series.points {
                    let start = point.start.unwrap().seconds;
                    assert!(start % width == 0 && start > last, "in order");
                    last = start;
                    let sum = sums.entry(&series.r#type).or_default();
                    for (sum, n) in sum.iter_mut().zip(counts(point.happened.as_ref())) {
                        *sum += n;
                    }
                }
            }
            let expected = if names.len() == 1 { [30, 30, 10, 0, 0, 0, 0] } else { [15, 15, 5, 0, 0, 0, 0] };
            assert_eq!(sums, names.into_iter().map(|name| (name, expected)).collect());
            assert_eq!(counts(statistics.happened.as_ref()), [30, 30, 10, 0, 0, 0, 0]);
        }
    }
    let none = of(&client, GetStatisticsRequest::default()).await;
    assert!(none.series.is_empty() && none.series_width.is_none(), "only if it is asked for");
    server.stop().await;
}
