//! Runs the commands, the programs and the code of docs/python.md as they stand.

use std::{
    collections::{HashMap, HashSet},
    env, fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use jobledger_client::{Client, Follow, Item, JobEventKind, JobStatus, NewJob, Token};
use jobledger_server::domain::access::Role;
use serde_json::{Deserializer, Value};
use tempfile::TempDir;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver},
    task::JoinSet,
    time::timeout,
};
use uuid::Uuid;

use crate::{
    callers::access::token,
    legacy::rest::http,
    program::grpcurl::grpcurl,
    support::harness::{Database, PATIENCE, await_kind, fixed_address, on_both_databases, root},
    support::program::Program,
};

on_both_databases! {
    the_worker_completes_what_old_clients_create_while_grpcurl_follows,
    jobs_are_created_and_followed_and_errors_read,
    every_outcome_is_taken_where_calls_are_limited,
    a_result_that_the_service_refuses_fails_the_job_for_good,
    a_worker_that_is_stopped_finishes_its_jobs_or_gives_them_back,
    a_worker_with_a_wrong_token_ends_at_once,
    a_follower_goes_on_when_its_server_was_killed,
}

/// The page, and a folder for what its programs need and leave: stubs, handlers and logs.
struct Page {
    folder: TempDir,
    /// The page's lines of shell, in order.
    commands: Vec<String>,
    /// The page's blocks of Python, in order.
    code: Vec<String>,
}

/// A handler in the module `tested`. It does what the payload says, and notes that it ran.
const HANDLER: &str = r#"
import os
import time

from jobledger_client import from_value


def handle(job, report, canceled):
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(job.id + "\n")
    how = from_value(job.payload)
    if how == "wait":
        report(stage="waiting")
        while not os.path.exists(os.environ["DONE"]):
            time.sleep(0.02)
    return "a\0b" if how == "return NUL" else how
"#;

/// The Python that the Makefile names.
fn python() -> String {
    #[expect(clippy::disallowed_methods, reason = "the Makefile says which Python")]
    let python = env::var("PYTHON");
    python.unwrap_or_else(|_| "python3".to_owned())
}

/// The packages that `make tools` brings.
fn packages() -> PathBuf {
    #[expect(clippy::disallowed_methods, reason = "the Makefile says where they are")]
    let packages = env::var("GRPCIO");
    let packages = packages.map_or_else(|_| root().join(".tools/grpcio"), PathBuf::from);
    assert!(packages.join("grpc").exists(), "no grpcio in {}: run `make tools`", packages.display());
    packages
}

impl Page {
    fn open() -> Self {
        let text = fs::read_to_string(root().join("docs/python.md")).expect("the page is there");
        let blocks = |name: &str| -> Vec<String> {
            let fence = format!("```{name}\n");
            let blocks = text.split(&fence).skip(1);
            blocks.map(|block| block.split("```").next().expect("a block ends").to_owned()).collect()
        };
        let commands = blocks("sh").iter().flat_map(|block| block.lines()).map(str::to_owned).collect();
        let page = Self { folder: TempDir::new().expect("a temporary directory"), commands, code: blocks("python") };
        fs::create_dir(page.path("stubs")).expect("it is new");
        page.write("tested.py", HANDLER);
        let generate =
            page.command("grpc_tools.protoc").replace("=stubs", &format!("={}", page.path("stubs").display()));
        let generated = page.shell(&generate).output().expect("a shell runs");
        assert!(generated.status.success(), "{}", String::from_utf8_lossy(&generated.stderr));
        page
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("it can be written");
    }

    /// The page's line of shell that contains `part`.
    fn command(&self, part: &str) -> &str {
        self.commands.iter().find(|line| line.contains(part)).unwrap_or_else(|| panic!("the page has no {part}"))
    }

