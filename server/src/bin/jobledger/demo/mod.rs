//! `jobledger demo`: a server, workers and a subscriber in one process, over a real socket.
//!
//! Each regular file under a path becomes a job, whose key is made of path, modification time and size. Workers claim
//! the jobs, digest the files and report progress. A subscription to the server's events drives the display. In the end
//! the server's statistics must equal what was processed.

mod display;
mod files;

use std::{
    collections::HashSet,
    error::Error,
    fmt::Write as _,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use jobledger_client::{
    Client, Follow, Item, JobEventKind, JobStatus, NewJob, Statistics, StatusCounts, Subscription, shutdown_signal,
    worker::Worker,
};
use jobledger_server::{Config, InProcess, store::DatabaseUrl, telemetry};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, spawn_blocking},
};

use self::{
    display::Display,
    files::{FoundFiles, JOB_TYPE},
};
use crate::{cli::DemoArgs, terminal};

/// Jobs of one BatchCreateJobs call.
const CREATED_AT_ONCE: usize = 500;
/// Files that may be found ahead of the work, so that the total is known early.
const FOUND_AHEAD: usize = 100_000;
/// Failures listed at the end.
const FAILURES_LISTED: usize = 10;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

pub(crate) fn run(args: DemoArgs) -> Result<()> {
    terminal::block_on(show(args))
}

async fn show(args: DemoArgs) -> Result<()> {
    telemetry::init(&args.log, telemetry::LogFormat::Text)?;
    let mut interrupted = pin!(shutdown_signal()?);
    let root = args.path.canonicalize().map_err(|error| format!("{}: {error}", args.path.display()))?;
    let server = match &args.database_url {
        None => InProcess::start().await?,
        Some(DatabaseUrl::Postgres(_)) => return Err("the demo supports only SQLite: pass sqlite://PATH".into()),
        Some(url) => InProcess::start_with(Config::new(url.clone())).await?,
    };
    let client = Client::new(server.endpoint())?;
    let (stop_worker, worker_stopped) = oneshot::channel::<()>();
    let worker = Worker::builder(client.clone())
        .handle(JOB_TYPE, files::digest)
        .concurrency(args.workers.into())
        .worker_id("demo")
        .shutdown_grace(Duration::from_secs(2))
        .build()?;
    let working = tokio::spawn(worker.run(async {
        let _ = worker_stopped.await;
    }));
    let mut working = working;
    let done = tokio::select! {
        done = work(&client, root, &args) => done,
        ended = &mut working => Err(format!("the worker stopped: {ended:?}").into()),
        () = &mut interrupted => Err("interrupted; finished jobs are kept if --database-url was given".into()),
    };
    // Once the worker has stopped, no job changes.
    drop(stop_worker);
    if !working.is_finished() {
        working.await??;
    }
    let shown = match done {
        Ok(done) => done.conclude(&client, &args).await,
        Err(error) => Err(error),
    };
    server.stop().await?;
    let (shown, verdict) = shown?;
    tokio::select! {
        printed = terminal::print(shown) => printed?,
        () = interrupted => {}
    }
    verdict
}

/// What the subscription has seen of this run.
#[derive(Default)]
struct Seen {
    ours: HashSet<String>,
    /// Jobs that succeeded, and jobs that failed, since the run began.
    succeeded: HashSet<String>,
    failed: HashSet<String>,
    failures: Vec<String>,
}

/// A run that has processed all files.
struct Done {
    before: Statistics,
    display: Display,
    seen: Arc<Mutex<Seen>>,
    through: watch::Receiver<i64>,
    watching: JoinHandle<Result<()>>,
    /// Jobs that an earlier run has completed.
    known: HashSet<String>,
    known_failed: i64,
    skipped: Vec<(PathBuf, String)>,
}

/// Creates a job for each file, and waits until all are done.
async fn work(client: &Client, root: PathBuf, args: &DemoArgs) -> Result<Done> {
    let before = client.statistics(&[JOB_TYPE]).await?;
    let display = Display::new();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let events = client.subscribe(Follow::org().after(before.as_of_seq).types([JOB_TYPE])).await?;
    let (through_sender, mut through) = watch::channel(before.as_of_seq);
    let watching = tokio::spawn(watch_events(events, display.clone(), Arc::clone(&seen), through_sender));

    let (files, mut found) = mpsc::channel(FOUND_AHEAD);
    let database = match &args.database_url {
        Some(DatabaseUrl::Sqlite(path)) => Some(PathBuf::from(path).canonicalize()?),
        _ => None,
    };
    let walking = spawn_blocking({
        let display = display.clone();
        let takes_all = args.all;
        move || files::walk(&root, database.as_deref().and_then(Path::to_str), takes_all, &files, &display)
    });
    let (mut known, mut known_failed) = (HashSet::new(), 0i64);
    let mut batch = Vec::with_capacity(CREATED_AT_ONCE);
    while found.recv_many(&mut batch, CREATED_AT_ONCE).await > 0 {
        let jobs = batch.drain(..).map(job).collect::<Result<Vec<_>>>()?;
        for created in client.create_all(jobs).await? {
            let created = created?;
            let is_done = !matches!(created.job.status(), JobStatus::Queued | JobStatus::Running);
            if !(created.deduplicated && is_done) {
                // New, or left behind by an earlier run.
                seen.lock().ours.insert(created.job.id);
            } else if created.job.status() == JobStatus::Succeeded {
                known.insert(created.job.id);
                display.known();
            } else {
                known_failed += 1;
                display.known();
            }
        }
    }
    let skipped = walking.await?;
    // Checked after each event, since it may have been the last one missing.
    through.wait_for(|_| seen.lock().is_done()).await?;
    Ok(Done { before, display, seen, through, watching, known, known_failed, skipped })
}

