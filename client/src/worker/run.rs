//! The main loop of a worker.
//!
//! Claims, heartbeats and reports have a thread and connections of their own. Handlers run on the caller's runtime. A
//! handler that computes without awaiting may block every thread of that runtime, and costs no job its lease.

use std::{future::Future, panic, pin::pin, sync::Arc, thread, time::Duration};

use jobledger_proto::v1::{ClaimJobsRequest, Lease};
use tokio::{
    runtime::{Builder, Handle},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::dispatcher;
use uuid::Uuid;

use super::{
    Worker,
    attempt::{LAST_WORDS, work_on},
    heartbeats::Keeper,
    reporter::{self, ReportQueue},
};
use crate::{Claim, Report, retry::Backoff, shutdown::in_runtime};

/// Jobs per claim, at most: the contract's limit.
const CLAIM_AT_ONCE: usize = 100;
/// After the shutdown grace, reports have this long to be accepted.
const LAST_REPORTS: Duration = Duration::from_secs(10);

/// State shared by all jobs of a worker.
pub(super) struct Shared {
    pub(super) worker: Worker,
    pub(super) keeper: Arc<Keeper>,
    pub(super) desk: ReportQueue,
    /// The caller's runtime, where handlers run.
    pub(super) handlers: Handle,
    /// Canceled when the shutdown grace is over.
    pub(super) out_of_time: CancellationToken,
}

/// Runs a worker until `shutdown` completes and its jobs have ended. Dropping the future stops thread and handlers.
pub(super) async fn run(worker: Worker, shutdown: impl Future<Output = ()>) -> Result<(), crate::Error> {
    let handlers = in_runtime()?;
    let (stop, abandoned) = (CancellationToken::new(), CancellationToken::new());
    let (done, ended) = oneshot::channel();
    let working = {
        let (stop, abandoned) = (stop.clone(), abandoned.clone());
        let logs = dispatcher::get_default(Clone::clone);
        let work = move || {
            dispatcher::with_default(&logs, || {
                let ended = on_own_thread(worker, handlers, stop, abandoned);
                // The caller may have dropped the future.
                let _ = done.send(ended);
            });
        };
        thread::Builder::new().name("jobledger-worker".to_owned()).spawn(work)
    };
    let working = working.map_err(|error| crate::Error::Runtime(format!("can't start a thread: {error}")))?;
    let _abandoned = abandoned.drop_guard();
    let mut ended = pin!(ended);
    let ended = tokio::select! {
        biased;
        ended = &mut ended => ended,
        () = shutdown => {
            stop.cancel();
            ended.await
        }
    };
    ended.unwrap_or_else(|_| match working.join() {
        // The thread ended without an answer: pass its panic on to the caller.
        Err(panic) => panic::resume_unwind(panic),
        Ok(()) => Err(crate::Error::Runtime("the worker's thread ended".to_owned())),
    })
}

fn on_own_thread(
    mut worker: Worker,
    handlers: Handle,
    stop: CancellationToken,
    abandoned: CancellationToken,
) -> Result<(), crate::Error> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| crate::Error::Runtime(format!("can't start a runtime: {error}")))?;
    runtime.block_on(async {
        // Connections belong to the runtime that makes them, so this thread needs its own.
        worker.client = worker.client.reconnected()?;
        tokio::select! {
            ended = work(worker, handlers, stop) => ended,
            () = abandoned.cancelled() => Ok(()),
        }
    })
}

async fn work(worker: Worker, handlers: Handle, stop: CancellationToken) -> Result<(), crate::Error> {
    let options = worker.options.clone();
    let (worker_id, concurrency) = (&options.worker_id, options.concurrency);
    let (types, endpoints) = (worker.handlers.keys().collect::<Vec<_>>(), worker.client.endpoints());
    tracing::info!(worker_id, ?types, ?endpoints, concurrency, "worker started");
    let keeper =
        Keeper::new(worker.client.clone(), options.worker_id.clone(), options.lease, options.progress_interval);
    let (desk, carry) = reporter::open(worker.client.clone());
    let out_of_time = CancellationToken::new();
    let shared = Arc::new(Shared { worker, keeper: Arc::clone(&keeper), desk, handlers, out_of_time });
    let work = async {
        let mut jobs = JoinSet::new();
        let ended = claim_and_start(&shared, &mut jobs, &stop).await;
        tracing::info!(jobs = shared.keeper.leases(), "stopped claiming; finishing running jobs");
        if timeout(options.shutdown_grace, finish(&mut jobs)).await.is_err() {
            tracing::warn!(jobs = jobs.len(), "the grace period is over; releasing the jobs that still run");
            shared.out_of_time.cancel();
            if timeout(LAST_WORDS + LAST_REPORTS, finish(&mut jobs)).await.is_err() {
                tracing::error!(jobs = jobs.len(), "could not release all jobs; their leases will expire");
            }
        }
        tracing::info!("worker stopped");
        ended
    };
    tokio::select! {
        ended = work => ended,
        () = keeper.run() => unreachable!("it keeps leases for as long as it is polled"),
        () = carry => unreachable!("the desk is open"),
    }
}

async fn finish(jobs: &mut JoinSet<()>) {
    while jobs.join_next().await.is_some() {}
}

