//! Digests the files under a path, as jobs of a jobledger server.
//!
//! ```sh
//! cargo run --example digest_files -- ~/Pictures
//! ```
//!
//! Each regular file becomes one job. Its idempotency key is made from the path and the modification time, so a second
//! run over an unchanged tree finds all jobs done. A few tasks run the jobs. They get them by a channel of this
//! process, not by claims: each task reads a file in chunks, computes its SHA-256, reports stages and progress, and
//! stores the digest as the result. A subscription to the server's events drives the progress bars. At the end the
//! server's statistics must equal what this process has done.

use std::{
    collections::HashMap,
    error::Error,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use clap::Parser;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use jobledger_client::{
    Client, Follow, Item, JobEvent, JobEventKind, JobStatus, NewJob, Report, StatusCounts, shutdown_signal,
};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
};

const JOB_TYPE: &str = "digest_file";
/// Concurrent creates. The server commits creates that arrive together in one batch.
const CREATORS: usize = 64;
/// Files that are found ahead of the work, so that the progress bar knows the total early.
const FOUND_AHEAD: usize = 100_000;
const CHUNK: usize = 1 << 20;
/// Failures that are listed at the end.
const FAILURES_LISTED: usize = 10;
/// Timeout of calls, long enough for a restart of the server.
const PATIENCE: Duration = Duration::from_secs(120);

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Digests the files under a path, as jobs of a jobledger server.
#[derive(Parser)]
struct Args {
    /// A directory, or a single file.
    path: PathBuf,
    /// URL of the server.
    #[arg(long, env = "JOBLEDGER_SERVER", default_value = "http://127.0.0.1:50051")]
    server: String,
    /// Number of files to digest at the same time.
    #[arg(long, default_value_t = 8)]
    workers: usize,
}

struct Found {
    path: PathBuf,
    size: u64,
    modified: SystemTime,
}

struct Work {
    job_id: String,
    file: Found,
}

/// Counts of this run.
#[derive(Default)]
struct Tally {
    succeeded: i64,
    failed: i64,
    /// Files whose jobs succeeded in an earlier run.
    known: i64,
    /// Files whose jobs failed in an earlier run.
    known_failed: i64,
    bytes: u64,
    /// The first [`FAILURES_LISTED`] failures of this run.
    failures: Vec<String>,
}

/// Counts of this run from the server's events.
#[derive(Default, Clone, Copy)]
struct Seen {
    created: i64,
    succeeded: i64,
    failed: i64,
    through: i64,
}

