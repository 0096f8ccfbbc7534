//! Running jobs, whose rows may be behind the log: no reader can tell.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use jobledger_client::{
    Claim, Client, NewJob, Report,
    proto::{Job, JobStatus, Lease, ListJobsRequest},
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use tokio::time::timeout;

use crate::{
    stores::retention::rows,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::program::Program,
    work::leases::keep,
};

on_both_databases! {
    a_running_job_is_the_same_before_and_after_its_row_is_written,
    what_runs_goes_on_after_a_kill,
    a_lease_that_nobody_keeps_ends_after_a_kill,
    another_server_writes_the_rows_that_one_has_left_behind,
    heartbeats_write_no_rows_and_outlive_a_kill,
    a_long_list_tells_what_heartbeats_said,
    what_a_lease_was_long_ago_extended_to_is_told_however_many_heartbeats_came_since,
}

const RUNNING_ROWS: &str = "job WHERE status = 'running'";

/// Everything that readers get of the jobs: each job, the lists by status, and the statistics.
async fn reads(client: &Client) -> (Vec<Job>, Vec<Vec<String>>, String) {
    let all = client.list(ListJobsRequest::default()).await.unwrap().jobs;
    let mut jobs = Vec::new();
    for job in &all {
        jobs.push(client.get(&job.id).await.unwrap());
    }
    let mut lists = vec![all.into_iter().map(|job| job.id).collect()];
    for status in [JobStatus::Queued, JobStatus::Running, JobStatus::Succeeded] {
        let of_status = ListJobsRequest { statuses: vec![status.into()], ..Default::default() };
        let found = client.list(of_status).await.unwrap().jobs;
        assert!(found.iter().all(|job| job.status() == status), "{found:?}");
        lists.push(found.into_iter().map(|job| job.id).collect());
    }
    let statistics = client.statistics(&[]).await.unwrap();
    let of_type = &statistics.types[0];
    (jobs, lists, format!("{:?} {} {}", statistics.counts, of_type.claimable, of_type.scheduled))
}

async fn claim(client: &Client, request: &str) -> Vec<Lease> {
    client.claim(Claim::new("w").request_id(request).max_jobs(2).lease(Duration::from_secs(600))).await.unwrap()
}

fn tokens(leases: &[Lease]) -> BTreeSet<&str> {
    leases.iter().map(|lease| &*lease.lease_token).collect()
}

async fn a_running_job_is_the_same_before_and_after_its_row_is_written(database: Database) {
    let mut config = database.config();
    config.fold_after = Duration::from_secs(1);
    let server = TestServer::start(config).await;
    let client = server.client();
    for n in 0..4 {
        let job = NewJob::new("t").label("n", n.to_string()).run_timeout(Duration::from_secs(3_600));
        client.create(job).await.unwrap();
    }
    let later = SystemTime::from(SystemClock.now()) + Duration::from_secs(3_600);
    let scheduled = client.create(NewJob::new("t").scheduled_at(later)).await.unwrap().job.id;
    let leases = claim(&client, "r").await;
    let first = leases[0].job.as_ref().unwrap().id.clone();
    let report = Report::progress(&first).lease(leases[0].lease_token.clone()).stage("on it").percent(40);
    client.update(report).await.unwrap();
    client.update(Report::start(&scheduled)).await.unwrap();

    let told = reads(&client).await;
    assert_eq!(told.1.iter().map(Vec::len).collect::<Vec<_>>(), [5, 2, 3, 0]);
    let caught_up = async { while rows(&database, RUNNING_ROWS).await < 3 {} };
    timeout(PATIENCE, caught_up).await.expect("rows are written though nothing else happens");
    assert_eq!(reads(&client).await, told);
    assert_eq!(tokens(&claim(&client, "r").await), tokens(&leases), "the same claim");

    client.update(Report::succeeded(&first).lease(leases[0].lease_token.clone())).await.unwrap();
    let (_, lists, _) = reads(&client).await;
    assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [5, 2, 2, 1]);
    server.stop().await;
}

