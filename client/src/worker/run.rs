//! A worker at work.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use jobledger_proto::v1::{ClaimJobsRequest, JobStatus, Lease, UpdateJobStatusRequest};
use prost::Message as _;
use prost_types::{Value, value::Kind};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use uuid::Uuid;

use super::{
    Context, Worker,
    error::{Error, HANDLER_FAILED, INVALID_RESULT, Kind as ErrorKind, PANIC},
    handler::Output,
    keeper::{Held, Keeper, Stop},
    reporter::{self, Desk},
};
use crate::{Claim, Report, request, retry::Backoff};

/// Jobs in one claim, at most.
const CLAIM_AT_ONCE: usize = 100;
/// What a result may take, encoded, and how deep it may nest.
const MAX_RESULT_BYTES: usize = 1 << 20;
const MAX_RESULT_DEPTH: usize = 32;
/// The longest wait that the contract takes.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(365 * 86_400);
/// A claim that is under way at a stop is waited for so long: what it brings is given back rather than left to its lease.
const LAST_CLAIM: Duration = Duration::from_secs(2);
/// A handler that is asked to stop at the end of the grace period has so long.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// After the grace period, reports have so long to be taken.
const LAST_REPORTS: Duration = Duration::from_secs(10);

/// What the jobs of a worker share.
struct Shared {
    worker: Worker,
    keeper: Arc<Keeper>,
    desk: Desk,
    /// The grace period of a stop is over.
    out_of_time: CancellationToken,
}

pub(super) async fn run(worker: Worker, shutdown: impl Future<Output = ()>) -> Result<(), crate::Error> {
    let options = worker.options.clone();
    let keeper =
        Keeper::new(worker.client.clone(), options.worker_id.clone(), options.lease, options.progress_interval);
    let (desk, carry) = reporter::open(worker.client.clone());
    let shared = Arc::new(Shared { worker, keeper: Arc::clone(&keeper), desk, out_of_time: CancellationToken::new() });
    let work = async {
        let mut jobs = JoinSet::new();
        let ended = claim_and_start(&shared, &mut jobs, shutdown).await;
        if timeout(options.shutdown_grace, finish(&mut jobs)).await.is_err() {
            tracing::warn!(jobs = jobs.len(), "the grace period is over; giving the jobs that are still running back");
            shared.out_of_time.cancel();
            if timeout(LAST_WORDS + LAST_REPORTS, finish(&mut jobs)).await.is_err() {
                tracing::error!(jobs = jobs.len(), "could not give all jobs back; their leases will end");
            }
        }
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

/// Claims as many jobs as there is room for, and starts them, until the shutdown.
async fn claim_and_start(
    shared: &Arc<Shared>,
    jobs: &mut JoinSet<()>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), crate::Error> {
    let options = &shared.worker.options;
    let room = Arc::new(Semaphore::new(options.concurrency.min(Semaphore::MAX_PERMITS)));
    let mut shutdown = pin!(shutdown);
    let mut backoff = Backoff::default();
    // Until it is answered a claim is the same, however long that takes: what it has taken meanwhile is still there for it.
    let mut request_id = Uuid::new_v4();
    let mut has_claimed = false;
    loop {
        let mut permits = tokio::select! {
            biased;
            () = &mut shutdown => return Ok(()),
            permits = take_room(&room) => permits,
        };
        while jobs.try_join_next().is_some() {}
        let claim: ClaimJobsRequest = Claim::new(&options.worker_id)
            .types(shared.worker.handlers.keys())
            .max_jobs(permits.len() as i32)
            .lease(options.lease)
            .wait(options.wait)
            .request_id(request_id)
            .into();
        let mut claim = pin!(shared.worker.client.claim(claim));
        let claimed = tokio::select! {
            biased;
            claimed = &mut claim => claimed,
            () = &mut shutdown => {
                if let Ok(Ok(leases)) = timeout(LAST_CLAIM, claim).await {
                    give_back(shared, leases).await;
                }
                return Ok(());
            }
        };
        match claimed {
            Ok(leases) => {
                backoff.reset();
                (request_id, has_claimed) = (Uuid::new_v4(), true);
                for (lease, permit) in leases.into_iter().zip(permits.drain(..)) {
                    jobs.spawn(work_on(Arc::clone(shared), lease, permit));
                }
            }
            Err(error) if is_for_good(&error, has_claimed) => return Err(error),
            Err(error) => {
                let wait = backoff.next(error.retry_after());
                tracing::warn!(%error, wait_ms = wait.as_millis() as u64, "can't claim jobs; trying again");
                tokio::select! {
                    () = &mut shutdown => return Ok(()),
                    () = sleep(wait) => {}
                }
            }
        }
    }
}

/// True of an error that waiting doesn't mend. What is refused because of who asks, or where, is taken for that only as long as
/// no claim was ever answered.
fn is_for_good(error: &crate::Error, has_claimed: bool) -> bool {
    match error {
        crate::Error::InvalidRequest { .. } | crate::Error::Other { code: Code::InvalidArgument, .. } => true,
        crate::Error::Other { code: Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented, .. } => {
            !has_claimed
        }
        _ => false,
    }
}

/// Waits for room for one job, and takes all that there is.
async fn take_room(room: &Arc<Semaphore>) -> Vec<OwnedSemaphorePermit> {
    let first = Arc::clone(room).acquire_owned().await.expect("it is never closed");
    let more = std::iter::from_fn(|| Arc::clone(room).try_acquire_owned().ok());
    std::iter::once(first).chain(more).take(CLAIM_AT_ONCE).collect()
}

async fn give_back(shared: &Shared, leases: Vec<Lease>) {
    let mut reports = JoinSet::new();
    for lease in leases {
        let Some(job) = lease.job else { continue };
        let (desk, report) = (shared.desk.clone(), Report::released(job.id).lease(lease.lease_token));
        reports.spawn(async move { desk.report(report.into()).await });
    }
    let _ = timeout(LAST_REPORTS, reports.join_all()).await;
}

/// A handler at work. Dropped, it is asked to stop, and dropped where it awaits.
struct Attempt<'a> {
    handler: JoinHandle<Output>,
    held: &'a Held,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.held.token().cancel();
        self.handler.abort();
    }
}