/// Timeout of the first call, so that a missing server is reported soon. Later calls have [`PATIENCE`].
const FIRST_CALL: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    let done = async {
        tokio::select! {
            done = run(Args::parse()) => done,
            () = shutdown_signal()? => Err("interrupted; run it again to go on".into()),
        }
    };
    match done.await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("digest_files: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<ExitCode> {
    let root = args.path.canonicalize().map_err(|error| format!("{}: {error}", args.path.display()))?;
    let client = Client::builder(args.server.as_str()).timeout(PATIENCE).build()?;

    let probe = Client::builder(args.server.as_str()).timeout(FIRST_CALL).build()?;
    let before = probe.statistics(&[JOB_TYPE]).await;
    let before =
        before.map_err(|error| format!("no server at {}: {error}\nstart one with `cargo run`", args.server))?;
    let display = Display::new();
    let names = Arc::new(Mutex::new(HashMap::new()));
    let (seen_sender, mut seen) = watch::channel(Seen::default());
    let events = client.subscribe(Follow::org().after(before.as_of_seq)).await?;
    let watching = tokio::spawn(watch_events(events, display.clone(), Arc::clone(&names), seen_sender));

    // Files → jobs → results. The channels are bounded, so each step waits for the next one.
    let (files, found) = mpsc::channel(FOUND_AHEAD);
    let (jobs, work) = mpsc::channel(CREATORS);
    let tally = Arc::new(Mutex::new(Tally::default()));
    let walking = spawn_blocking({
        let display = display.clone();
        move || walk(&root, &files, &display)
    });
    let mut tasks = JoinSet::new();
    let found = Arc::new(tokio::sync::Mutex::new(found));
    for _ in 0..CREATORS {
        let (client, jobs, tally) = (client.clone(), jobs.clone(), Arc::clone(&tally));
        tasks.spawn(create(client, Arc::clone(&found), jobs, tally, Arc::clone(&names), display.clone()));
    }
    drop(jobs);
    let work = Arc::new(tokio::sync::Mutex::new(work));
    for _ in 0..args.workers.max(1) {
        tasks.spawn(digest_files(client.clone(), Arc::clone(&work), Arc::clone(&tally)));
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    let skipped = walking.await?;

    // The events between the first statistics and these explain the difference of their counts.
    let after = client.statistics(&[JOB_TYPE]).await?;
    let seen = *seen.wait_for(|seen| seen.through >= after.as_of_seq).await?;
    watching.abort();
    display.finish();

    let tally = std::mem::take(&mut *tally.lock().expect("no task panicked"));
    let (before, now) = (before.counts.unwrap_or_default(), after.counts.unwrap_or_default());
    let Tally { succeeded, failed, known, known_failed, bytes, .. } = tally;
    let files = succeeded + failed + known + known_failed;
    println!("{files} files: {succeeded} digested ({}), {failed} failed, {known} already digested", HumanBytes(bytes));
    if known_failed > 0 {
        println!("{known_failed} more failed in an earlier run; they are retried once the file changes");
    }
    if files == 0 {
        println!("{} holds no regular file", args.path.display());
    }
    for failure in &tally.failures {
        println!("failed {failure}");
    }
    for (path, error) in skipped {
        println!("skipped {}: {error}", path.display());
    }
    println!(
        "server, as of seq {}: {} jobs, {} queued, {} running, {} succeeded, {} failed",
        after.as_of_seq,
        total(&now),
        now.queued,
        now.running,
        now.succeeded,
        now.failed
    );
    let checks = [
        ("created", total(&now) - total(&before), seen.created),
        ("succeeded", now.succeeded - before.succeeded, tally.succeeded),
        ("failed", now.failed - before.failed, tally.failed),
        ("succeeded, by its events", seen.succeeded, tally.succeeded),
        ("failed, by its events", seen.failed, tally.failed),
    ];
    let wrong: Vec<_> = checks.iter().filter(|(_, server, here)| server != here).collect();
    for (what, server, here) in &wrong {
        println!("MISMATCH: {what}: {server} on the server, {here} here");
    }
    if wrong.is_empty() {
        println!("the server's statistics match the processed files");
        Ok(ExitCode::SUCCESS)
    } else {
        Ok(ExitCode::FAILURE)
    }
}

fn total(counts: &StatusCounts) -> i64 {
    counts.queued + counts.running + counts.succeeded + counts.failed + counts.canceled + counts.dead_letter
}

/// Sends the regular files under a path. Returns the paths that could not be read.
fn walk(root: &Path, files: &mpsc::Sender<Found>, display: &Display) -> Vec<(PathBuf, io::Error)> {
    let mut skipped = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let step = (|| -> io::Result<()> {
            // Links are not followed: a link is not a regular file, and a link to a directory may form a cycle.
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                let mut entries = fs::read_dir(&path)?
                    .map(|entry| entry.map(|entry| entry.path()))
                    .collect::<io::Result<Vec<_>>>()?;
                entries.sort_unstable_by(|a, b| b.cmp(a));
                pending.append(&mut entries);
            } else if metadata.is_file() {
                display.found();
                let found = Found { path: path.clone(), size: metadata.len(), modified: metadata.modified()? };
                // If the receiver is gone, a task has failed, and its error is reported.
                let _ = files.blocking_send(found);
            }
            Ok(())
        })();
        if let Err(error) = step {
            skipped.push((path, error));
        }
    }
    skipped
}

/// Creates a job per file, and passes on the jobs that are not finished.
async fn create(
    client: Client,
    found: Arc<tokio::sync::Mutex<mpsc::Receiver<Found>>>,
    jobs: mpsc::Sender<Work>,
    tally: Arc<Mutex<Tally>>,
    names: Arc<Mutex<HashMap<String, String>>>,
    display: Display,
) -> Result<()> {
    loop {
        let Some(file) = found.lock().await.recv().await else {
            return Ok(());
        };
        let job = NewJob::new(JOB_TYPE)
            .payload(&json!({"path": file.path.to_string_lossy(), "size": file.size}))?
            .idempotency_key(key(&file)?)
            .requested_by("digest_files");
        let created = client.create(job).await?;
        // An unfinished job of an interrupted run is run again.
        if created.deduplicated && !matches!(created.job.status(), JobStatus::Queued | JobStatus::Running) {
            let mut tally = tally.lock().expect("no task panicked");
            match created.job.status() {
                JobStatus::Succeeded => tally.known += 1,
                _ => tally.known_failed += 1,
            }
            display.done();
            continue;
        }
        let name = file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        names.lock().expect("no task panicked").insert(created.job.id.clone(), name);
        let _ = jobs.send(Work { job_id: created.job.id, file }).await;
    }
}

/// An idempotency key of bounded length that depends on the path and the modification time.
fn key(file: &Found) -> Result<String> {
    let modified = file.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut hasher = Sha256::new();
    hasher.update(file.path.as_os_str().as_encoded_bytes());
    hasher.update(modified.as_nanos().to_le_bytes());
    Ok(format!("digest_file:{}", hex(&hasher.finalize())))
}

