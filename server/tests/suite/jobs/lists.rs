//! Lists of jobs: every filter, and pages that stay complete while jobs are added.

use std::{collections::BTreeMap, time::SystemTime};

use jobledger_client::{Client, Error, Follow, Item, JobStatus, JobView, ListJobsRequest, NewJob, Report, from_value};
use serde_json::json;

use crate::support::harness::{Database, TestServer, on_both_databases};

on_both_databases! {
    every_filter_finds_what_it_says,
    pages_are_whole_while_jobs_are_added,
    a_stream_goes_on_where_a_list_began,
    a_full_list_is_cut_by_bytes,
    a_filter_that_matches_little_goes_on_from_page_to_page,
    a_token_is_good_for_its_own_filters_only,
}

/// The ids on all pages, and the number of pages.
async fn all(client: &Client, list: &ListJobsRequest) -> (Vec<String>, usize) {
    let (mut ids, mut pages, mut list) = (Vec::new(), 0, list.clone());
    loop {
        let page = client.list(list.clone()).await.unwrap();
        assert!(page.jobs.len() <= if list.page_size == 0 { 50 } else { list.page_size as usize });
        ids.extend(page.jobs.into_iter().map(|job| job.id));
        pages += 1;
        if page.next_page_token.is_empty() {
            return (ids, pages);
        }
        list.page_token = page.next_page_token;
    }
}

async fn every_filter_finds_what_it_says(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut jobs = Vec::new();
    for n in 0..24 {
        let mut job =
            NewJob::new(["a", "b", "c"][n % 3]).requested_by(["ann", "bob"][n % 2]).label("n", (n % 4).to_string());
        if n % 5 == 0 {
            job = job.label("five", "yes");
        }
        let job = client.create(job).await.unwrap().job;
        if n % 2 == 1 {
            client.update(Report::start(&job.id)).await.unwrap();
        }
        if n % 4 == 3 {
            client.update(Report::failed(&job.id, "E", "")).await.unwrap();
        }
        jobs.push(job);
    }
    let time = |n: usize| jobs[n].created_at;
    let labels =
        |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<BTreeMap<_, _>>();
    let none = ListJobsRequest::default();
    let (running, failed) = (JobStatus::Running.into(), JobStatus::Failed.into());
    type Wanted = Box<dyn Fn(usize) -> bool>;
    let filters: Vec<(ListJobsRequest, Wanted)> = vec![
        (none.clone(), Box::new(|_| true)),
        (ListJobsRequest { statuses: vec![running], ..none.clone() }, Box::new(|n| n % 4 == 1)),
        (ListJobsRequest { statuses: vec![failed, running, failed], ..none.clone() }, Box::new(|n| n % 2 == 1)),
        (ListJobsRequest { types: vec!["b".into()], ..none.clone() }, Box::new(|n| n % 3 == 1)),
        (ListJobsRequest { types: vec!["c".into(), "x".into(), "a".into()], ..none.clone() }, Box::new(|n| n % 3 != 1)),
        (
            ListJobsRequest { types: vec!["a".into()], statuses: vec![failed], ..none.clone() },
            Box::new(|n| n % 3 == 0 && n % 4 == 3),
        ),
        (ListJobsRequest { labels: labels(&[("n", "2")]), ..none.clone() }, Box::new(|n| n % 4 == 2)),
        (ListJobsRequest { labels: labels(&[("n", "0"), ("five", "yes")]), ..none.clone() }, Box::new(|n| n % 20 == 0)),
        (
            ListJobsRequest {
                labels: labels(&[("n", "3")]),
                types: vec!["a".into()],
                statuses: vec![failed],
                ..none.clone()
            },
            Box::new(|n| n % 12 == 3),
        ),
        (ListJobsRequest { labels: labels(&[("n", "")]), ..none.clone() }, Box::new(|_| false)),
        (ListJobsRequest { requested_by: "bob".into(), ..none.clone() }, Box::new(|n| n % 2 == 1)),
        (ListJobsRequest { created_after: time(7), ..none.clone() }, Box::new(|n| n >= 7)),
        (ListJobsRequest { created_before: time(7), ..none.clone() }, Box::new(|n| n < 7)),
        (
            ListJobsRequest {
                created_after: time(3),
                created_before: time(9),
                requested_by: "ann".into(),
                ..none.clone()
            },
            Box::new(|n| (3..9).contains(&n) && n % 2 == 0),
        ),
    ];
    for (list, wanted) in filters {
        let expected: Vec<_> = (0..24).rev().filter(|n| wanted(*n)).map(|n| jobs[n].id.clone()).collect();
        for page_size in [0, 1, 5, 1_000_000] {
            let list = ListJobsRequest { page_size, ..list.clone() };
            let (found, pages) = all(&client, &list).await;
            assert_eq!(found, expected, "{list:?}");
            let least = expected.len().div_ceil(if page_size == 0 { 50 } else { page_size as usize }).max(1);
            assert_eq!(pages, least, "{list:?}");
        }
    }
    let page = client.list(ListJobsRequest { page_size: 1, ..none }).await.unwrap();
    assert_eq!(page.jobs[0], client.get(&jobs[23].id).await.unwrap(), "with everything that it has");
    server.stop().await;
}

