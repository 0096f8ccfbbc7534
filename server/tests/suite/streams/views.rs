//! Views, the local copies of an org's jobs, equal the database, whatever happens to the connection and the log.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use jobledger_client::{Change, Client, Follow, Job, JobStatus, NewJob, Report, View, proto::ListJobsRequest};
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{interval, timeout},
};

use crate::{
    streams::snapshots::renew_log_id,
    support::harness::{Database, PATIENCE, TestServer, fixed_address, on_both_databases, short_or_long},
    support::wire::Wire,
};

on_both_databases! {
    a_view_is_the_jobs_of_the_database,
    a_view_is_built_anew_when_its_cursor_has_expired,
    a_view_follows_through_lost_connections,
    a_view_and_a_wait_outlive_the_log_that_they_began_in,
}

async fn create(client: &Client, job_type: &str) -> String {
    client.create(NewJob::new(job_type)).await.unwrap().job.id
}

/// Follows until the view has reached this `seq`. Returns the changes.
async fn catch_up(view: &mut View, seq: i64) -> Vec<Change> {
    let mut changes = Vec::new();
    while view.as_of_seq() < seq {
        changes.push(timeout(PATIENCE, view.next()).await.expect("it goes on").expect("without an end").unwrap());
    }
    changes
}

/// Every job of the org, as the server lists it.
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
    // A job that is retried is in the view again.
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
    // While the server is down, more happens than is kept.
    let store = database.open().await;
    let ledger = crate::stores::ledger::start(&store, Default::default());
    let org = jobledger_server::domain::id::OrgId::DEFAULT;
    let work = crate::stores::ledger::Work { ledger: &ledger, org };
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

async fn a_view_follows_through_lost_connections(database: Database) {
    let (runs, a_second) = short_or_long((3, 500), (20, 2_000));
    let (server, writer) = TestServer::on(&database).await;
    let wire = Wire::to(server.address.to_string()).await;
    let client = Client::builder(format!("http://{}", wire.address)).timeout(PATIENCE).build().unwrap();
    let (mut views, mut cut) = (HashSet::new(), 0);
    for run in 0..runs {
        // Writers at a steady rate, as far as the machine can keep it, while connections are cut again and again.
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
        // The cuts are at other places in each run, and some are within the snapshot.
        let mut next_cut = view.as_of_seq() + 50 + i64::from(run) * 13;
        while view.as_of_seq() < written {
            timeout(PATIENCE, view.next()).await.expect("it goes on").expect("without an end").unwrap();
            if view.as_of_seq() >= next_cut {
                wire.cut();
                cut += 1;
                next_cut = view.as_of_seq() + 120 + i64::from(run) * 7;
            }
        }
        // A second view begins while its connection is cut.
        let beginning = client.view(Follow::org());
        tokio::pin!(beginning);
        let mut second = loop {
            match timeout(Duration::from_millis(20), &mut beginning).await {
                Ok(view) => break view.unwrap(),
                Err(_) if cut < i64::from(run + 1) * 40 => {
                    wire.cut();
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
    renew_log_id(&database).await;
    let server = TestServer::start_on(&address, database.config()).await;
    // A caller gives up its wait for the next change again and again meanwhile, later each time.
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
