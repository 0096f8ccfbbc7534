//! SQLite's WAL under reads that overlap.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use jobledger_client::NewJob;
use jobledger_server::{
    domain::id::{JobId, OrgId},
    store::{self, OpenOptions},
};
use tokio::task::JoinSet;

use crate::support::harness::{Database, TestServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_overlap_do_not_let_the_log_grow_without_end() {
    const LIMIT: u64 = 24 << 20;
    let database = Database::sqlite();
    let config = database.config();
    let options = OpenOptions { max_wal: LIMIT, ..config.open_options() };
    let store = store::open(&config.database_url, options).await.unwrap();
    let server = TestServer::start_with(config, Arc::clone(&store)).await;
    let client = server.client();
    let text = "x".repeat(400_000);
    let mut ids = Vec::new();
    for _ in 0..5 {
        let created = client.create(NewJob::new("t").payload(&text).unwrap()).await.unwrap();
        ids.push(JobId(created.job.id.parse().unwrap()));
    }
    // At any moment a read is under way: each begins before the one before has ended.
    let is_over = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for _ in 0..4 {
        let (store, ids, is_over) = (Arc::clone(&store), ids.clone(), Arc::clone(&is_over));
        readers.spawn(async move {
            let mut reads = 0;
            while !is_over.load(Ordering::Relaxed) {
                assert_eq!(store.contents(OrgId::DEFAULT, &ids).await.unwrap().len(), ids.len());
                reads += 1;
            }
            reads
        });
    }
    let wal = database.path().with_extension("db-wal");
    let mut longest = 0;
    for _ in 0..300 {
        client.create(NewJob::new("t").payload(&text).unwrap()).await.unwrap();
        longest = longest.max(std::fs::metadata(&wal).unwrap().len());
    }
    is_over.store(true, Ordering::Relaxed);
    let reads: usize = readers.join_all().await.into_iter().sum();
    assert!(longest < 3 * LIMIT, "the log grew to {} MiB beside {reads} reads", longest >> 20);
    server.stop().await;
    database.verify().await;
}