/// Claims as many jobs as there are free slots, and starts them, until `stop`.
async fn claim_and_start(
    shared: &Arc<Shared>,
    jobs: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Result<(), crate::Error> {
    let options = &shared.worker.options;
    let room = Arc::new(Semaphore::new(options.concurrency.min(Semaphore::MAX_PERMITS)));
    let mut backoff = Backoff::default();
    // A claim keeps its id until it is answered. A retry then gets the jobs that an unanswered try has taken.
    let mut request_id = Uuid::now_v7();
    let mut has_claimed = false;
    loop {
        let mut permits = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            permits = take_room(&room) => permits,
        };
        while jobs.try_join_next().is_some() {}
        let claim: ClaimJobsRequest = Claim::new(&options.worker_id)
            .types(shared.worker.handlers.keys())
            .max_jobs(permits.len() as i32)
            .lease(options.lease)
            .wait(options.wait)
            .request_id(request_id)
            .version(&options.version)
            .host(&options.host)
            .into();
        // The same claim without a wait, to fetch the jobs that it may already have taken.
        let again = ClaimJobsRequest { wait: None, ..claim.clone() };
        let mut claim = pin!(shared.worker.client.claim(claim));
        let claimed = tokio::select! {
            biased;
            claimed = &mut claim => claimed,
            () = stop.cancelled() => {
                jobs.spawn(end_claim(Arc::clone(shared), again));
                return Ok(());
            }
        };
        match claimed {
            Ok(leases) => {
                backoff.reset();
                (request_id, has_claimed) = (Uuid::now_v7(), true);
                for (lease, permit) in leases.into_iter().zip(permits.drain(..)) {
                    jobs.spawn(work_on(Arc::clone(shared), lease, permit));
                }
            }
            Err(error) if is_for_good(&error, has_claimed) => return Err(error),
            Err(error) => {
                let wait = backoff.next(error.retry_after());
                tracing::warn!(%error, wait_ms = wait.as_millis() as u64, "can't claim jobs; trying again");
                tokio::select! {
                    () = stop.cancelled() => {
                        jobs.spawn(end_claim(Arc::clone(shared), again));
                        return Ok(());
                    }
                    () = sleep(wait) => {}
                }
            }
        }
    }
}

/// True of errors that waiting does not repair. Refused credentials and unknown calls count as permanent only before
/// the first answered claim: later a token may have expired, and may be replaced.
fn is_for_good(error: &crate::Error, has_claimed: bool) -> bool {
    use crate::Error;
    match error {
        Error::Unauthenticated { .. } | Error::PermissionDenied { .. } => !has_claimed,
        Error::Other { code: Code::Unimplemented, .. } => !has_claimed,
        Error::Unavailable { .. } | Error::DeadlineExceeded | Error::Exhausted { .. } => false,
        // A defect of the service or of a proxy. Another server may not have it.
        Error::Other { code, .. } => *code == Code::InvalidArgument,
        Error::InvalidRequest { .. }
        | Error::PayloadTooLarge { .. }
        | Error::JobNotFound { .. }
        | Error::KeyNotFound { .. }
        | Error::JobTypeNotFound { .. }
        | Error::BulkOperationNotFound { .. }
        | Error::TokenNotFound { .. }
        | Error::BulkOperationExists { .. }
        | Error::IdempotencyKeyReused { .. }
        | Error::InvalidTransition { .. }
        | Error::LeaseLost
        | Error::EtagMismatch { .. }
        | Error::CursorAhead { .. }
        | Error::CursorExpired { .. }
        | Error::EpochChanged { .. }
        | Error::OutOfOrder { .. }
        | Error::Json(_)
        | Error::Number { .. }
        | Error::Cursor(_)
        | Error::Token
        | Error::Endpoint(_)
        | Error::Runtime(_)
        | Error::Worker(_) => true,
    }
}

/// Waits for one free slot, and takes all free slots, up to the limit of a claim.
async fn take_room(room: &Arc<Semaphore>) -> Vec<OwnedSemaphorePermit> {
    let first = Arc::clone(room).acquire_owned().await.expect("it is never closed");
    let more = std::iter::from_fn(|| Arc::clone(room).try_acquire_owned().ok());
    std::iter::once(first).chain(more).take(CLAIM_AT_ONCE).collect()
}

/// Ends a claim that was not answered before the stop: repeats it until it is answered, and gives its jobs back.
async fn end_claim(shared: Arc<Shared>, claim: ClaimJobsRequest) {
    let mut backoff = Backoff::default();
    loop {
        match shared.worker.client.claim(claim.clone()).await {
            Ok(leases) => return give_back(&shared, leases).await,
            // If the claim had taken jobs, the repeated claim would have returned them, whatever the quota.
            Err(crate::Error::Exhausted { ref reason, .. }) if reason == "QUOTA_EXCEEDED" => return,
            Err(error) if error.is_transient() => sleep(backoff.next(error.retry_after())).await,
            Err(error) => return tracing::warn!(%error, "the last claim is refused"),
        }
    }
}

async fn give_back(shared: &Shared, leases: Vec<Lease>) {
    let mut reports = JoinSet::new();
    for lease in leases {
        let Some(job) = lease.job else { continue };
        let held = shared.keeper.hold(lease.lease_token);
        let (desk, report) = (shared.desk.clone(), Report::released(job.id).lease(held.lease_token()));
        reports.spawn(async move { desk.report(report.into(), &held).await });
    }
    let _ = timeout(LAST_REPORTS, reports.join_all()).await;
}