impl Done {
    /// The report of the run, and an error if the server's statistics differ from it.
    async fn conclude(self, client: &Client, args: &DemoArgs) -> Result<(String, Result<()>)> {
        let Self { before, display, seen, mut through, watching, known, known_failed, skipped } = self;
        // The difference to the first statistics is exactly the events up to this `seq`.
        let after = client.statistics(&[JOB_TYPE]).await?;
        through.wait_for(|through| *through >= after.as_of_seq).await?;
        watching.abort();
        display.finish();

        let seen = seen.lock();
        let of_ours = |ended: &HashSet<String>| seen.ours.intersection(ended).count() as i64;
        let (succeeded, failed) = (of_ours(&seen.succeeded), of_ours(&seen.failed));
        // A job left behind by an earlier run may have ended before its file was found.
        let known = known.len() as i64;
        let mut out = String::new();
        writeln!(
            out,
            "{} files: {succeeded} digested, {failed} failed, {known} already digested",
            succeeded + failed + known
        )?;
        if known_failed > 0 {
            println!("{known_failed} more failed in an earlier run; they are retried once the file changes");
        }
        if succeeded + failed + known + known_failed == 0 {
            writeln!(out, "{} holds no regular file", args.path.display())?;
        }
        for failure in &seen.failures {
            writeln!(out, "failed {failure}")?;
        }
        for (path, reason) in skipped {
            writeln!(out, "skipped {}: {reason}", path.display())?;
        }
        let (was, is) = (before.counts.unwrap_or_default(), after.counts.unwrap_or_default());
        writeln!(out, "server, as of seq {}: {}", after.as_of_seq, in_words(&is))?;
        let by_server = (is.succeeded - was.succeeded, is.failed + is.dead_letter - was.failed - was.dead_letter);
        if by_server != (seen.succeeded.len() as i64, seen.failed.len() as i64) {
            let differ = format!(
                "the server's statistics don't match the processed files: before the run they were {}",
                in_words(&was)
            );
            return Ok((out, Err(differ.into())));
        }
        writeln!(out, "the server's statistics match the processed files")?;
        Ok((out, Ok(())))
    }
}

fn job(file: FoundFiles) -> Result<NewJob> {
    let key = files::key(&file);
    // If a worker dies, another one takes its files over.
    Ok(NewJob::new(JOB_TYPE).payload(&file.task)?.idempotency_key(key).requested_by("demo").max_attempts(3))
}

impl Seen {
    fn is_done(&self) -> bool {
        self.ours.iter().all(|job| self.succeeded.contains(job) || self.failed.contains(job))
    }
}

async fn watch_events(
    mut events: Subscription,
    display: Display,
    seen: Arc<Mutex<Seen>>,
    through: watch::Sender<i64>,
) -> Result<()> {
    while let Some(item) = events.next().await {
        let seq = match item? {
            Item::Event(event) => {
                let mut seen = seen.lock();
                match event.kind() {
                    JobEventKind::Succeeded => {
                        seen.succeeded.insert(event.job_id.clone());
                    }
                    JobEventKind::Failed => {
                        seen.failed.insert(event.job_id.clone());
                        if seen.failures.len() < FAILURES_LISTED {
                            seen.failures.push(format!("{} ({})", event.error_message, event.error_code));
                        }
                    }
                    // The job failed, but will be tried again.
                    JobEventKind::RetryScheduled => {
                        seen.failed.remove(&event.job_id);
                    }
                    _ => {}
                }
                display.show(&event);
                event.seq
            }
            Item::Bookmark(bookmark) => bookmark.seq,
            _ => continue,
        };
        through.send_replace(seq);
    }
    Ok(())
}

fn in_words(counts: &StatusCounts) -> String {
    let StatusCounts { queued, running, succeeded, failed, canceled, dead_letter } = counts;
    let total = queued + running + succeeded + failed + canceled + dead_letter;
    let failed = failed + dead_letter;
    format!("{total} jobs, {queued} queued, {running} running, {succeeded} succeeded, {failed} failed")
}
