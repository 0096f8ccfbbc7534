//! The program: arguments, messages, exit codes, signals.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Output, Stdio},
};

use jobledger_client::{Follow, NewJob};
use sqlx::Executor as _;

use crate::support::harness::Database;
use crate::support::program::{Program, command};

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the program starts")
}

/// Asserts that the program refuses to start. Returns its standard error.
#[track_caller]
fn refusal(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(!output.status.success());
    assert!(output.stdout.is_empty(), "it never said that it listens");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn help_names_every_option_with_its_default_and_variable() {
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    for text in [
        "--listen",
        "127.0.0.1:50051",
        "JOBLEDGER_LISTEN",
        "--database-url",
        "sqlite://jobledger.db",
        "JOBLEDGER_DATABASE_URL",
        "--log",
        "JOBLEDGER_LOG",
        "--log-format",
        "--shutdown-grace",
        "--max-batch",
        "--no-migrate",
        "--require-rls",
        "--retain-finished",
        "--write-connections",
        "--read-connections",
        "postgres://",
        "--legacy-http",
        "migrate",
        "import",
        "export",
    ] {
        assert!(help.contains(text), "{text} is missing in:\n{help}");
    }
    assert!(String::from_utf8(run(&["--version"]).stdout).unwrap().starts_with("jobledger "));
}

#[tokio::test]
async fn health_tells_by_its_exit_code_whether_a_server_is_ready() {
    let database = Database::sqlite();
    let server = Program::start(&database);
    let output = run(&["health", "--address", &server.address]);
    assert!(output.status.success() && output.stdout == b"ready\n", "{output:?}");
    let address = server.address.clone();
    assert!(server.end_by("TERM").success());
    let output = run(&["health", "--address", &address]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("does not answer"), "{said}");
}

#[test]
fn bad_arguments_are_explained_before_anything_is_opened() {
    for (arguments, expected) in [
        (vec!["--database-url", "mysql://x"], "expected sqlite://PATH"),
        (vec!["--database-url", "sqlite://:memory:"], "would lose acknowledged jobs"),
        (vec!["--max-batch", "0"], "not in 1..=4096"),
        (vec!["--database-url", "postgres://u:secret@h:x/d"], "not a PostgreSQL URL"),
        (vec!["--database-url", "postgresql+psycopg2://u:secret@h/d"], "expected sqlite://PATH"),
        (vec!["--database-url", "postgres://nobody@127.0.0.1:1/d"], "can't connect to PostgreSQL at 127.0.0.1"),
        (vec!["--retain-finished", "running=3d"], "is not a terminal status: expected"),
        (vec!["--retain-finished", "soon"], "\"soon\""),
        (vec!["--retain-finished", "0s"], "must be one second to a hundred years"),
        (vec!["--write-connections", "0"], "not in 1..=100"),
        (vec!["migrate"], "migrate <COMMAND>"),
        (vec!["--shutdown-grace", "18446744073709551615"], "must be 0s to 1h"),
        (vec!["--listen", "nowhere:x"], "(expected ADDR:PORT)"),
        (vec!["--log", "a=b=c"], "invalid log filter \"a=b=c\""),
        (vec!["--log", "chatty"], "\"chatty\" is neither a level"),
        (vec!["serv"], "unrecognized subcommand"),
    ] {
        let said = refusal(&arguments);
        assert!(said.contains(expected), "{arguments:?} said: {said}");
        assert!(!said.contains("secret"), "a password stays unsaid: {said}");
    }
}

#[test]
fn an_address_in_use_is_said_to_be_that() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let said = refusal(&["--listen", &address]);
    assert!(said.contains(&format!("can't listen on {address}: Address already in use")), "{said}");
    assert!(!said.contains("expected"), "{said}");
}