async fn pages_are_whole_while_jobs_are_added(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let created = client.create_all((0..100).map(|_| NewJob::new("t"))).await.unwrap();
    let mut expected: Vec<_> = created.into_iter().map(|created| created.unwrap().job.id).collect();
    expected.reverse();
    let mut list = ListJobsRequest { page_size: 7, ..ListJobsRequest::default() };
    let (mut found, mut as_of) = (Vec::new(), None);
    loop {
        let page = client.list(list.clone()).await.unwrap();
        assert_eq!(*as_of.get_or_insert(page.as_of_seq), page.as_of_seq, "the first page's, on all of them");
        found.extend(page.jobs.into_iter().map(|job| job.id));
        client.create_all((0..5).map(|_| NewJob::new("t"))).await.unwrap();
        list.page_token = page.next_page_token;
        if list.page_token.is_empty() {
            break;
        }
    }
    assert_eq!((found, as_of), (expected, Some(100)));
    server.stop().await;
}

async fn a_stream_goes_on_where_a_list_began(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let first = client.create(NewJob::new("t")).await.unwrap().job;
    let empty = client.list(ListJobsRequest { types: vec!["none".into()], ..Default::default() }).await.unwrap();
    let page = client.list(ListJobsRequest::default()).await.unwrap();
    assert_eq!((empty.jobs.len(), empty.as_of_seq, page.jobs[0].last_seq, page.as_of_seq), (0, 1, 1, 1));
    client.update(Report::start(&first.id)).await.unwrap();
    let second = client.create(NewJob::new("t")).await.unwrap().job;
    let mut events = client.subscribe(Follow::org().after(page.as_of_seq).history_only()).await.unwrap();
    let mut seen = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            seen.push((event.seq, event.job_id));
        }
    }
    assert_eq!(seen, [(2, first.id), (3, second.id)]);
    server.stop().await;
}

async fn a_full_list_is_cut_by_bytes(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let large = "x".repeat((1 << 20) - 16);
    let mut expected = Vec::new();
    for n in 0..4 {
        let id = client.create(NewJob::new("t").payload(&large).unwrap()).await.unwrap().job.id;
        client.update(Report::start(&id)).await.unwrap();
        client
            .update(Report::succeeded(&id).result(&json!({"n": n, "text": large[..1 << 19]})).unwrap())
            .await
            .unwrap();
        expected.push(id);
    }
    expected.reverse();
    let basic = client.list(ListJobsRequest::default()).await.unwrap();
    assert!(basic.jobs.len() == 4 && basic.jobs.iter().all(|job| job.payload.is_none() && job.result.is_none()));
    let list = ListJobsRequest { view: JobView::Full.into(), ..ListJobsRequest::default() };
    let page = client.list(list.clone()).await.unwrap();
    assert!(!page.next_page_token.is_empty() && page.jobs.len() < 4);
    assert_eq!(from_value::<String>(page.jobs[0].payload.as_ref()).unwrap(), large);
    assert_eq!(from_value::<serde_json::Value>(page.jobs[0].result.as_ref()).unwrap()["n"], 3);
    assert_eq!(all(&client, &list).await.0, expected);
    server.stop().await;
}

