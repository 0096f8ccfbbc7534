//! Standard output and standard error in any state: no call waits for them, and no command ends because of them.

use std::{
    fs::OpenOptions,
    io::{PipeReader, Read as _, Write as _, pipe},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use jobledger_client::{Client, NewJob};

use crate::{
    legacy::database::LegacyDatabase,
    support::harness::{Database, PATIENCE, fixed_address},
    support::program::command,
};

/// The capacity of a pipe on Linux. Other systems' pipes hold a little more.
const PIPE: usize = 64 << 10;

/// A state of standard output or standard error.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Output {
    /// A full pipe that nobody reads.
    Full,
    /// A pipe without a reader.
    Broken,
    /// A file on a full disk.
    NoSpace,
}

pub(crate) const OUTPUTS: [Output; 3] = [Output::Full, Output::Broken, Output::NoSpace];

impl Output {
    /// Opens it for a process. The pipe stays in its state as long as the reader lives.
    pub(crate) fn open(self) -> (Stdio, Option<PipeReader>) {
        match self {
            Self::Full => {
                let (reader, mut writer) = pipe().unwrap();
                writer.write_all(&vec![b'\n'; PIPE]).unwrap();
                (writer.into(), Some(reader))
            }
            Self::Broken => (pipe().unwrap().1.into(), None),
            Self::NoSpace => (OpenOptions::new().write(true).open("/dev/full").unwrap().into(), None),
        }
    }
}

/// A process that is killed when its test ends.
struct Started(Child);