/// One attempt at one job, up to the point where the ledger knows what became of it.
async fn work_on(shared: Arc<Shared>, lease: Lease, _room: OwnedSemaphorePermit) {
    let Some(mut job) = lease.job else { return };
    let held = shared.keeper.hold(lease.lease_token);
    let handler = shared.worker.handlers.get(&job.r#type).cloned();
    let job_id = job.id.clone();
    let Some(handler) = handler else {
        // Not asked for.
        let back = Report::released(job_id).lease(held.lease_token());
        let _ = shared.desk.report(back.into()).await;
        return shared.keeper.let_go(&held);
    };
    let payload = job.payload.take();
    let context = Context::new(job.clone(), Arc::clone(&held));
    job.payload = payload;
    let attempt = Attempt { handler: tokio::spawn(handler.run(context, job)), held: &held };
    let ended = await_end(&shared, &held, attempt).await;
    if let Some(report) = outcome(&job_id, &held, ended) {
        settle(&shared, &held, &job_id, report).await;
    }
    shared.keeper.let_go(&held);
}

/// How the handler ended; `None`: it was asked to stop, did not in time, and was dropped.
async fn await_end(shared: &Shared, held: &Held, mut attempt: Attempt<'_>) -> Option<Result<Output, JoinError>> {
    let grace = tokio::select! {
        ended = &mut attempt.handler => return Some(ended),
        () = held.token().cancelled() => shared.worker.options.cancel_grace,
        () = shared.out_of_time.cancelled() => {
            held.stop(Stop::Shutdown);
            LAST_WORDS
        }
    };
    let patience = async {
        tokio::select! {
            () = sleep(grace) => {}
            () = shared.out_of_time.cancelled(), if grace > LAST_WORDS => sleep(LAST_WORDS).await,
        }
    };
    tokio::select! {
        ended = &mut attempt.handler => Some(ended),
        () = patience => None,
    }
}

/// The report on an attempt that ended so; `None` where there is nothing to report, since the job is others'.
fn outcome(job_id: &str, held: &Held, ended: Option<Result<Output, JoinError>>) -> Option<UpdateJobStatusRequest> {
    let ended = ended.map(|ended| {
        ended.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => Err(Error::new(panic_message(&*panic)).code(PANIC)),
            Err(error) => Err(Error::new(error)),
        })
    });
    let report = match (held.stopped(), ended) {
        (Some(Stop::Lost), _) => {
            tracing::warn!(job_id, "the lease is lost; what its handler did is discarded");
            return None;
        }
        (Some(Stop::Canceled), Some(Err(error))) if error.kind != ErrorKind::GiveBack => {
            let mut report: UpdateJobStatusRequest = Report::canceled(job_id).into();
            (report.error_code, report.error_message) = (error.code, error.message);
            report
        }
        (Some(Stop::Canceled), _) => Report::canceled(job_id).into(),
        (_, Some(Ok(result))) => succeeded(job_id, result),
        (Some(Stop::Shutdown), _) | (None, None) => Report::released(job_id).into(),
        (None, Some(Err(error))) => failed(job_id, error),
    };
    let news = held.take_news();
    Some(bounded(UpdateJobStatusRequest {
        stage: news.stage,
        progress: news.progress,
        message: news.message,
        lease_token: held.lease_token().to_owned(),
        ..report
    }))
}