async fn what_runs_goes_on_after_a_kill(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    for _ in 0..3 {
        client.create(NewJob::new("t")).await.unwrap();
    }
    let leases = claim(&client, "r").await;
    let first = leases[0].job.as_ref().unwrap().id.clone();
    let report = Report::progress(&first).lease(leases[0].lease_token.clone()).stage("on it").percent(40);
    client.update(report).await.unwrap();
    let told = reads(&client).await;
    program.kill();

    let program = Program::start(&database);
    let client = program.client();
    assert_eq!(reads(&client).await, told);
    assert_eq!(tokens(&claim(&client, "r").await), tokens(&leases), "the same claim");
    assert_eq!(claim(&client, "s").await.len(), 1, "what runs is nobody else's");
    client.update(Report::succeeded(&first).lease(leases[0].lease_token.clone())).await.unwrap();
    drop(program);
}

async fn another_server_writes_the_rows_that_one_has_left_behind(database: Database) {
    let program = Program::start_with(&database, &["--fold-after", "1s"]);
    let client = program.client();
    for _ in 0..3 {
        client.create(NewJob::new("t")).await.unwrap();
    }
    assert_eq!(claim(&client, "r").await.len(), 2);
    program.kill();
    assert_eq!(rows(&database, RUNNING_ROWS).await, 0, "the log has them alone");

    // Nobody calls this server.
    let program = Program::start(&database);
    let caught_up = async { while rows(&database, RUNNING_ROWS).await < 2 {} };
    timeout(PATIENCE, caught_up).await.expect("rows are written though the server that should have is gone");
    drop(program);
}

async fn a_lease_that_nobody_keeps_ends_after_a_kill(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    client.create(NewJob::new("t").max_lost_attempts(3)).await.unwrap();
    let lease = client.claim(Claim::new("w").lease(Duration::from_secs(1))).await.unwrap().remove(0);
    program.kill();

    let program = Program::start(&database);
    let client = program.client();
    let claimed = timeout(PATIENCE, async {
        loop {
            let found = client.claim(Claim::new("v").wait(Duration::from_secs(5))).await.unwrap();
            if let Some(lease) = found.into_iter().next() {
                break lease.job.unwrap();
            }
        }
    });
    let claimed = claimed.await.expect("the lease ends");
    assert_eq!((&claimed.id, claimed.lost_attempts, claimed.attempt), (&lease.job.unwrap().id, 1, 2));
    drop(program);
}

async fn heartbeats_write_no_rows_and_outlive_a_kill(database: Database) {
    const CONFIRMED_ROWS: &str = "job WHERE lease_confirmed";
    let program = Program::start_with(&database, &["--fold-after", "1h"]);
    let client = program.client();
    for _ in 0..2 {
        client.create(NewJob::new("t").max_lost_attempts(3)).await.unwrap();
    }
    let claim = Claim::new("w").max_jobs(2).lease(Duration::from_secs(1));
    let leases = client.claim(claim).await.unwrap();
    let heartbeat = async |client: &Client, seconds| keep(client, &leases[..1], seconds).await;
    for seconds in 100..110 {
        heartbeat(&client, seconds).await;
    }
    let kept = leases[0].job.as_ref().unwrap().id.clone();
    let told = client.get(&kept).await.unwrap();
    let end = |job: &Job| job.lease_expires_at.unwrap().seconds;
    assert!(end(&told) >= end(leases[0].job.as_ref().unwrap()) + 100, "{told:?}");
    let listed = client.list(ListJobsRequest { statuses: vec![JobStatus::Running.into()], ..Default::default() });
    assert!(listed.await.unwrap().jobs.contains(&told));
    assert_eq!(rows(&database, CONFIRMED_ROWS).await, 0, "the log has them alone");
    program.kill();

    // The other job's lease expires. Without the heartbeats this one's would have expired, too.
    let program = Program::start_with(&database, &["--fold-after", "1s"]);
    let client = program.client();
    assert_eq!(client.get(&kept).await.unwrap(), told);
    let lost = async {
        loop {
            let jobs = client.list(ListJobsRequest::default()).await.unwrap().jobs;
            if jobs.iter().any(|job| job.lost_attempts == 1) {
                break jobs;
            }
        }
    };
    let jobs = timeout(PATIENCE, lost).await.expect("the lease ends");
    assert!(jobs.contains(&told), "{jobs:?}");
    heartbeat(&client, 200).await;
    assert!(end(&client.get(&kept).await.unwrap()) > end(&told));

    let caught_up = async { while rows(&database, CONFIRMED_ROWS).await < 1 {} };
    timeout(PATIENCE, caught_up).await.expect("the row is written once no heartbeat comes any more");
    drop(program);
}