impl Started {
    fn new(arguments: &[&str], stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Self {
        Self::run(command(arguments).stdout(stdout).stderr(stderr))
    }

    fn run(command: &mut Command) -> Self {
        Self(command.spawn().expect("the program starts"))
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    fn end(mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    fn terminate(self) -> ExitStatus {
        assert!(Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().unwrap().success());
        self.end()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client of a server whose output may not say that it listens.
async fn client(address: &str) -> Client {
    let client = Client::builder(format!("http://{address}")).timeout(PATIENCE).build().unwrap();
    let until = Instant::now() + PATIENCE;
    while tokio::net::TcpStream::connect(address).await.is_err() {
        assert!(Instant::now() < until, "nobody listens on {address}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_stops_no_call_and_its_lines_are_counted() {
    for format in ["text", "json"] {
        let database = Database::sqlite();
        let (address, url) = (fixed_address(), database.url());
        let (mut reader, writer) = pipe().unwrap();
        let arguments =
            ["--listen", &address, "--database-url", &url, "--log", "trace,h2=trace", "--log-format", format];
        let process = Started::new(&arguments, Stdio::null(), writer);
        let client = client(&address).await;
        // More than the pipe and the program have room for.
        for _ in 0..300 {
            let jobs = (0..200).map(|_| NewJob::new("t")).collect::<Vec<_>>();
            for created in client.create_all(jobs).await.unwrap() {
                created.unwrap();
            }
        }
        // Somebody reads again. Where lines are missing, the log says so.
        let reading = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        while client.create(NewJob::new("t")).await.is_ok() && !reading.is_finished() {
            if client.statistics(&[]).await.unwrap().as_of_seq >= 60_100 {
                break;
            }
        }
        assert!(process.terminate().success());
        let text = reading.join().unwrap().unwrap();
        let notices: Vec<_> = text.lines().filter(|line| line.contains("log lines were dropped")).collect();
        assert!(!notices.is_empty(), "{} bytes were said, and nothing of what is missing", text.len());
        assert!(text.lines().last().unwrap().contains("stopped"), "what came last is there");
        if format == "json" {
            for line in text.lines() {
                serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            }
            let notice: serde_json::Value = serde_json::from_str(notices[0]).unwrap();
            assert!(notice["fields"]["lines"].as_u64().unwrap() > 0 && notice["level"] == "WARN", "{notice}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_serves_and_stops_whatever_its_output_is() {
    for output in OUTPUTS {
        let what = format!("{output:?}");
        let (database, address) = (Database::sqlite(), fixed_address());
        let ((stdout, _out), (stderr, _err)) = (output.open(), output.open());
        let arguments = ["--listen", &address, "--database-url", &database.url(), "--log", "debug"];
        let process = Started::new(&arguments, stdout, stderr);
        client(&address).await.create(NewJob::new("t")).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(process.terminate().success(), "{what}");
    }
    // No standard streams at all.
    let database = Database::sqlite();
    let address = fixed_address();
    let served = command(&["--listen", &address, "--database-url", &database.url(), "--log", "debug"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"exec "$0" "$@" <&- >&- 2>&-"#]).arg(served.get_program()).args(served.get_args());
    let process = Started::run(&mut shell);
    client(&address).await.create(NewJob::new("t")).await.unwrap();
    assert!(process.terminate().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_come_to_their_end_whatever_standard_error_is() {
    let database = Database::sqlite();
    database.open().await.close().await;
    let url = database.url();
    let tree = tempfile::TempDir::new().unwrap();
    std::fs::write(tree.path().join("file"), "x").unwrap();
    let tree = tree.path().to_str().unwrap();
    let old = LegacyDatabase::with_rows(50).await;
    let file = |name: &str| format!("{}/{name}", database.path().parent().unwrap().display());
    for output in OUTPUTS {
        let (copy, refused) = (file(&format!("{output:?}")), file("refused"));
        let (old, verify) = (old.url(), ["verify", "--database-url", &url]);
        let import = ["import", "--from", &old, "--database-url", &url, "--refused", &refused];
        let token = ["token", "create", "--operator", "--database-url", &url];
        let export = ["export", "--legacy", "--database-url", &url];
        let commands: [(&[&str], i32); 8] = [
            (&verify, 0),
            (&import, 0),
            (&token, 0),
            (&export, 0),
            (&["backup", &copy, "--database-url", &url], 0),
            (&["migrate", "status", "--database-url", &url], 0),
            (&["demo", tree], 0),
            (&["verify", "--database-url", "sqlite:///nonexistent/x.db"], 2),
        ];
        for (arguments, expected) in commands {
            let (stderr, _kept) = output.open();
            let process = Started::new(arguments, Stdio::null(), stderr);
            assert_eq!(process.end().code(), Some(expected), "{arguments:?}, stderr {output:?}");
        }
    }
}

#[test]
fn what_can_not_be_printed_is_an_error_and_no_panic() {
    let database = Database::sqlite();
    let url = database.url();
    std::fs::write(database.path(), "").unwrap();
    assert!(command(&["migrate", "up", "--database-url", &url]).output().unwrap().status.success());
    let copy = format!("{}/copy", database.path().parent().unwrap().display());
    for arguments in [
        &["verify", "--database-url", &url][..],
        &["renew-log-id", "--database-url", &url],
        &["token", "create", "--operator", "--database-url", &url],
        &["migrate", "status", "--database-url", &url],
        &["backup", &copy, "--database-url", &url],
        &["demo", "/proc/self/mem"],
    ] {
        let mut process = Started::new(arguments, Output::NoSpace.open().0, Stdio::piped());
        let mut said = String::new();
        process.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = process.end();
        assert!(matches!(status.code(), Some(1 | 2)), "{arguments:?}: {status}, {said}");
        assert!(said.contains("No space left on device") && !said.contains("panic"), "{arguments:?}: {said}");
    }
}

#[tokio::test]
async fn a_demo_whose_outcome_nobody_reads_ends_by_a_signal() {
    let database = Database::sqlite();
    let tree = tempfile::TempDir::new().unwrap();
    std::fs::write(tree.path().join("file"), "x").unwrap();
    let (stdout, _kept) = Output::Full.open();
    let arguments = ["demo", tree.path().to_str().unwrap(), "--database-url", &database.url()];
    let process = Started::new(&arguments, stdout, Stdio::null());
    let is_closed = || !database.path().with_extension("db-wal").exists();
    let until = Instant::now() + PATIENCE;
    // The demo makes the file, does its work, and closes the file before it prints the outcome.
    while !database.path().exists() || is_closed() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    while !is_closed() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    process.terminate();
}
