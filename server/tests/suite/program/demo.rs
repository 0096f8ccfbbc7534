//! `jobledger demo`, with its output in a pipe.

use std::{fs, process::Output};

use jobledger_client::ListJobsRequest;

use crate::support::harness::{Database, TestServer};
use crate::support::program::command;

/// Whether the demo succeeded, and what it printed: to stdout, which has only the outcome, if it did, otherwise to stderr.
fn demo(arguments: &[&str]) -> (bool, String) {
    let Output { status, stdout, stderr } =
        command(&[&["demo"], arguments].concat()).output().expect("the program starts");
    let said = if status.success() { stdout } else { stderr };
    (status.success(), String::from_utf8(said).expect("it prints text"))
}

#[tokio::test]
async fn a_tree_is_digested_once_and_known_afterwards() {
    let tree = tempfile::TempDir::new().unwrap();
    for n in 0..60 {
        let folder = tree.path().join(format!("{}", n % 4));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("file-{n}")), vec![n as u8; 1_000 * n]).unwrap();
    }
    let path = tree.path().to_str().unwrap();
    let (done, said) = demo(&[path, "--workers", "3"]);
    assert!(done && said.starts_with("60 files: 60 digested, 0 failed, 0 already digested\n"), "{said}");
    assert!(said.contains(": 60 jobs, 0 queued, 0 running, 60 succeeded, 0 failed\n"), "{said}");
    assert!(said.ends_with("the server's statistics match the processed files\n"), "{said}");

    let database = Database::sqlite();
    let kept = ["--database-url", &database.url()];
    let (done, said) = demo(&[&[path][..], &kept].concat());
    assert!(done && said.contains("60 digested"), "{said}");
    fs::write(tree.path().join("new"), "new").unwrap();
    let (done, said) = demo(&[&[path][..], &kept].concat());
    assert!(done && said.starts_with("61 files: 1 digested, 0 failed, 60 already digested\n"), "{said}");

    let (server, client) = TestServer::on(&database).await;
    let jobs = client.list(ListJobsRequest { page_size: 100, ..Default::default() }).await.unwrap().jobs;
    assert!(jobs.len() == 61 && jobs.iter().all(|job| job.attempt == 1 && job.last_seq > 0));
    server.stop().await;
}

#[test]
fn hidden_directories_and_caches_are_left_out_unless_asked_for() {
    let tree = tempfile::TempDir::new().unwrap();
    for folder in [".git", "target", "src"] {
        fs::create_dir(tree.path().join(folder)).unwrap();
        fs::write(tree.path().join(folder).join("file"), folder).unwrap();
    }
    fs::write(tree.path().join("target/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55").unwrap();
    let path = tree.path().to_str().unwrap();
    let (done, said) = demo(&[path]);
    assert!(done && said.starts_with("1 files: 1 digested"), "{said}");
    for folder in [".git", "target"] {
        let line = format!("skipped {path}/{folder}: hidden, or marked as a cache: --all includes it\n");
        assert!(said.contains(&line), "{said}");
    }
    let (done, said) = demo(&[path, "--all"]);
    assert!(done && said.starts_with("4 files: 4 digested") && !said.contains("skipped"), "{said}");
}

#[test]
fn what_can_not_be_digested_is_said() {
    let empty = tempfile::TempDir::new().unwrap();
    let (done, said) = demo(&[empty.path().to_str().unwrap()]);
    assert!(done && said.contains("holds no regular file"), "{said}");
    let (done, said) = demo(&["/does/not/exist"]);
    assert!(!done && said.contains("/does/not/exist: No such file"), "{said}");
    // A file that can't be read, not even by root.
    let (done, said) = demo(&["/proc/self/mem"]);
    assert!(done && said.starts_with("1 files: 0 digested, 1 failed"), "{said}");
    assert!(said.contains("failed /proc/") && said.contains("(UNREADABLE)"), "{said}");
    let (done, said) = demo(&[".", "--database-url", "postgres://nobody@localhost/x"]);
    assert!(!done && said.contains("SQLite"), "{said}");
}
