//! docs/start.md, followed as it stands in an empty directory: its commands, its SQL, its worker. Skipped without openssl.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use jobledger_client::{Client, Token, proto::ListJobsRequest};
use sqlx::{AssertSqlSafe, Executor as _};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::{
    program::example::example,
    program::grpcurl::grpcurl,
    support::cluster::{Cluster, Durability, environment},
    support::harness::{PATIENCE, fixed_address, root},
    support::program::command,
};

/// A block of the page, and its language.
struct Block {
    language: String,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let fenced = page.split("\n```").skip(1).step_by(2);
    let block = |fenced: &str| {
        let (language, text) = fenced.split_once('\n').expect("a language and a text");
        Block { language: language.to_owned(), text: format!("{text}\n") }
    };
    fenced.map(block).collect()
}

/// A started command, which is killed when its test ends.
struct Running(Child);

impl Running {
    fn end(mut self) {
        let ended = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        assert!(ended.expect("kill runs").success());
        assert!(self.0.wait().expect("it ends").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A shell in the directory, with what earlier blocks have exported.
struct Shell<'a> {
    folder: &'a Path,
    exports: String,
    /// Texts of the page, and what replaces them on this machine.
    names: Vec<(String, String)>,
}

impl Shell<'_> {
    fn script(&self, text: &str) -> String {
        let text = self.names.iter().fold(text.to_owned(), |text, (name, here)| text.replace(name, here));
        format!("set -e\numask 077\n{}{text}", self.exports)
    }

    fn command(&self, script: &str) -> Command {
        let path = format!("{}:{}", self.folder.join("bin").display(), environment("PATH").unwrap_or_default());
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).current_dir(self.folder).env("PATH", path).stdin(Stdio::null());
        shell
    }

    /// Runs a block to its end. Returns its standard output.
    fn run(&mut self, text: &str) -> String {
        let script = self.script(text);
        let done = self.command(&script).output().expect("sh runs");
        assert!(done.status.success(), "{script}\n{}", String::from_utf8_lossy(&done.stderr));
        let exports = text.lines().filter(|line| line.starts_with("export "));
        for line in exports {
            self.exports += &self.names.iter().fold(format!("{line}\n"), |line, (name, here)| line.replace(name, here));
        }
        String::from_utf8(done.stdout).expect("it prints text")
    }

    /// Starts a block whose last command keeps running.
    fn start(&self, text: &str) -> Running {
        // Signals must reach the command, not a shell around it.
        let stays = format!("\n{text}")
            .replace("\njobledger serve", "\nexec jobledger serve")
            .replace("\ncargo run", "\nexec cargo-run");
        let script = self.script(&stays);
        Running(self.command(&script).stdout(Stdio::piped()).spawn().expect("sh runs"))
    }
}

/// The options that a command on the page gives to the program.
fn options(text: &str) -> impl Iterator<Item = &str> {
    text.split_whitespace().filter(|word| word.starts_with("--"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_leads_from_nothing_to_a_worker() {
    if Command::new("openssl").arg("version").output().is_err() {
        println!("openssl is not installed");
        return;
    }
    let page = fs::read_to_string(root().join("docs/start.md")).expect("the page is there");
    let worker = fs::read_to_string(root().join("client/examples/thumbnails.rs")).expect("the example is there");
    let blocks = blocks(&page);
    let of = |language: &'static str| {
        blocks.iter().filter(move |block| block.language == language).map(|block| &*block.text)
    };
    let shown = of("rust").next().expect("the page has a worker");
    assert!(worker.ends_with(&format!("\n\n{shown}")), "client/examples/thumbnails.rs is the page's worker");

    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::alone(Durability::None).await));
    let folder = TempDir::new().expect("a temporary directory");
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let link = |name: &str, to: &Path| std::os::unix::fs::symlink(to, bin.join(name)).unwrap();
    link("jobledger", Path::new(command(&[]).get_program()));
    link("grpcurl", Path::new(&grpcurl()));
    link("cargo-run", &example("thumbnails"));
    let (address, socket) = (fixed_address(), cluster.socket());
    let (_, port) = address.split_once(':').expect("a port");
    let here = [
        ("@db.example.com/ledger?sslmode=prefer", format!("@localhost/ledger?host={}", socket.display())),
        ("0.0.0.0:50051", address.clone()),
        ("jobs.example.com:50051", format!("localhost:{port}")),
        ("jobs.example.com", "localhost".to_owned()),
    ];
    let names = here.map(|(name, here)| (name.to_owned(), here)).to_vec();
    let mut shell = Shell { folder: folder.path(), exports: String::new(), names };

    let mut admin = cluster.connect("postgres", "postgres").await;
    for statement in of("sql").flat_map(|sql| sql.split_inclusive(";\n")) {
        admin.execute(AssertSqlSafe(statement.to_owned())).await.expect("a superuser may");
    }
    let (mut served, mut working) = (None, None);
    let mut printed = BTreeMap::new();
    for text in of("sh").filter(|text| !text.contains("cargo install")) {
        if text.contains("jobledger serve") {
            let mut server = shell.start(text);
            let mut line = String::new();
            BufReader::new(server.0.stdout.take().expect("a pipe")).read_line(&mut line).expect("it prints");
            assert_eq!(line, format!("listening on {address}\n"));
            served = Some(server);
        } else if text.contains("cargo run") {
            working = Some(shell.start(text));
        } else {
            if text.contains("GetStatistics") {
                until_it_is_done(folder.path(), port).await;
            }
            printed.insert(printed.len(), shell.run(text));
        }
    }
    let last = printed.into_values().last().expect("something is printed");
    assert!(last.contains(r#""succeeded": "1""#), "{last}");
    let (served, working) = (served.expect("a server"), working.expect("a worker"));
    working.end();
    served.end();

    let help = command(&["serve", "--help"]).output().expect("the program runs").stdout;
    let help = String::from_utf8(help).expect("it prints text");
    let unit = of("ini").next().expect("the page has a unit");
    for option in options(unit) {
        assert!(help.contains(&format!("{option} ")) || help.contains(&format!("{option}\n")), "{option}");
    }
}

/// Waits until the page's only job has ended.
async fn until_it_is_done(folder: &Path, port: &str) {
    let read = |name: &str| fs::read_to_string(folder.join(name)).expect("the page has made it");
    let token = Token::new(read("observer.token").trim()).unwrap();
    let client = Client::builder(format!("https://localhost:{port}")).ca(read("ca.pem")).token(token).build().unwrap();
    let done = async {
        let page = client.list(ListJobsRequest::default()).await.unwrap();
        client.wait_for(&page.jobs[0].id).await.expect("it ends");
    };
    timeout(PATIENCE, done).await.expect("the worker works");
}