/// Runs jobs one after the other.
async fn digest_files(
    client: Client,
    work: Arc<tokio::sync::Mutex<mpsc::Receiver<Work>>>,
    tally: Arc<Mutex<Tally>>,
) -> Result<()> {
    loop {
        let Some(Work { job_id, file }) = work.lock().await.recv().await else {
            return Ok(());
        };
        let started = client.update(Report::start(&job_id).stage("opening")).await;
        started.map_err(|error| format!("{}: {error} (is another run working on it?)", file.path.display()))?;
        match digest(&client, &job_id, &file).await {
            Ok((sha256, bytes)) => {
                let report = Report::succeeded(&job_id).percent(100);
                client.update(report.result(&json!({"sha256": sha256, "bytes": bytes}))?).await?;
                let mut tally = tally.lock().expect("no task panicked");
                tally.succeeded += 1;
                tally.bytes += bytes;
            }
            Err(DigestError::File(error)) => {
                client.update(Report::failed(&job_id, code(&error), error.to_string()).permanent()).await?;
                let mut tally = tally.lock().expect("no task panicked");
                tally.failed += 1;
                if tally.failures.len() < FAILURES_LISTED {
                    tally.failures.push(format!("{}: {error}", file.path.display()));
                }
            }
            Err(DigestError::Report(error)) => return Err(error.into()),
        }
    }
}

enum DigestError {
    File(io::Error),
    Report(jobledger_client::Error),
}

fn code(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "FILE_VANISHED",
        io::ErrorKind::PermissionDenied => "PERMISSION_DENIED",
        _ => "UNREADABLE",
    }
}

/// Reads a file in chunks, and reports progress in steps of 10 %.
async fn digest(client: &Client, job_id: &str, file: &Found) -> Result<(String, u64), DigestError> {
    let path = file.path.clone();
    let opening = spawn_blocking(move || File::open(path));
    let mut open = opening.await.expect("reading does not panic").map_err(DigestError::File)?;
    let report = |report: Report| async { client.update(report).await.map_err(DigestError::Report) };
    report(Report::progress(job_id).stage("hashing").percent(0)).await?;
    let (mut hasher, mut read, mut reported) = (Sha256::new(), 0, 0);
    let mut buffer = vec![0; CHUNK];
    loop {
        let step = spawn_blocking(move || {
            let n = open.read(&mut buffer)?;
            hasher.update(&buffer[..n]);
            io::Result::Ok((open, hasher, buffer, n as u64))
        });
        let n;
        (open, hasher, buffer, n) = step.await.expect("reading does not panic").map_err(DigestError::File)?;
        if n == 0 {
            return Ok((hex(&hasher.finalize()), read));
        }
        read += n;
        let percent = (read * 100).checked_div(file.size).unwrap_or(100).min(99) as i32;
        if percent >= reported + 10 && read < file.size {
            report(Report::progress(job_id).percent(percent)).await?;
            reported = percent;
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Counts and displays the events of this example's jobs.
async fn watch_events(
    mut events: jobledger_client::Subscription,
    display: Display,
    names: Arc<Mutex<HashMap<String, String>>>,
    seen: watch::Sender<Seen>,
) {
    while let Some(item) = events.next().await {
        match item {
            Ok(Item::Event(event)) => {
                if event.job_type == JOB_TYPE {
                    let name = names.lock().expect("no task panicked").get(&event.job_id).cloned();
                    display.show(&event, &name.unwrap_or_default());
                }
                seen.send_modify(|seen| {
                    seen.through = event.seq;
                    if event.job_type == JOB_TYPE {
                        seen.created += i64::from(event.kind() == JobEventKind::Created);
                        seen.succeeded += i64::from(event.kind() == JobEventKind::Succeeded);
                        seen.failed += i64::from(event.kind() == JobEventKind::Failed);
                    }
                });
            }
            Ok(Item::Bookmark(bookmark)) => seen.send_modify(|seen| seen.through = bookmark.seq),
            Ok(_) => {}
            Err(error) => {
                eprintln!("the subscription ended: {error}");
                return;
            }
        }
    }
}

/// The progress bars: one for all files, and one per running job.
#[derive(Clone)]
struct Display {
    bars: MultiProgress,
    whole: ProgressBar,
    running: Arc<Mutex<HashMap<String, ProgressBar>>>,
}

impl Display {
    fn new() -> Self {
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template(
            "{elapsed_precise} [{wide_bar}] {human_pos}/{human_len} files, {per_sec}, ETA {eta}",
        );
        let whole = bars.add(ProgressBar::new(0).with_style(style.expect("a valid template")));
        Self { bars, whole, running: Arc::default() }
    }

    fn found(&self) {
        self.whole.inc_length(1);
    }

    fn done(&self) {
        self.whole.inc(1);
    }

    fn show(&self, event: &JobEvent, name: &str) {
        let mut running = self.running.lock().expect("no task panicked");
        if event.next_status() == JobStatus::Running {
            let bar = running.entry(event.job_id.clone()).or_insert_with(|| {
                let style = ProgressStyle::with_template("  {bar:20} {percent:>3}% {msg}").expect("a valid template");
                self.bars.insert_before(&self.whole, ProgressBar::new(100).with_style(style))
            });
            bar.set_position(u64::try_from(event.progress()).unwrap_or_default());
            bar.set_message(format!("{:8} {name}", event.stage()));
        } else if let Some(bar) = running.remove(&event.job_id) {
            bar.finish_and_clear();
            self.bars.remove(&bar);
            self.done();
        }
    }

    fn finish(&self) {
        self.whole.finish_and_clear();
    }
}
