//! The `digest_files` example on real files: digests, statistics, a second run, a kill in the middle, unreadable files.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use jobledger_client::{Follow, Item, JobEvent, JobEventKind};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use crate::{
    support::harness::{Database, PATIENCE, fixed_address, on_both_databases, short_or_long},
    support::program::Program,
    work::crash::verify,
};

on_both_databases! {
    the_example_digests_a_tree_across_a_kill_and_knows_it_the_second_time,
}

/// The path of an example, which the same `cargo test` has built.
pub(crate) fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().expect("the test runs from a file");
    let built = tests.ancestors().nth(2).expect("target/PROFILE/deps/suite");
    let example = built.join("examples").join(name);
    assert!(example.exists(), "{} is missing: `cargo test --workspace` builds it", example.display());
    example
}

fn digest_files(address: &str, path: &Path) -> Command {
    let mut command = Command::new(example("digest_files"));
    command.arg("--server").arg(format!("http://{address}")).arg(path);
    command.stdout(Stdio::piped()).stderr(Stdio::inherit());
    command
}

async fn the_example_digests_a_tree_across_a_kill_and_knows_it_the_second_time(database: Database) {
    let files = short_or_long(400, 3_000);
    let tree = tempfile::TempDir::new().unwrap();
    let mut expected = HashMap::new();
    for n in 0..files {
        let folder = tree.path().join(format!("{}", n % 7));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("file-{n}"));
        // Empty files, small files, and files larger than a chunk.
        let size = match n % 100 {
            0 => 0,
            1 => 3 << 20,
            n => n * 97,
        };
        let content: Vec<u8> = (0..size).map(|at| (at * 31 + n) as u8).collect();
        fs::write(&path, &content).unwrap();
        let digest: String = hex::encode(Sha256::digest(&content));
        expected.insert(fs::canonicalize(&path).unwrap().display().to_string(), digest);
    }
    // A link is not a regular file, so it is not digested.
    std::os::unix::fs::symlink("file-0", tree.path().join("link")).unwrap();

    let address = fixed_address();
    let program = Program::start_on(&address, &database);
    let mut events = program.client().subscribe(Follow::org().after(0)).await.unwrap();
    let example = digest_files(&address, tree.path()).spawn().expect("the example was built");
    let mut history: Vec<JobEvent> = Vec::new();
    let mut program = Some(program);
    let is_last = |event: &JobEvent| event.kind() == JobEventKind::Succeeded;
    while history.iter().filter(|event| is_last(event)).count() < files {
        let item = timeout(PATIENCE, events.next()).await.expect("events come").expect("for ever").unwrap();
        let Item::Event(event) = item else { continue };
        history.push(*event);
        if history.len() == files
            && let Some(running) = program.take()
        {
            running.kill();
            program = Some(Program::start_on(&address, &database));
        }
    }
    let output = tokio::task::spawn_blocking(move || example.wait_with_output()).await.unwrap().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains(&format!("{files} files: {files} digested")), "{said}");
    assert!(said.contains("the server's statistics match the processed files"), "{said}");

    let client = program.as_ref().unwrap().client();
    let stages: HashSet<_> = history.iter().map(|event| event.stage().to_owned()).collect();
    assert!(stages.contains("opening") && stages.contains("hashing"), "{stages:?}");
    for event in history.iter().filter(|event| is_last(event)) {
        let job = client.get(&event.job_id).await.unwrap();
        let payload: serde_json::Value = jobledger_client::from_value(job.payload.as_ref()).unwrap();
        let result: serde_json::Value = jobledger_client::from_value(job.result.as_ref()).unwrap();
        assert_eq!(result["sha256"].as_str(), expected.get(payload["path"].as_str().unwrap()).map(String::as_str));
    }

    let again = tokio::task::spawn_blocking({
        let mut command = digest_files(&address, tree.path());
        move || command.output()
    });
    let said = String::from_utf8(again.await.unwrap().unwrap().stdout).unwrap();
    assert!(said.contains(&format!("{files} files: 0 digested (0 B), 0 failed, {files} already digested")), "{said}");
    assert!(said.contains("the server's statistics match the processed files"), "{said}");
    drop(program);
    verify(&database, &HashMap::new()).await;
    println!("{files} files digested across a kill");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_fails_the_job_of_a_file_that_can_not_be_read() {
    let database = Database::sqlite();
    let program = Program::start(&database);
    // A regular file that opens but can't be read, even by root: nothing is mapped at the start of a process's memory.
    let output = digest_files(&program.address, Path::new("/proc/self/mem")).output().expect("the example was built");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("1 files: 0 digested (0 B), 1 failed"), "{said}");
    assert!(said.contains("/mem: Input/output error"), "{said}");

    let mut events = program.client().subscribe(Follow::org().after(0).history_only()).await.unwrap();
    let mut last = None;
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            last = Some(event);
        }
    }
    let last = last.expect("the job has events");
    assert_eq!((last.kind(), last.error_code.as_str()), (JobEventKind::Failed, "UNREADABLE"));
}