#[test]
fn only_what_serves_or_imports_makes_a_ledger() {
    let folder = tempfile::TempDir::new().unwrap();
    let id = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    for arguments in [
        &["token", "create", "--operator"][..],
        &["token", "list"],
        &["token", "revoke", id],
        &["verify"],
        &["backup", "copy"],
        &["renew-log-id"],
        &["confirm-clock"],
        &["export", "--legacy"],
        &["migrate", "up"],
        &["migrate", "status"],
        &["migrate", "down", "--yes"],
    ] {
        let output = command(arguments).current_dir(folder.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = format!("no database at {}/jobledger.db", folder.path().display());
        assert!(!output.status.success() && said.contains(&expected), "{arguments:?}: {said}");
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert!(left.is_empty(), "{arguments:?} leaves {left:?}");
    }
}

#[test]
fn a_second_server_on_the_same_file_is_refused() {
    let database = Database::sqlite();
    let first = Program::start(&database);
    let said = refusal(&["serve", "--listen", "127.0.0.1:0", "--database-url", &database.url()]);
    assert!(said.contains("is in use by another jobledger server"), "{said}");
    // The file is free again, however the first server ends.
    first.kill();
    assert!(Program::start(&database).end_by("INT").success());
}

#[tokio::test]
async fn a_file_of_a_newer_server_or_of_something_else_is_refused() {
    let database = Database::sqlite();
    Program::start(&database).kill();
    let newer = "INSERT INTO _sqlx_migrations SELECT 9999, 'newer', installed_on, success, checksum, 0 FROM _sqlx_migrations LIMIT 1";
    database.connect().await.execute(newer).await.unwrap();
    let said = refusal(&["--listen", "127.0.0.1:0", "--database-url", &database.url()]);
    assert!(said.contains("9999") && said.contains("newer jobledger"), "{said}");

    let database = Database::sqlite();
    std::fs::write(database.path(), "this is no database, but a text of some length".repeat(100)).unwrap();
    let said = refusal(&["--listen", "127.0.0.1:0", "--database-url", &database.url()]);
    assert!(said.contains("not a database"), "{said}");
    let said = refusal(&["--listen", "127.0.0.1:0", "--database-url", "sqlite:///nonexistent/x.db"]);
    assert!(said.contains("/nonexistent/x.db"), "{said}");
}

// Two threads: the client goes on while this test waits for the program's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_stop_it_cleanly_with_streams_open() {
    for signal in ["INT", "TERM"] {
        let database = Database::sqlite();
        let program = Program::start(&database);
        let client = program.client();
        client.create(NewJob::new("t")).await.unwrap();
        let _stream = client.subscribe(Follow::org()).await.unwrap();
        let started = std::time::Instant::now();
        assert!(program.end_by(signal).success());
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
        assert!(!database.path().with_extension("db-wal").exists(), "the database was closed");
    }
}

#[tokio::test]
async fn logs_are_json_on_request_and_hold_no_payload() {
    let database = Database::sqlite();
    let url = database.url();
    let arguments = ["--listen", "127.0.0.1:0", "--database-url", &url, "--log", "trace", "--log-format", "json"];
    let mut process = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stderr = process.stderr.take().unwrap();
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        BufReader::new(stderr).read_to_string(&mut text).map(|_| text).unwrap()
    });
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").unwrap();
    let client = jobledger_client::Client::new(format!("http://{address}")).unwrap();
    client.create(NewJob::new("t").payload("a-secret-of-the-caller").unwrap()).await.unwrap();
    // The program writes its last lines when it ends.
    assert!(Command::new("kill").args(["-TERM", &process.id().to_string()]).status().unwrap().success());
    process.wait().unwrap();
    let text = reading.join().unwrap();
    let ours: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .filter(|line: &serde_json::Value| {
            line["target"].as_str().is_some_and(|target| target.starts_with("jobledger"))
        })
        .collect();
    assert!(ours.iter().any(|line| line["fields"]["rpc"] == "/jobledger.v1.JobService/CreateJob"), "{ours:?}");
    assert!(!text.contains("a-secret-of-the-caller"), "not even at the most talkative level");
}