    /// A line of shell, to be run in the folder that the page names.
    fn shell(&self, line: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("exec {}", line.replacen("python3", &python(), 1)));
        self.prepare(command)
    }

    /// Starts the page's line that contains `part`, for the server at this address.
    fn line(&self, part: &str, address: &str) -> Running {
        self.start(self.shell(&self.command(part).replace("127.0.0.1:50051", address)))
    }

    /// One of the page's programs.
    fn program(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(python());
        command.arg(root().join("docs/python").join(name)).args(arguments);
        self.prepare(command)
    }

    /// A worker on jobs of the type `t` with [`HANDLER`].
    fn worker(&self, address: &str, more: &[&str]) -> Command {
        let mut command = self.program("worker.py", &[address, "t", "--handler", "tested:handle"]);
        command.args(more);
        command
    }

    fn prepare(&self, mut command: Command) -> Command {
        let folder = self.folder.path().to_owned();
        let paths = [self.path("stubs"), packages(), folder, root().join("docs/python")];
        let paths = env::join_paths(paths).expect("no colon is in them");
        command.current_dir(root()).env("PYTHONPATH", paths).env_remove("JOBLEDGER_TOKEN");
        // Writes no bytecode beside the programs, and output at once.
        command.env("PYTHONDONTWRITEBYTECODE", "1").env("PYTHONUNBUFFERED", "1");
        command.env("RUNS", self.path("runs")).env("DONE", self.path("done"));
        command
    }

    fn start(&self, mut command: Command) -> Running {
        let log = self.path(&Uuid::new_v4().to_string());
        let errors = fs::File::create(&log).expect("it is new");
        let process = command.stdout(Stdio::piped()).stderr(errors).spawn().expect("python runs");
        Running { process, log }
    }

    /// The ids of jobs, in the order in which [`HANDLER`] ran.
    fn runs(&self) -> Vec<String> {
        let runs = fs::read_to_string(self.path("runs")).expect("the handler ran");
        runs.lines().map(str::to_owned).collect()
    }
}

/// A process that is killed when it is dropped.
struct Running {
    process: Child,
    /// The file with its standard error.
    log: PathBuf,
}