async fn a_filter_that_matches_little_goes_on_from_page_to_page(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let rare = client.create(NewJob::new("t").requested_by("rare")).await.unwrap().job.id;
    for _ in 0..5 {
        client.create_all((0..1_000).map(|_| NewJob::new("t"))).await.unwrap();
    }
    let list = ListJobsRequest { requested_by: "rare".to_owned(), ..ListJobsRequest::default() };
    let (found, pages) = all(&client, &list).await;
    assert_eq!(found, [rare]);
    assert!(pages > 1, "no page looks at all jobs");

    // Ended jobs of a type are found at once. For other statuses the query looks through all jobs that wait.
    let other = client.create(NewJob::new("other")).await.unwrap().job.id;
    client.update(Report::start(&other)).await.unwrap();
    client.update(Report::succeeded(&other)).await.unwrap();
    let waits = client.create(NewJob::new("other")).await.unwrap().job.id;
    client.create_all((0..1_000).map(|_| NewJob::new("t"))).await.unwrap();
    let ended = ListJobsRequest {
        types: vec!["other".to_owned()],
        statuses: vec![JobStatus::Succeeded.into(), JobStatus::Failed.into()],
        ..ListJobsRequest::default()
    };
    assert_eq!(all(&client, &ended).await, (vec![other.clone()], 1));
    let (found, pages) = all(&client, &ListJobsRequest { statuses: vec![], ..ended }).await;
    assert_eq!(found, [waits, other]);
    assert!(pages > 1, "no page looks at all jobs");
    server.stop().await;
}

async fn a_token_is_good_for_its_own_filters_only(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create_all((0..3).map(|_| NewJob::new("t"))).await.unwrap();
    let list = ListJobsRequest { page_size: 1, types: vec!["t".to_owned()], ..ListJobsRequest::default() };
    let token = client.list(list.clone()).await.unwrap().next_page_token;
    let good = ListJobsRequest { page_token: token.clone(), page_size: 2, view: JobView::Full.into(), ..list.clone() };
    assert_eq!(client.list(good).await.unwrap().jobs.len(), 2, "another size or view is no other filter");
    let other = ListJobsRequest { page_token: token.clone(), types: vec![], ..list.clone() };
    let cut = ListJobsRequest { page_token: token[1..].to_owned(), ..list.clone() };
    // Found by fuzzing: a page token has only one form.
    let padded = ListJobsRequest { page_token: format!("0{token}"), ..list.clone() };
    for bad in [other, cut, padded, ListJobsRequest { page_token: "x".to_owned(), ..list.clone() }] {
        let refused = client.list(bad).await.unwrap_err();
        assert!(
            matches!(&refused, Error::InvalidRequest { violations, .. } if violations[0].field == "page_token"),
            "{refused}"
        );
    }
    let bad = ListJobsRequest {
        page_size: -1,
        view: 9,
        statuses: vec![0, 77],
        created_after: Some(jobledger_client::prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
        created_before: Some(SystemTime::UNIX_EPOCH.into()),
        ..list
    };
    let Err(Error::InvalidRequest { violations, .. }) = client.list(bad).await else { panic!("not refused") };
    let fields: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["page_size", "view", "statuses", "statuses", "created_after"]);
    server.stop().await;
}
