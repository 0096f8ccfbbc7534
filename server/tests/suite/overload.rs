//! What keeps jobs alive or ends them has room where creates find none; and an outage is not told as an overload.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use jobledger_client::{
    Client, Error, NewJob,
    proto::CreateJobRequest,
    worker::{Context, Error as Failure, Worker},
};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::harness::{Database, PATIENCE, Program, on_both_databases};

on_both_databases! {
    a_flood_of_creates_costs_no_worker_a_job,
    an_outage_of_the_database_is_not_told_as_an_overload,
}

/// Creates without the patience of the SDK, until it is over. How many were refused.
fn flood(client: &Client, is_over: &Arc<AtomicBool>, refused: &Arc<AtomicUsize>) -> impl Future<Output = ()> + use<> {
    let (mut service, is_over, refused) = (client.raw(), Arc::clone(is_over), Arc::clone(refused));
    async move {
        while !is_over.load(Ordering::Relaxed) {
            let request: CreateJobRequest = NewJob::new("flood").into();
            if service.create_job(request).await.is_err() {
                refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

async fn a_flood_of_creates_costs_no_worker_a_job(database: Database) {
    let program = Program::start_with(&database, &["--log", "error", "--max-rate-per-org", "100"]);
    let client = program.client();
    client.create_all((0..60).map(|_| NewJob::new("work"))).await.unwrap();
    let (is_over, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut floods = JoinSet::new();
    for _ in 0..4 {
        floods.spawn(flood(&program.client(), &is_over, &refused));
    }
    // Longer than a lease, which is kept by three heartbeats.
    let handler = |context: Context, (): ()| async move {
        for percent in [25, 50, 75] {
            tokio::time::sleep(Duration::from_millis(400)).await;
            context.progress(percent);
        }
        Ok::<_, Failure>(())
    };
    let worker = Worker::builder(client.clone()).handle("work", handler).concurrency(20).lease(Duration::from_secs(1));
    let (stop, mut stopped) = watch::channel(false);
    let working = tokio::spawn(worker.build().unwrap().run(async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    }));
    let all = async {
        loop {
            // Reads share their rate with the flood: the SDK comes again when it is told to.
            let counts = client.statistics(&["work"]).await.unwrap().counts.unwrap();
            if counts.succeeded == 60 {
                return;
            }
            assert_eq!((counts.failed, counts.dead_letter), (0, 0));
        }
    };
    timeout(PATIENCE, all).await.expect("they are worked on");
    is_over.store(true, Ordering::Relaxed);
    floods.join_all().await;
    stop.send_replace(true);
    working.await.unwrap().unwrap();
    let happened = client.statistics(&["work"]).await.unwrap().happened.unwrap();
    assert_eq!((happened.started, happened.succeeded, happened.lost), (60, 60, 0));
    assert!(refused.load(Ordering::Relaxed) > 100, "creates found the limit");
    assert!(program.end_by("TERM").success());
    database.verify().await;
}

async fn an_outage_of_the_database_is_not_told_as_an_overload(database: Database) {
    let limits = ["--log", "off", "--queue-timeout", "1s", "--max-calls-per-org", "40", "--max-queued-per-org", "30"];
    let program = Program::start_with(&database, &limits);
    let client = program.client();
    client.create(NewJob::new("t")).await.unwrap();
    let blocked = database.block_writes().await;
    let create = |client: &Client| {
        let mut service = client.raw();
        async move {
            let request: CreateJobRequest = NewJob::new("t").into();
            service.create_job(request).await.map(|_| ()).map_err(Error::from)
        }
    };
    // One is decided, or would be; the others wait, and some find no room.
    let mut waiting = JoinSet::new();
    for _ in 0..60 {
        waiting.spawn(create(&client));
    }
    let known = async { while !matches!(create(&client).await, Err(Error::Unavailable { .. })) {} };
    timeout(PATIENCE, known).await.expect("it is noticed that nothing is decided");
    let mut others = JoinSet::new();
    for _ in 0..60 {
        others.spawn(create(&client));
    }
    // Those that were let in wait for the transaction under way, and are told why they waited in vain.
    let mut told = Vec::new();
    while let Some(answer) = timeout(PATIENCE, waiting.join_next()).await.expect("all are answered") {
        told.push(answer.unwrap());
    }
    let of = |wanted: fn(&Error) -> bool| told.iter().filter(|answer| answer.as_ref().is_err_and(wanted)).count();
    let (unavailable, overloaded) =
        (of(|error| matches!(error, Error::Unavailable { .. })), of(|error| matches!(error, Error::Exhausted { .. })));
    assert_eq!(unavailable + overloaded, 60, "{told:?}");
    assert!(unavailable >= 30, "who waited was not told of an overload: {told:?}");
    for answer in timeout(PATIENCE, others.join_all()).await.expect("all are answered") {
        match answer {
            Err(Error::Unavailable { reason, retry_after, .. }) => {
                assert_eq!(reason, "DATABASE_UNAVAILABLE");
                assert!(retry_after.is_some());
            }
            other => panic!("{other:?}"),
        }
    }
    blocked.end().await;
    client.create(NewJob::new("t")).await.expect("the SDK waits until it is over");
    assert!(program.end_by("TERM").success());
}
