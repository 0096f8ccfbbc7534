//! Types of jobs appear with their first job and disappear with their last.

use std::time::Duration;

use jobledger_client::{Client, NewJob, Report};
use jobledger_server::domain::status::JobStatus;

use crate::{
    stores::retention::{keep, rows, until_counts},
    support::harness::{Database, TestServer, on_both_databases},
};

on_both_databases! {
    a_type_is_forgotten_with_its_last_job_and_makes_room,
}

/// Creates a job of a type and completes it.
async fn finish(client: &Client, job_type: &str) {
    let job = client.create(NewJob::new(job_type)).await.unwrap().job.id;
    client.update(Report::start(&job)).await.unwrap();
    client.update(Report::succeeded(&job)).await.unwrap();
}

async fn a_type_is_forgotten_with_its_last_job_and_makes_room(database: Database) {
    let mut config = database.config();
    config.limits.types_per_org = 3;
    config.retention = keep(JobStatus::Succeeded, Duration::from_secs(1));
    let server = TestServer::start(config).await;
    let client = server.client();
    finish(&client, "gone").await;
    finish(&client, "half").await;
    client.create(NewJob::new("half")).await.unwrap();
    client.create(NewJob::new("kept")).await.unwrap();
    until_counts(&client, |counts| counts.succeeded, 0).await;
    client.create(NewJob::new("new")).await.expect("there is room for another");
    let refused = client.create(NewJob::new("gone")).await.unwrap_err();
    assert!(refused.to_string().contains("3 job types"), "{refused}");
    // The window still has what happened.
    let statistics = client.statistics(&[]).await.unwrap();
    let gone = statistics.types.iter().find(|of_type| of_type.r#type == "gone").expect("it is in the window");
    assert_eq!(gone.counts.as_ref().map_or(0, |counts| counts.succeeded + counts.queued), 0);
    server.stop().await;
    assert_eq!(rows(&database, "org_counter").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_type_that_another_server_has_forgotten_is_a_new_one() {
    let database = Database::postgres().await;
    let mut config = database.config();
    config.retention = keep(JobStatus::Succeeded, Duration::from_secs(1));
    let (keeping, server) = (TestServer::start(config).await, TestServer::start(database.config()).await);
    let client = server.client();
    // From here on the server has the type cached.
    finish(&client, "t").await;
    finish(&client, "t").await;
    until_counts(&client, |counts| counts.succeeded, 0).await;
    assert_eq!(rows(&database, "org_counter").await, 0);
    client.create(NewJob::new("t")).await.unwrap();
    assert_eq!(rows(&database, "org_counter WHERE type = 't'").await, 1);
    assert_eq!(rows(&database, "org_head WHERE types = 1").await, 1);
    keeping.stop().await;
    server.stop().await;
    database.verify().await;
}