impl Running {
    /// The lines of its standard output.
    fn lines(&mut self) -> UnboundedReceiver<String> {
        let output = BufReader::new(self.process.stdout.take().expect("a pipe"));
        let (sender, lines) = mpsc::unbounded_channel();
        // The thread ends with the process.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        lines
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.process.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Waits for its end. Kills it and panics if the end does not come.
    async fn end(mut self) -> ExitStatus {
        let id = self.process.id().to_string();
        let waiting = tokio::task::spawn_blocking(move || self.process.wait());
        let Ok(ended) = timeout(PATIENCE, waiting).await else {
            let _ = Command::new("kill").args(["-KILL", &id]).status();
            panic!("it does not end");
        };
        ended.expect("nothing panics").expect("it was started")
    }

    /// Stops it with SIGTERM, as a supervisor does.
    async fn stop(self) {
        self.signal("TERM");
        assert!(self.end().await.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The next line that contains `part`.
async fn line_with(part: &str, lines: &mut UnboundedReceiver<String>) -> String {
    let found = async {
        loop {
            let line = lines.recv().await.unwrap_or_else(|| panic!("it ended before {part}"));
            if line.contains(part) {
                return line;
            }
        }
    };
    timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("{part} does not come"))
}

const OLD_JOBS: usize = 1_000;

async fn the_worker_completes_what_old_clients_create_while_grpcurl_follows(database: Database) {
    let page = Page::open();
    let program = Program::start_with(&database, &["--legacy-http"]);
    let follow =
        ["-plaintext", "-d", "{\"after_seq\": 0}", &program.address, "jobledger.v1.JobService/StreamJobEvents"];
    let mut command = Command::new(grpcurl());
    command.args(follow);
    let mut grpcurl = page.start(command);
    let worker = page.start(page.program("worker.py", &[&program.address, "mock_process", "--slots", "16"]));

    let mut creating = JoinSet::new();
    for _ in 0..8 {
        let address = program.address.clone();
        creating.spawn(async move {
            for _ in 0..OLD_JOBS / 8 {
                let headers = ["Content-Type: application/json"];
                let answer = http(&address, "POST /jobs", &headers, r#"{"type": "mock_process"}"#).await;
                assert_eq!(answer.code, 200, "{answer:?}");
            }
        });
    }
    let reading = tokio::task::spawn_blocking({
        let output = grpcurl.process.stdout.take().expect("a pipe");
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
                    if ends.len() == OLD_JOBS {
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
    let (ends, kinds) = timeout(PATIENCE, reading).await.expect("they are completed").unwrap();
    for kind in ["CREATED", "CLAIMED", "SUCCEEDED"] {
        assert_eq!(kinds[&format!("JOB_EVENT_KIND_{kind}")], OLD_JOBS, "{kinds:?}");
    }
    let (id, result) = ends.into_iter().next().unwrap();
    assert_eq!(result["sum"], 0, "it found no numbers");
    let answer = http(&program.address, &format!("GET /jobs/{id}"), &[], "").await;
    assert!(answer.text.contains(r#""status":"completed""#), "{answer:?}");
    drop(grpcurl);
    worker.stop().await;
    assert!(program.end_by("TERM").success());
}

async fn jobs_are_created_and_followed_and_errors_read(database: Database) {
    let page = Page::open();
    let program = Program::start(&database);
    let address = &program.address;
    let worker = page.line("worker.py 127.0.0.1:50051 sum --slots", address);
    let mut follower = page.line("follow --after 0", address);
    let mut events = follower.lines();
    let mut creator = page.line("create sum", address);
    let created = line_with(" created", &mut creator.lines()).await;
    assert!(creator.end().await.success());
    let (id, _) = created.split_once(' ').expect("an id comes first");
    let event = line_with("JOB_STATUS_SUCCEEDED", &mut events).await;
    assert!(event.contains(id) && event.ends_with(r#"{"sum": 6.5}"#), "{event}");
    let mut again = page.line("create sum", address);
    assert_eq!(line_with("known", &mut again.lines()).await, format!("{id} known from before"));
    worker.stop().await;

    // The page's own handler, and its client.
    page.write("sums.py", &page.code[0]);
    let worker = page.line("--handler sums:handle", address);
    let client = program.client();
    let nothing = NewJob::new("sum").payload(&serde_json::json!({"numbers": []})).unwrap().max_attempts(3);
    let nothing = client.create(nothing).await.unwrap().job.id;
    let job = timeout(PATIENCE, client.wait_for(&nothing)).await.expect("it ends").unwrap();
    assert_eq!((job.status(), job.attempt, job.last_error_code.as_str()), (JobStatus::Failed, 1, "EMPTY"));
    page.write("client.py", &page.code[1].replace("127.0.0.1:50051", address));
    let mut command = Command::new(python());
    command.arg(page.path("client.py"));
    let mut running = page.start(page.prepare(command));
    let mut printed = running.lines();
    line_with("JOB_STATUS_SUCCEEDED {'sum': 6.5}", &mut printed).await;
    let refused = line_with("IDEMPOTENCY_KEY_REUSED", &mut printed).await;
    assert!(refused.starts_with("StatusCode.ALREADY_EXISTS") && refused.contains("'existing_job_id': '"), "{refused}");
    assert!(running.end().await.success());
    worker.stop().await;
    assert!(program.end_by("TERM").success());
}

async fn every_outcome_is_taken_where_calls_are_limited(database: Database) {
    const JOBS: usize = 60;
    let page = Page::open();
    let program = Program::start(&database);
    let jobs = (0..JOBS).map(|n| NewJob::new("t").payload(&n).unwrap().max_attempts(2));
    for created in program.client().create_all(jobs).await.unwrap() {
        created.unwrap();
    }
    assert!(program.end_by("TERM").success());
    let program = Program::start_with(&database, &["--max-rate-per-org", "8"]);
    let mut events = program.client().subscribe(Follow::org().after(0)).await.unwrap();
    let worker = page.start(page.worker(&program.address, &[]));
    let mut kinds = HashMap::new();
    let all = async {
        while kinds.get(&JobEventKind::Succeeded) != Some(&JOBS) {
            if let Item::Event(event) = events.next().await.expect("it goes on").unwrap() {
                *kinds.entry(event.kind()).or_insert(0) += 1;
            }
        }
    };
    timeout(PATIENCE, all).await.expect("all end");
    let expected = [JobEventKind::Created, JobEventKind::Claimed, JobEventKind::Succeeded].map(|kind| (kind, JOBS));
    assert_eq!(kinds, HashMap::from(expected));
    let runs = page.runs();
    assert_eq!((runs.len(), runs.iter().collect::<HashSet<_>>().len()), (JOBS, JOBS), "each ran once");
    let said = fs::read_to_string(&worker.log).unwrap();
    assert!(said.contains("RATE_LIMITED"), "there was something to bear: {said}");
    worker.stop().await;
    assert!(program.end_by("TERM").success());
}

async fn a_result_that_the_service_refuses_fails_the_job_for_good(database: Database) {
    let page = Page::open();
    let program = Program::start(&database);
    let client = program.client();
    let worker = page.start(page.worker(&program.address, &[]));
    let job = NewJob::new("t").payload("return NUL").unwrap().max_attempts(2);
    let id = client.create(job).await.unwrap().job.id;
    let job = timeout(PATIENCE, client.wait_for(&id)).await.expect("it ends").unwrap();
    assert_eq!((job.status(), job.attempt), (JobStatus::Failed, 1), "{job:?}");
    assert_eq!(job.last_error_code, "INVALID_RESULT");
    assert!(job.last_error_message.contains("NUL"), "{job:?}");
    assert_eq!(page.runs(), [id]);
    worker.stop().await;
    assert!(program.end_by("TERM").success());
}

async fn a_worker_that_is_stopped_finishes_its_jobs_or_gives_them_back(database: Database) {
    let page = Page::open();
    let program = Program::start(&database);
    let client = program.client();
    for (signal, grace, status) in [("TERM", "60", JobStatus::Succeeded), ("INT", "1", JobStatus::Queued)] {
        let id = client.create(NewJob::new("t").payload("wait").unwrap()).await.unwrap().job.id;
        let worker = page.start(page.worker(&program.address, &["--grace", grace]));
        // By then the handler is at work.
        await_kind(&client, &id, JobEventKind::Progress).await;
        worker.signal(signal);
        if status == JobStatus::Succeeded {
            page.write("done", "");
        }
        assert!(worker.end().await.success(), "{signal}");
        let job = client.get(&id).await.unwrap();
        assert_eq!((job.status(), job.attempt, job.failures), (status, 1, 0), "{job:?}");
        assert_eq!(job.last_error_code, "", "{job:?}");
        let _ = fs::remove_file(page.path("done"));
    }
    assert!(program.end_by("TERM").success());
}

async fn a_worker_with_a_wrong_token_ends_at_once(database: Database) {
    let page = Page::open();
    let secret = token(&database, Some(Uuid::nil()), Role::Admin).await;
    let program = Program::start_with(&database, &["--require-auth"]);
    let started = Instant::now();
    let mut command = page.worker(&program.address, &[]);
    command.env("JOBLEDGER_TOKEN", "jl_wrong");
    let worker = page.start(command);
    let log = worker.log.clone();
    assert_eq!(worker.end().await.code(), Some(1));
    assert!(started.elapsed() < Duration::from_secs(20), "after {:?}", started.elapsed());
    let said = fs::read_to_string(log).unwrap();
    assert!(said.contains("the claim is refused: UNAUTHENTICATED"), "{said}");

    page.write("token", &format!("{secret}\n"));
    let file = page.path("token");
    let worker = page.start(page.worker(&program.address, &["--token-file", file.to_str().expect("text")]));
    let client = Client::builder(format!("http://{}", program.address)).token(Token::new(&secret).unwrap());
    let client = client.timeout(PATIENCE).build().unwrap();
    let id = client.create(NewJob::new("t")).await.unwrap().job.id;
    let job = timeout(PATIENCE, client.wait_for(&id)).await.expect("it ends").unwrap();
    assert_eq!(job.status(), JobStatus::Succeeded, "{job:?}");
    worker.stop().await;
    assert!(program.end_by("TERM").success());
}

async fn a_follower_goes_on_when_its_server_was_killed(database: Database) {
    let page = Page::open();
    let address = fixed_address();
    let mut program = Program::start_on(&address, &database);
    let mut follower = page.start(page.program("jobs.py", &[&address, "follow", "--after", "0"]));
    let mut lines = follower.lines();
    for seq in 1..4 {
        let id = program.client().create(NewJob::new("t")).await.unwrap().job.id;
        let line = timeout(PATIENCE, lines.recv()).await.expect("it goes on").expect("for ever");
        assert!(line.starts_with(&format!("{} {id} ", 2 * seq - 1)), "{line}");
        // The organisation's own events come between those of jobs.
        program.client().pause("t", format!("incident {seq}"), None).await.unwrap();
        let line = timeout(PATIENCE, lines.recv()).await.expect("it goes on").expect("for ever");
        assert_eq!(line, format!("{} - job_type_paused", 2 * seq));
        program.kill();
        program = Program::start_on(&address, &database);
    }
    assert!(program.end_by("TERM").success());
}
