//! Commands that keep jobs alive or end them have room when creates find none. An outage is not reported as an overload.

use std::time::Duration;

use jobledger_client::{
    Client, Error, NewJob,
    proto::CreateJobRequest,
    worker::{Context, Error as Failure, Worker},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};

use crate::support::harness::{Database, PATIENCE, on_both_databases};
use crate::support::program::Program;

on_both_databases! {
    a_flood_of_creates_costs_no_worker_a_job,
    an_outage_of_the_database_is_not_told_as_an_overload,
}

/// Creates jobs as fast as they are answered, without the SDK's retries, until it is dropped.
struct Flood {
    refused: watch::Receiver<usize>,
    _creators: JoinSet<()>,
}

impl Flood {
    /// So many at a time that creates reach the rate limit even on a slow disk, which commits a batch of them at once.
    const AT_A_TIME: usize = 64;

    fn begin(program: &Program) -> Self {
        let (refused, receiver) = watch::channel(0);
        let mut creators = JoinSet::new();
        let client = program.client();
        for _ in 0..Self::AT_A_TIME {
            let (mut service, refused) = (client.raw(), refused.clone());
            creators.spawn(async move {
                loop {
                    let request: CreateJobRequest = NewJob::new("flood").into();
                    if service.create_job(request).await.is_err() {
                        refused.send_modify(|count| *count += 1);
                        // Otherwise the machine would do nothing but refuse calls.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            });
        }
        Self { refused: receiver, _creators: creators }
    }

    /// Waits until this many more creates are refused.
    async fn finds_the_limit(&mut self, times: usize) {
        let wanted = *self.refused.borrow() + times;
        let refused = self.refused.wait_for(|count| *count >= wanted);
        timeout(PATIENCE, refused).await.expect("creates find the limit").expect("somebody creates");
    }
}

async fn a_flood_of_creates_costs_no_worker_a_job(database: Database) {
    const JOBS: usize = 40;
    let program = Program::start_with(&database, &["--log", "error", "--max-rate-per-org", "100"]);
    let client = program.client();
    client.create_all((0..JOBS).map(|_| NewJob::new("work"))).await.unwrap();
    let mut flood = Flood::begin(&program);
    flood.finds_the_limit(100).await;
    // Each job takes longer than its lease, which three heartbeats extend.
    let (done, mut finished) = mpsc::unbounded_channel();
    let handler = move |context: Context, (): ()| {
        let done = done.clone();
        async move {
            for percent in [25, 50, 75] {
                tokio::time::sleep(Duration::from_millis(1_200)).await;
                context.progress(percent);
            }
            let _ = done.send(());
            Ok::<_, Failure>(())
        }
    };
    let worker = Worker::builder(client.clone()).handle("work", handler).concurrency(JOBS / 2);
    let (stop, mut stopped) = watch::channel(false);
    let working = tokio::spawn(worker.lease(Duration::from_secs(3)).build().unwrap().run(async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    }));
    // Beside the flood, the second half of the jobs is claimed, and every outcome of the first half is reported.
    for _ in 0..JOBS {
        timeout(PATIENCE, finished.recv()).await.expect("they are worked on");
    }
    flood.finds_the_limit(100).await;
    stop.send_replace(true);
    working.await.unwrap().expect("the last outcomes are reported");
    flood.finds_the_limit(1).await;
    drop(flood);
    let statistics = client.statistics(&["work"]).await.unwrap();
    let happened = statistics.happened.unwrap();
    assert_eq!((happened.started, happened.succeeded, happened.lost), (40, 40, 0));
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
    // One create blocks in its transaction. The others wait, and some find no room.
    let mut waiting = JoinSet::new();
    for _ in 0..60 {
        waiting.spawn(create(&client));
    }
    let known = async { while !matches!(create(&client).await, Err(Error::Unavailable { .. })) {} };
    timeout(PATIENCE, known).await.expect("it is noticed that nothing is decided");
    let many = || (0..60).map(|_| create(&client)).collect::<JoinSet<_>>();
    let others = many();
    // The calls that were let in wait for the open transaction, and then learn why they waited in vain.
    let mut told = Vec::new();
    while let Some(answer) = timeout(PATIENCE, waiting.join_next()).await.expect("all are answered") {
        told.push(answer.unwrap());
    }
    let of = |wanted: fn(&Error) -> bool| told.iter().filter(|answer| answer.as_ref().is_err_and(wanted)).count();
    let (unavailable, overloaded) =
        (of(|error| matches!(error, Error::Unavailable { .. })), of(|error| matches!(error, Error::Exhausted { .. })));
    assert_eq!(unavailable + overloaded, 60, "{told:?}");
    assert!(unavailable >= 30, "who waited was not told of an overload: {told:?}");
    // Soon after a failed turn, the next has not lasted long enough to count as an outage, although it is one.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let later = many();
    let answers = async { [others.join_all().await, later.join_all().await].concat() };
    for answer in timeout(PATIENCE, answers).await.expect("all are answered") {
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
