//! The power is cut. A durable database keeps what was acknowledged. If it is not durable, the test notices.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex},
};

use jobledger_client::{Client, NewJob, proto::CreateJobRequest};
use jobledger_server::domain::clock::{Clock as _, SystemClock, Time};
use sqlx::Executor as _;
use tokio::{
    sync::watch,
    task::{JoinSet, block_in_place},
    time::timeout,
};

use super::{preloaded, volume::Volume};
use crate::{
    support::cluster::{Cluster, Durability},
    support::harness::{Database, PATIENCE, short_or_long},
    support::program::Program,
    work::crash::verify,
};

/// Creates jobs until a call fails, and notes those that were acknowledged.
struct Writers {
    acknowledged: Arc<Mutex<Vec<(String, Time)>>>,
    tasks: JoinSet<()>,
    count: watch::Receiver<usize>,
}

impl Writers {
    fn start(client: &Client) -> Self {
        let (acknowledged, mut tasks) = (Arc::<Mutex<Vec<(String, Time)>>>::default(), JoinSet::new());
        let (counter, count) = watch::channel(0);
        for _ in 0..16 {
            let (mut service, acknowledged, counter) = (client.raw(), Arc::clone(&acknowledged), counter.clone());
            tasks.spawn(async move {
                let request = CreateJobRequest { r#type: "t".to_owned(), ..Default::default() };
                while let Ok(answer) = service.create_job(request.clone()).await {
                    let id = answer.into_inner().job.expect("a job").id;
                    acknowledged.lock().unwrap().push((id, SystemClock.now()));
                    counter.send_modify(|count| *count += 1);
                }
            });
        }
        Self { acknowledged, tasks, count }
    }

    async fn until(&mut self, count: usize) {
        timeout(PATIENCE, self.count.wait_for(|so_far| *so_far >= count)).await.expect("they write").unwrap();
    }

    /// The jobs acknowledged before the power was cut. While ext4 shuts down (20 ms and less), an fsync may succeed
    /// with nothing kept. A machine without power would not pass such an answer on.
    async fn end(mut self, cut: Time) -> HashSet<String> {
        self.tasks.shutdown().await;
        let all = std::mem::take(&mut *self.acknowledged.lock().unwrap());
        all.into_iter().filter(|(_, at)| *at < cut).map(|(id, _)| id).collect()
    }
}

/// How many acknowledged jobs are missing.
async fn lost(database: &Database, acknowledged: &HashSet<String>) -> usize {
    let events = verify(database, &Default::default()).await;
    let kept: HashSet<_> = events.iter().map(|event| event.job_id.to_string()).collect();
    acknowledged.difference(&kept).count()
}

/// Cuts the power of a server on SQLite during writes. Returns how many acknowledged jobs are lost, and how many there were.
async fn cut_power_of_sqlite(volume: &Volume, database: &Database, environment: &[(&str, &Path)]) -> (usize, usize) {
    let program = Program::serve_in("127.0.0.1:0", &database.url(), &["--log", "error"], environment);
    // This job survives in any case, because it is synced.
    program.client().create(NewJob::new("t")).await.expect("it is created");
    volume.sync();
    let mut writers = Writers::start(&program.client());
    writers.until(short_or_long(500, 5_000)).await;
    let cut = volume.cut_power();
    let acknowledged = writers.end(cut).await;
    program.kill();
    volume.power_up();
    // The server recovers the file before the test reads it.
    let program = Program::start(database);
    assert!(program.end_by("TERM").success());
    (lost(database, &acknowledged).await, acknowledged.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_takes_nothing_that_sqlite_acknowledged() {
    let Some(volume) = Volume::new(256) else { return };
    let database = Database::sqlite_at(volume.path());
    for _ in 0..short_or_long(2, 20) {
        let (lost, of) = cut_power_of_sqlite(&volume, &database, &[]).await;
        println!("{lost} of {of} are lost");
        assert_eq!(lost, 0, "of {of}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_is_noticed_where_sqlite_is_not_durable() {
    let Some(volume) = Volume::new(256) else { return };
    let tools = tempfile::tempdir().expect("a temporary directory");
    // A program that preloads this syncs nothing.
    let text = "int fsync(int fd) { return 0; }\nint fdatasync(int fd) { return 0; }\n";
    let library = preloaded(tools.path(), text);
    let database = Database::sqlite_at(volume.path());
    let (lost, of) = cut_power_of_sqlite(&volume, &database, &[("LD_PRELOAD", &library)]).await;
    println!("{lost} of {of} are lost");
    assert!(lost > 0, "nothing of {of} is lost");
}

/// As [`cut_power_of_sqlite`], for PostgreSQL. `None` if the cluster doesn't start again.
async fn cut_power_of_postgres(
    volume: &Volume,
    cluster: &'static Cluster,
    database: &Database,
) -> Option<(usize, usize)> {
    let program = Program::start_with(database, &["--log", "error"]);
    program.client().create(NewJob::new("t")).await.expect("it is created");
    database.connect_as("postgres").await.execute("CHECKPOINT").await.expect("a superuser may");
    volume.sync();
    let mut writers = Writers::start(&program.client());
    writers.until(short_or_long(500, 5_000)).await;
    let postmaster = cluster.postmaster();
    let cut = volume.cut_power();
    let acknowledged = writers.end(cut).await;
    program.kill();
    let is_up = block_in_place(|| {
        cluster.kill_processes(postmaster);
        volume.power_up();
        cluster.clean_up_after_kill();
        cluster.try_start_again()
    });
    if !is_up {
        return None;
    }
    Some((lost(database, &acknowledged).await, acknowledged.len()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_takes_nothing_that_postgres_acknowledged() {
    let Some(volume) = Volume::new(2_048) else { return };
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::alone_in(&volume.path(), Durability::Full).await));
    let database = Database::postgres_on(cluster).await;
    for _ in 0..short_or_long(2, 20) {
        let (lost, of) = cut_power_of_postgres(&volume, cluster, &database).await.expect("it starts again");
        println!("{lost} of {of} are lost");
        assert_eq!(lost, 0, "of {of}");
    }
    block_in_place(|| cluster.kill());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_is_noticed_where_postgres_is_not_durable() {
    let Some(volume) = Volume::new(2_048) else { return };
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::alone_in(&volume.path(), Durability::None).await));
    let database = Database::postgres_on(cluster).await;
    let outcome = cut_power_of_postgres(&volume, cluster, &database).await;
    println!("{outcome:?} are lost");
    let Some((lost, of)) = outcome else { return };
    assert!(lost > 0, "nothing of {of} is lost");
    block_in_place(|| cluster.kill());
}
