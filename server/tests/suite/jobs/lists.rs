//! Lists of jobs: every filter, and pages that stay complete while jobs are added.

use std::{collections::BTreeMap, time::SystemTime};

use jobledger_client::{
    Claim, Client, Error, Follow, Item, JobOrder, JobStatus, JobView, ListJobsRequest, NewJob, Report, from_value,
    proto::GetJobRequest,
};
use serde_json::json;

use crate::support::harness::{Database, TestServer, on_both_databases};

on_both_databases! {
    every_filter_finds_what_it_says,
    jobs_are_found_by_key_worker_error_and_end,
    the_oldest_come_first_where_that_is_wanted,
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

async fn jobs_are_found_by_key_worker_error_and_end(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut ids = Vec::new();
    for n in 0..40 {
        ids.push(
            client.create(NewJob::new(["a", "b"][n % 2]).idempotency_key(format!("key {n}"))).await.unwrap().job.id,
        );
    }
    // 0 to 9 are one worker's, 10 to 14 another's.
    let mut leases = client.claim(Claim::new("ann").max_jobs(10)).await.unwrap();
    leases.extend(client.claim(Claim::new("bob").max_jobs(5)).await.unwrap());
    let end = |n: usize| Report::failed(&ids[n], ["FULL", "BROKEN"][n % 2], "").lease(&leases[n].lease_token);
    let mut ended = Vec::new();
    for n in 0..4 {
        ended.push(client.update(end(n)).await.unwrap().job.finished_at);
    }
    for id in &ids[20..24] {
        client.update(Report::start(id)).await.unwrap();
        client.update(Report::succeeded(id)).await.unwrap();
    }
    let none = ListJobsRequest::default();
    let with_error = |code: &str| ListJobsRequest { error_code: code.to_owned(), ..ListJobsRequest::default() };
    let held_by = |worker: &str| ListJobsRequest { worker_id: worker.to_owned(), ..ListJobsRequest::default() };
    let with_key = |n: usize| ListJobsRequest { idempotency_key: format!("key {n}"), ..ListJobsRequest::default() };
    let failed = vec![JobStatus::Failed.into()];
    let filters: Vec<(ListJobsRequest, Vec<usize>)> = vec![
        (with_key(7), vec![7]),
        (with_key(23), vec![23]),
        (with_key(77), vec![]),
        (ListJobsRequest { types: vec!["a".into()], ..with_key(7) }, vec![]),
        (ListJobsRequest { worker_id: "ann".into(), ..with_key(7) }, vec![7]),
        (held_by("ann"), (4..10).collect()),
        (held_by("bob"), (10..15).collect()),
        (held_by("eve"), vec![]),
        (ListJobsRequest { types: vec!["b".into()], ..held_by("bob") }, vec![11, 13]),
        (ListJobsRequest { statuses: failed.clone(), ..held_by("bob") }, vec![]),
        (with_error("FULL"), vec![0, 2]),
        (with_error("BROKEN"), vec![1, 3]),
        (with_error("full"), vec![]),
        (ListJobsRequest { types: vec!["b".into()], statuses: failed.clone(), ..with_error("BROKEN") }, vec![1, 3]),
        (ListJobsRequest { finished_after: ended[2], ..none.clone() }, vec![2, 3, 20, 21, 22, 23]),
        (ListJobsRequest { finished_before: ended[2], ..none.clone() }, vec![0, 1]),
        (ListJobsRequest { finished_after: ended[2], statuses: failed, ..none.clone() }, vec![2, 3]),
        (ListJobsRequest { finished_before: ended[3], ..with_error("FULL") }, vec![0, 2]),
    ];
    for (list, mut expected) in filters {
        for order in [JobOrder::OldestFirst, JobOrder::NewestFirst] {
            for page_size in [1, 3, 100] {
                let list = ListJobsRequest { page_size, order: order.into(), ..list.clone() };
                let expected: Vec<_> = expected.iter().map(|n| ids[*n].clone()).collect();
                assert_eq!(all(&client, &list).await.0, expected, "{list:?}");
            }
            expected.reverse();
        }
    }
    assert_eq!(client.get_by_key("key 7").await.unwrap(), client.get(&ids[7]).await.unwrap());
    let missing = client.get_by_key("key 77").await.unwrap_err();
    assert!(matches!(&missing, Error::KeyNotFound { idempotency_key } if idempotency_key == "key 77"), "{missing}");
    let both = GetJobRequest { job_id: ids[0].clone(), idempotency_key: "key 0".to_owned() };
    let refused = Error::from(client.raw().get_job(both).await.unwrap_err());
    assert!(
        matches!(&refused, Error::InvalidRequest { violations, .. } if violations[0].field == "job_id"),
        "{refused}"
    );
    server.stop().await;
}

async fn the_oldest_come_first_where_that_is_wanted(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let rare = client.create(NewJob::new("t").requested_by("rare")).await.unwrap().job.id;
    let mut expected = vec![rare.clone()];
    for _ in 0..5 {
        let created = client.create_all((0..500).map(|_| NewJob::new("t"))).await.unwrap();
        expected.extend(created.into_iter().map(|created| created.unwrap().job.id));
    }
    let late = client.create(NewJob::new("t").requested_by("rare")).await.unwrap().job.id;
    let oldest = ListJobsRequest { order: JobOrder::OldestFirst.into(), ..ListJobsRequest::default() };
    let of_rare = ListJobsRequest { requested_by: "rare".to_owned(), ..oldest.clone() };
    let (found, pages) = all(&client, &of_rare).await;
    assert_eq!(found, [rare, late.clone()]);
    assert!(pages > 1, "no page examines all jobs");
    expected.push(late);
    // Jobs that come meanwhile are on the last pages.
    let mut list = ListJobsRequest { page_size: 1_000, ..oldest };
    let mut found = Vec::new();
    loop {
        let page = client.list(list.clone()).await.unwrap();
        found.extend(page.jobs.into_iter().map(|job| job.id));
        list.page_token = page.next_page_token;
        if found.len() == 1_000 {
            expected.push(client.create(NewJob::new("t")).await.unwrap().job.id);
        }
        if list.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, expected);
    let newest = ListJobsRequest { order: JobOrder::NewestFirst.into(), page_size: 1, ..ListJobsRequest::default() };
    let token = client.list(newest.clone()).await.unwrap().next_page_token;
    let other = ListJobsRequest { order: JobOrder::OldestFirst.into(), page_token: token, ..newest };
    assert!(client.list(other).await.is_err(), "a token is good for one order");
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
    assert!(pages > 1, "no page examines all jobs");

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
    assert!(pages > 1, "no page examines all jobs");
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
        idempotency_key: "k".repeat(256),
        error_code: "e".repeat(101),
        worker_id: "\u{202e}".to_owned(),
        finished_before: Some(jobledger_client::prost_types::Timestamp { seconds: 0, nanos: -1 }),
        order: 3,
        ..list
    };
    let Err(Error::InvalidRequest { violations, .. }) = client.list(bad).await else { panic!("not refused") };
    let fields: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "page_size",
            "view",
            "statuses",
            "statuses",
            "idempotency_key",
            "error_code",
            "worker_id",
            "created_after",
            "finished_before",
            "order"
        ]
    );
    server.stop().await;
}
