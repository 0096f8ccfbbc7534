//! `jobledger backup`.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Output,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use jobledger_client::{Client, Error, Follow, NewJob};
use tokio::task::JoinSet;

use crate::support::harness::Database;
use crate::support::program::{Program, command};

fn backup(database: &Database, file: &Path) -> Output {
    let url = database.url();
    command(&["backup", file.to_str().unwrap(), "--database-url", &url]).output().expect("the program runs")
}

async fn count(client: &Client) -> i64 {
    client.statistics(&[]).await.unwrap().as_of_seq
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_beside_a_busy_server_is_whole_and_of_another_log() {
    let (database, folder) = (Database::sqlite(), tempfile::tempdir().unwrap());
    let program = Program::start(&database);
    let client = program.client();
    client.create_all((0..1_000).map(|_| NewJob::new("t"))).await.unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for _ in 0..8 {
        let (client, is_over) = (client.clone(), Arc::clone(&is_over));
        writers.spawn(async move {
            while !is_over.load(Ordering::SeqCst) {
                client.create(NewJob::new("t")).await.unwrap();
            }
        });
    }
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    events.next().await.unwrap().unwrap();
    let cursor = events.cursor().expect("it was told of something").clone();

    let before = count(&client).await;
    let copy = folder.path().join("ledger.db");
    let done = backup(&database, &copy);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let after = count(&client).await;
    is_over.store(true, Ordering::SeqCst);
    while let Some(ended) = writers.join_next().await {
        ended.expect("writers go on meanwhile");
    }

    let again = backup(&database, &copy);
    assert_eq!(again.status.code(), Some(1), "a file that is there stays as it is");
    assert!(String::from_utf8_lossy(&again.stderr).contains("ledger.db"));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["ledger.db"], "nothing else is left");

    for file in [&database.path(), &copy] {
        let mode = std::fs::metadata(file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "payloads are in {}", file.display());
    }
    let restored = Database::sqlite_at(folder.path().to_owned());
    restored.verify().await;
    let server = Program::start(&restored);
    let has = count(&server.client()).await;
    assert!((before..=after).contains(&has), "{has} of {before} to {after} events");
    let told = match server.client().subscribe(Follow::org().resume(&cursor)).await {
        Err(error) => error,
        Ok(mut events) => events.next().await.unwrap().expect_err("the log is another"),
    };
    assert!(matches!(told, Error::EpochChanged { .. }), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_backed_up_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let said = |database: &Database, file: &Path| {
        let done = backup(database, file);
        assert_eq!(done.status.code(), Some(1));
        String::from_utf8(done.stderr).unwrap()
    };
    let file = folder.path().join("copy.db");
    let postgres = said(&Database::postgres().await, &file);
    assert!(postgres.contains("pg_dump"), "{postgres}");
    let nothing = said(&Database::sqlite(), &file);
    assert!(nothing.contains("no database at"), "{nothing}");
    let database = Database::sqlite();
    database.open().await.close().await;
    let nowhere = said(&database, Path::new("/proc/nowhere/copy.db"));
    assert!(nowhere.contains("can't write /proc/nowhere/copy.db: No such file or directory"), "{nowhere}");
    assert!(!file.exists());
}
