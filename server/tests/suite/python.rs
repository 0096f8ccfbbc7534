//! The code of docs/python.md, run as it stands there.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Deserializer, Value};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::{
    grpcurl::grpcurl,
    harness::{Database, Program, on_both_databases, root},
    legacy_http::http,
};

on_both_databases! {
    the_worker_completes_what_old_clients_create_while_grpcurl_follows,
    jobs_are_created_and_followed_and_errors_read,
}

/// The page's code and what it needs to run.
struct Page {
    folder: TempDir,
    /// Its blocks of Python, in order.
    code: Vec<String>,
}

/// Python, as the Makefile names it, with the packages that `make tools` brings.
fn python(stubs: &Path) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the Makefile says which Python, and where its packages are")]
    let (python, packages) = (env::var("PYTHON"), env::var("GRPCIO"));
    let packages = packages.map_or_else(|_| root().join(".tools/grpcio"), PathBuf::from);
    assert!(packages.join("grpc").exists(), "no grpcio in {}: run `make tools`", packages.display());
    let mut command = Command::new(python.unwrap_or_else(|_| "python3".to_owned()));
    command.env("PYTHONPATH", env::join_paths([stubs, &packages]).expect("paths"));
    command
}

impl Page {
    fn open() -> Self {
        let text = fs::read_to_string(root().join("docs/python.md")).expect("the page is there");
        let blocks = |name: &str| -> Vec<String> {
            let fence = format!("```{name}\n");
            let blocks = text.split(&fence).skip(1);
            blocks.map(|block| block.split("```").next().expect("a block ends").to_owned()).collect()
        };
        let page = Self { folder: TempDir::new().expect("a temporary directory"), code: blocks("python") };
        let stubs = page.folder.path().join("stubs");
        fs::create_dir(&stubs).expect("it is new");
        // The page's own command, on files of this folder.
        let commands = blocks("sh").remove(0);
        let generate = commands.lines().find(|line| line.contains("grpc_tools.protoc")).expect("it says how");
        let arguments = generate.split_whitespace().skip(1).flat_map(|word| match word.strip_suffix("*.proto") {
            None => vec![word.replace("=stubs", &format!("={}", stubs.display()))],
            Some(folder) => {
                let files = fs::read_dir(root().join(folder)).expect("the contract is there");
                files.map(|file| file.expect("a file").path().display().to_string()).collect()
            }
        });
        let arguments: Vec<_> = arguments.map(|word| word.replace(&format!("{}/", root().display()), "")).collect();
        let generated = python(&stubs).args(arguments).current_dir(root()).output().expect("python runs");
        assert!(generated.status.success(), "{}", String::from_utf8_lossy(&generated.stderr));
        page
    }

    /// Runs a file of code in the folder.
    fn run(&self, name: &str, code: &str, arguments: &[&str]) -> Child {
        let path = self.folder.path().join(name);
        fs::File::create(&path).and_then(|mut file| file.write_all(code.as_bytes())).expect("it is written");
        let mut command = python(&self.folder.path().join("stubs"));
        command.arg("-u").arg(path).args(arguments).stdout(Stdio::piped());
        command.spawn().expect("python runs")
    }
}

/// A process that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const JOBS: usize = 1_000;