async fn what_a_lease_was_long_ago_extended_to_is_told_however_many_heartbeats_came_since(database: Database) {
    let mut config = database.config();
    config.fold_after = Duration::from_secs(3_600);
    let server = TestServer::start(config).await;
    let client = server.client();
    for _ in 0..2 {
        client.create(NewJob::new("t")).await.unwrap();
    }
    let leases = client.claim(Claim::new("w").max_jobs(2).lease(Duration::from_secs(60))).await.unwrap();
    let ids = [0, 1].map(|n: usize| leases[n].job.as_ref().unwrap().id.clone());
    keep(&client, &leases[..1], 3_000).await;
    let long_ago = client.get(&ids[0]).await.unwrap();
    let end = |job: &Job| job.lease_expires_at.unwrap().seconds;
    let mut last = end(&client.get(&ids[1]).await.unwrap());
    // More records than a shared read scans for a lease extension.
    for seconds in 100..180 {
        keep(&client, &leases[1..], 2 * seconds).await;
        let now = client.get(&ids[1]).await.unwrap();
        assert!(end(&now) > last, "{now:?} after {last}");
        last = end(&now);
        assert_eq!(client.get(&ids[0]).await.unwrap(), long_ago);
    }
    server.stop().await;
}

/// A long list shows leases as heartbeats extended them. The extensions of many jobs are found in another way than that of one.
async fn a_long_list_tells_what_heartbeats_said(database: Database) {
    const JOBS: usize = 60;
    let mut config = database.config();
    config.fold_after = Duration::from_secs(3_600);
    let server = TestServer::start(config).await;
    let client = server.client();
    for created in client.create_all((0..JOBS).map(|_| NewJob::new("t"))).await.unwrap() {
        created.unwrap();
    }
    let leases = client.claim(Claim::new("w").max_jobs(JOBS as i32).lease(Duration::from_secs(60))).await.unwrap();
    assert_eq!(leases.len(), JOBS);
    // Some jobs have several heartbeats, some none. Some have an event after a heartbeat, or between two.
    keep(&client, &leases[..50], 600).await;
    keep(&client, &leases[..20], 1_200).await;
    for lease in &leases[10..30] {
        let report = Report::progress(&lease.job.as_ref().unwrap().id).lease(lease.lease_token.clone()).percent(40);
        client.update(report).await.unwrap();
    }
    keep(&client, &leases[25..40], 1_800).await;
    for size in [10, JOBS as i32] {
        let mut request =
            ListJobsRequest { statuses: vec![JobStatus::Running.into()], page_size: size, ..Default::default() };
        let mut listed = Vec::new();
        loop {
            let page = client.list(request.clone()).await.unwrap();
            listed.extend(page.jobs);
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        let ends: BTreeSet<_> = listed.iter().map(|job| job.lease_expires_at.unwrap().seconds).collect();
        assert!(listed.len() == JOBS && ends.len() >= 4, "{ends:?}");
        for job in listed {
            assert_eq!(client.get(&job.id).await.unwrap(), job, "in pages of {size}");
        }
    }
    server.stop().await;
}