fn succeeded(job_id: &str, result: Option<Value>) -> UpdateJobStatusRequest {
    let size = result.as_ref().map_or(0, Value::encoded_len);
    if result.as_ref().is_some_and(|result| !is_shallow(result, MAX_RESULT_DEPTH)) {
        let message = format!("the result nests lists and objects deeper than {MAX_RESULT_DEPTH}");
        return failed(job_id, Error::permanent(message).code(INVALID_RESULT));
    }
    if size > MAX_RESULT_BYTES {
        let message = format!("the result takes {size} bytes encoded; the limit is {MAX_RESULT_BYTES}");
        return failed(job_id, Error::permanent(message).code(INVALID_RESULT));
    }
    UpdateJobStatusRequest { result, ..Report::succeeded(job_id).into() }
}

/// True if a value nests lists and objects no deeper than this.
fn is_shallow(value: &Value, depth: usize) -> bool {
    match &value.kind {
        Some(Kind::ListValue(list)) => depth > 0 && list.values.iter().all(|value| is_shallow(value, depth - 1)),
        Some(Kind::StructValue(object)) => {
            depth > 0 && object.fields.values().all(|value| is_shallow(value, depth - 1))
        }
        _ => true,
    }
}

fn failed(job_id: &str, error: Error) -> UpdateJobStatusRequest {
    let retry_after = error.retry_after.map(|wait| request::duration(wait.min(LONGEST_RETRY_AFTER)));
    match error.kind {
        ErrorKind::GiveBack => UpdateJobStatusRequest { retry_after, ..Report::released(job_id).into() },
        ErrorKind::Retryable => {
            UpdateJobStatusRequest { retry_after, ..Report::failed(job_id, error.code, error.message).into() }
        }
        ErrorKind::Permanent => Report::failed(job_id, error.code, error.message).permanent().into(),
    }
}

/// What handlers say of errors, cut to what the contract takes.
fn bounded(mut report: UpdateJobStatusRequest) -> UpdateJobStatusRequest {
    const MAX_CODE_CHARS: usize = 100;
    const MAX_MESSAGE_BYTES: usize = 4 << 10;
    report.error_code = report.error_code.chars().filter(|c| *c != '\0').take(MAX_CODE_CHARS).collect();
    report.error_message.retain(|c| c != '\0');
    report.error_message.truncate(report.error_message.floor_char_boundary(MAX_MESSAGE_BYTES));
    report
}

/// Has the ledger take a report.
async fn settle(shared: &Shared, held: &Held, job_id: &str, report: UpdateJobStatusRequest) {
    let status = report.status();
    let error = match shared.desk.report(report).await {
        Ok(()) => return,
        Err(error @ (crate::Error::LeaseLost | crate::Error::JobNotFound { .. })) => {
            held.stop(Stop::Lost);
            return tracing::warn!(job_id, %error, "the lease was lost before the report; it is discarded");
        }
        Err(error) => error,
    };
    tracing::error!(job_id, %error, "the service refused a report; saying less");
    let bare = match status {
        // Only the result can be what it takes offence at.
        JobStatus::Succeeded => {
            failed(job_id, Error::permanent(format!("the result was refused: {error}")).code(INVALID_RESULT))
        }
        JobStatus::Queued => Report::released(job_id).into(),
        JobStatus::Canceled => Report::canceled(job_id).into(),
        _ => failed(job_id, Error::new(format!("the report was refused: {error}")).code(HANDLER_FAILED)),
    };
    let bare = bounded(UpdateJobStatusRequest { lease_token: held.lease_token().to_owned(), ..bare });
    if let Err(error) = shared.desk.report(bare).await {
        tracing::error!(job_id, %error, "the service refused that, too; the lease will end");
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", text.unwrap_or("without a message"))
}