async fn the_worker_completes_what_old_clients_create_while_grpcurl_follows(database: Database) {
    let page = Page::open();
    let worker = &page.code[0];
    assert!(worker.lines().count() <= 40, "a worker of {} lines", worker.lines().count());
    let program = Program::start_with(&database, &["--legacy-http"]);
    let follow =
        ["-plaintext", "-d", "{\"after_seq\": 0}", &program.address, "jobledger.v1.JobService/StreamJobEvents"];
    let grpcurl = Command::new(grpcurl()).args(follow).stdout(Stdio::piped()).spawn().expect("grpcurl runs");
    let mut grpcurl = Running(grpcurl);
    let worker = Running(page.run("worker.py", worker, &[&program.address, "mock_process", "16"]));

    let mut creating = JoinSet::new();
    for _ in 0..8 {
        let address = program.address.clone();
        creating.spawn(async move {
            for _ in 0..JOBS / 8 {
                let headers = ["Content-Type: application/json"];
                let answer = http(&address, "POST /jobs", &headers, r#"{"type": "mock_process"}"#).await;
                assert_eq!(answer.code, 200, "{answer:?}");
            }
        });
    }
    let reading = tokio::task::spawn_blocking({
        let output = grpcurl.0.stdout.take().expect("a pipe");
        move || {
            let (mut seq, mut ends, mut kinds) = (0, HashMap::new(), HashMap::new());
            for message in Deserializer::from_reader(BufReader::new(output)).into_iter::<Value>() {
                let message = message.expect("grpcurl prints JSON");
                let Some(event) = message.get("event") else { continue };
                seq += 1;
                assert_eq!(event["seq"], seq.to_string(), "none is missing, and none comes twice");
                *kinds.entry(event["kind"].as_str().unwrap().to_owned()).or_insert(0) += 1;
                assert_ne!(event["kind"], "JOB_EVENT_KIND_FAILED", "{event}");
                if event["kind"] == "JOB_EVENT_KIND_SUCCEEDED" {
                    ends.insert(event["jobId"].as_str().unwrap().to_owned(), event["result"].clone());
                    if ends.len() == JOBS {
                        return (ends, kinds);
                    }
                }
            }
            panic!("the subscription ended after {seq} events");
        }
    });
    while let Some(ended) = creating.join_next().await {
        ended.unwrap();
    }
    let (ends, kinds) =
        tokio::time::timeout(crate::harness::PATIENCE, reading).await.expect("they are completed").unwrap();
    for kind in ["CREATED", "CLAIMED", "SUCCEEDED"] {
        assert_eq!(kinds[&format!("JOB_EVENT_KIND_{kind}")], JOBS, "{kinds:?}");
    }
    let (id, result) = ends.into_iter().next().unwrap();
    assert_eq!(result["sum"], 0, "it found no numbers");
    let answer = http(&program.address, &format!("GET /jobs/{id}"), &[], "").await;
    assert!(answer.text.contains(r#""status":"completed""#), "{answer:?}");
    drop(grpcurl);
    // It stops when it is told to.
    let mut worker = worker;
    assert!(Command::new("kill").args(["-TERM", &worker.0.id().to_string()]).status().unwrap().success());
    assert!(tokio::task::spawn_blocking(move || worker.0.wait()).await.unwrap().unwrap().success());
    assert!(program.end_by("TERM").success());
}

async fn jobs_are_created_and_followed_and_errors_read(database: Database) {
    let page = Page::open();
    let program = Program::start(&database);
    let _worker = Running(page.run("worker.py", &page.code[0], &[&program.address, "sum"]));
    let code = page.code[1].replace("127.0.0.1:50051", &program.address);
    let mut following = Running(page.run("follow.py", &code, &[]));
    let id = tokio::task::spawn_blocking(move || {
        for line in BufReader::new(following.0.stdout.take().expect("a pipe")).lines() {
            let line = line.expect("it prints text");
            if line.contains("JOB_STATUS_SUCCEEDED") {
                assert!(line.ends_with("{'sum': 6.5}"), "{line}");
                return line.split(' ').nth(1).expect("an id").to_owned();
            }
        }
        panic!("the events ended");
    })
    .await
    .unwrap();
    let (creating, _) = code.split_once("\ndef follow").expect("it creates a job first");
    let errors = format!(
        "{}\n{}\ntry:\n    stub.CreateJob(api.CreateJobRequest(type='sum', idempotency_key='sum@1'))\n\
         except grpc.RpcError as error:\n    print(reason(error))\n",
        creating, page.code[2]
    );
    let output = page.run("errors.py", &errors, &[]).wait_with_output().expect("python runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(printed.trim(), format!("('IDEMPOTENCY_KEY_REUSED', {{'existing_job_id': '{id}'}})"));
    assert!(program.end_by("TERM").success());
}
