//! Which workers servers know: on every server, idle ones too, until they were silent for long.

use std::time::Duration;

use jobledger_client::{
    Claim, Client, Error, NewJob,
    proto::{HeartbeatRequest, LeaseHeartbeat, ListWorkersRequest, Worker as Known},
    worker::{Context, Worker},
};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use uuid::Uuid;

use crate::{
    stores::retention::rows,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    every_server_knows_the_workers_of_all,
    workers_are_forgotten_after_a_silence,
    heartbeats_change_nothing_that_claims_said,
    bad_pages_and_bad_names_are_refused,
}

/// All workers, read a page at a time.
async fn all(client: &Client, page_size: i32) -> Vec<Known> {
    let (mut found, mut list) = (Vec::new(), ListWorkersRequest { page_size, ..Default::default() });
    loop {
        let page = client.workers(list.clone()).await.unwrap();
        assert!(page.workers.len() <= page_size as usize && page.as_of.is_some() && !page.held_truncated);
        found.extend(page.workers);
        list.page_token = page.next_page_token;
        if list.page_token.is_empty() {
            return found;
        }
    }
}

/// Waits until the workers are as they are to be.
async fn until(client: &Client, what: &str, is_so: impl Fn(&[Known]) -> bool) -> Vec<Known> {
    let mut last = Vec::new();
    let look = async {
        loop {
            last = all(client, 1).await;
            if is_so(&last) {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let in_time = timeout(PATIENCE, look).await;
    assert!(in_time.is_ok(), "{what}: {last:#?}");
    last
}

async fn every_server_knows_the_workers_of_all(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let elsewhere = other.as_ref().map_or(&client, |(_, client)| client);

    // One runs two jobs, another waits for some of its types.
    let hold = |context: Context, (): ()| async move {
        context.canceled().await;
        Ok(())
    };
    let worker = Worker::builder(client.clone()).handle("held", hold).worker_id("busy").version("1.2.3").host("rack-7");
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(worker.cancel_grace(Duration::ZERO).build().unwrap().run(async {
        let _ = stopped.await;
    }));
    let waiting = client.clone();
    let waits = tokio::spawn(async move {
        let claim = Claim::new("idle").types(["a", "b"]).wait(Duration::from_secs(60));
        waiting.claim(claim).await
    });
    let mut jobs = Vec::new();
    for _ in 0..2 {
        jobs.push(client.create(NewJob::new("held")).await.unwrap().job.id);
    }

    for client in [&client, elsewhere] {
        let both = |known: &[Known]| known.len() == 2 && known[0].held == 2 && known[1].waiting;
        let known = until(client, "both are known", both).await;
        let (busy, idle) = (&known[0], &known[1]);
        assert_eq!((&*busy.id, &*busy.version, &*busy.host), ("busy", "1.2.3", "rack-7"));
        assert_eq!(busy.types, ["held"]);
        // Each has one attempt.
        let began = [client.get(&jobs[0]).await.unwrap(), client.get(&jobs[1]).await.unwrap()]
            .map(|job| job.started_at.unwrap());
        assert_eq!(busy.oldest_held_since, began.into_iter().min_by_key(|at| (at.seconds, at.nanos)));
        assert!(busy.last_heard_at.is_some());
        assert_eq!((&*idle.id, &*idle.version, &*idle.host, idle.held), ("idle", "", "", 0));
        assert_eq!((&*idle.types, idle.oldest_held_since), (&["a".to_owned(), "b".to_owned()][..], None));
        // Other orgs have none of them.
        let stranger = Client::builder(server.endpoint()).org(Uuid::new_v4()).build().unwrap();
        assert_eq!(all(&stranger, 10).await, []);
    }
    for job in jobs {
        client.cancel(job, "").await.unwrap();
    }
    until(elsewhere, "what was held has ended", |known| known[0].held == 0).await;
    waits.abort();
    drop(stop);
    timeout(PATIENCE, running).await.expect("it stops").unwrap().unwrap();
    if let Some((other, _)) = other {
        other.stop().await;
    }
    server.stop().await;

    // A server that is new knows them from the database.
    let (server, client) = TestServer::on(&database).await;
    let known = until(&client, "both are still known", |known| known.len() == 2).await;
    assert_eq!((&*known[0].id, &*known[0].version, &*known[1].id), ("busy", "1.2.3", "idle"));
    server.stop().await;
}

async fn workers_are_forgotten_after_a_silence(database: Database) {
    let mut config = database.config();
    config.limits.workers_known_for = Duration::from_secs(2);
    let server = TestServer::start(config).await;
    let client = server.client();
    while all(&client, 1).await.is_empty() {
        client.claim(Claim::new("gone")).await.unwrap();
    }
    // A worker whose claim waits is known all the time.
    let waiting = client.clone();
    let waits = tokio::spawn(async move { waiting.claim(Claim::new("stays").wait(Duration::from_secs(60))).await });
    until(&client, "only the one that waits is known", |known| known.len() == 1 && known[0].id == "stays").await;
    waits.abort();
    until(&client, "nobody is known", <[Known]>::is_empty).await;
    let removed = async {
        while rows(&database, "worker").await > 0 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, removed).await.expect("the database forgets them too");
    server.stop().await;
}

async fn heartbeats_change_nothing_that_claims_said(database: Database) {
    let heartbeat = |worker: &str, lease_token: &str| HeartbeatRequest {
        worker_id: worker.to_owned(),
        leases: vec![LeaseHeartbeat { lease_token: lease_token.to_owned(), ..Default::default() }],
        extend_by: None,
    };
    let (server, client) = TestServer::on(&database).await;
    client.create(NewJob::new("t")).await.unwrap();
    let lease = client.claim(Claim::new("w").types(["t"]).version("1.2.3")).await.unwrap().remove(0);
    let written = async {
        while rows(&database, "worker").await == 0 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, written).await.expect("it is written");
    server.stop().await;
    // Servers that never heard a claim of it.
    for _ in 0..2 {
        let (server, client) = TestServer::on(&database).await;
        let before = all(&client, 10).await.remove(0).last_heard_at.unwrap();
        client.heartbeat(heartbeat("w", &lease.lease_token)).await.unwrap();
        // A heartbeat with a made-up lease makes no worker known.
        client.heartbeat(heartbeat("made up", "x")).await.unwrap();
        let is_so = |known: &[Known]| {
            let heard_at = known[0].last_heard_at.unwrap();
            (heard_at.seconds, heard_at.nanos) > (before.seconds, before.nanos)
        };
        let known = until(&client, "it is heard of", is_so).await;
        assert_eq!((known.len(), &*known[0].version, known[0].held), (1, "1.2.3", 1));
        assert_eq!(known[0].types, ["t"]);
        server.stop().await;
    }
}

async fn bad_pages_and_bad_names_are_refused(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for token in ["x", "after:\u{7}"] {
        let bad = ListWorkersRequest { page_token: token.to_owned(), ..Default::default() };
        match client.workers(bad).await {
            Err(Error::InvalidRequest { violations, .. }) => assert_eq!(violations[0].field, "page_token"),
            other => panic!("{other:?}"),
        }
    }
    let long = Claim::new("w").version("x".repeat(256)).host("\u{7}");
    match client.claim(long).await {
        Err(Error::InvalidRequest { violations, .. }) => {
            let fields: Vec<_> = violations.iter().map(|violation| &*violation.field).collect();
            assert_eq!(fields, ["worker_version", "worker_host"]);
        }
        other => panic!("{other:?}"),
    }
    server.stop().await;
}
