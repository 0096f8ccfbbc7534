//! One attempt at one job, until the ledger has accepted its outcome.

use std::{sync::Arc, time::Duration};

use jobledger_proto::v1::{Job, JobStatus, Lease, UpdateJobStatusRequest};
use prost::Message as _;
use prost_types::{Value, value::Kind};
use tokio::{
    sync::OwnedSemaphorePermit,
    task::{JoinError, JoinHandle},
    time::sleep,
};

use super::{
    Context,
    error::{Error, HANDLER_FAILED, INVALID_RESULT, Kind as ErrorKind, PANIC},
    handler::Output,
    heartbeats::{Held, Stop},
    reporter::is_about_report,
    run::Shared,
};
use crate::{Report, request};

/// Limits of the contract: encoded size of a result, and how deep its lists and objects nest.
const MAX_RESULT_BYTES: usize = 1 << 20;
const MAX_RESULT_DEPTH: usize = 32;
/// The contract's limit for `retry_after`.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(365 * 86_400);
/// How long a handler gets to stop after the worker's shutdown grace is over.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// A running handler. When dropped, it asks the handler to stop and aborts its task at the next `.await`.
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

/// Runs the handler of a claimed job, and reports the outcome.
pub(super) async fn work_on(shared: Arc<Shared>, lease: Lease, _room: OwnedSemaphorePermit) {
    let Some(mut job) = lease.job else { return };
    let held = shared.keeper.hold(lease.lease_token);
    let handler = shared.worker.handlers.get(&job.r#type).cloned();
    let Some(handler) = handler else {
        // No handler for this type, which the claim did not ask for: give the job back.
        let back = Report::released(job.id).lease(held.lease_token());
        let _ = shared.desk.report(back.into(), &held).await;
        return shared.keeper.let_go(&held);
    };
    let payload = job.payload.take();
    let context = Context::new(job.clone(), Arc::clone(&held));
    let input = Job { payload, ..job.clone() };
    let attempt = Attempt { handler: shared.handlers.spawn(handler.run(context, input)), held: &held };
    let ended = await_end(&shared, &held, attempt).await;
    if let Some(report) = outcome(&job, &held, ended) {
        settle(&shared, &held, &job.id, report).await;
    }
    shared.keeper.let_go(&held);
}

/// Waits for the handler's end. `None` if it was asked to stop, did not stop in time, and was dropped.
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

/// The report on the attempt. `None` if there is nothing to report, because the lease is lost.
fn outcome(job: &Job, held: &Held, ended: Option<Result<Output, JoinError>>) -> Option<UpdateJobStatusRequest> {
    let job_id = job.id.as_str();
    let ended = ended.and_then(|ended| match ended.map_err(JoinError::try_into_panic) {
        Ok(output) => Some(output),
        Err(Ok(panic)) => Some(Err(Error::new(panic_message(&*panic)).code(PANIC))),
        // The task was canceled because its runtime, and so the process, is shutting down.
        Err(Err(_)) => None,
    });
    let report = match (held.stopped(), ended) {
        (Some(Stop::Lost), _) => {
            tracing::warn!(job_id, "the lease is lost; the handler's result is discarded");
            return None;
        }
        (Some(Stop::Canceled), Some(Err(error))) if error.kind != ErrorKind::GiveBack => {
            let mut report: UpdateJobStatusRequest = Report::canceled(job_id).into();
            (report.error_code, report.error_message) = (error.code, error.message);
            report
        }
        (Some(Stop::Canceled), _) => Report::canceled(job_id).into(),
        (_, Some(Ok(result))) => match succeeded(job_id, result) {
            Ok(report) => report,
            Err(error) => failed(job, error),
        },
        (Some(Stop::Shutdown), _) | (None, None) => Report::released(job_id).into(),
        (None, Some(Err(error))) => failed(job, error),
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

/// The report on a success. An error if the service would refuse the result.
fn succeeded(job_id: &str, result: Option<Value>) -> Result<UpdateJobStatusRequest, Error> {
    let size = result.as_ref().map_or(0, Value::encoded_len);
    if result.as_ref().is_some_and(|result| !is_shallow(result, MAX_RESULT_DEPTH)) {
        let message = format!("the result nests lists and objects deeper than {MAX_RESULT_DEPTH}");
        return Err(Error::permanent(message).code(INVALID_RESULT));
    }
    if size > MAX_RESULT_BYTES {
        let message = format!("the result takes {size} bytes encoded; the limit is {MAX_RESULT_BYTES}");
        return Err(Error::permanent(message).code(INVALID_RESULT));
    }
    Ok(UpdateJobStatusRequest { result, ..Report::succeeded(job_id).into() })
}

/// True if the value nests lists and objects at most `depth` levels deep.
fn is_shallow(value: &Value, depth: usize) -> bool {
    match &value.kind {
        Some(Kind::ListValue(list)) => depth > 0 && list.values.iter().all(|value| is_shallow(value, depth - 1)),
        Some(Kind::StructValue(object)) => {
            depth > 0 && object.fields.values().all(|value| is_shallow(value, depth - 1))
        }
        None | Some(Kind::NullValue(_) | Kind::NumberValue(_) | Kind::StringValue(_) | Kind::BoolValue(_)) => true,
    }
}

/// The report on an attempt whose handler returned an error. Logs failures.
fn failed(job: &Job, error: Error) -> UpdateJobStatusRequest {
    let retry_after = error.retry_after.map(|wait| request::duration(wait.min(LONGEST_RETRY_AFTER)));
    let Error { code, message, kind, .. } = error;
    if kind == ErrorKind::GiveBack {
        return UpdateJobStatusRequest { retry_after, ..Report::released(&job.id).into() };
    }
    let (job_id, job_type, failures) = (&job.id, &job.r#type, job.failures + 1);
    let (max_attempts, lost, is_permanent) = (job.max_attempts, job.lost_attempts, kind == ErrorKind::Permanent);
    tracing::warn!(job_id, job_type, failures, max_attempts, lost, is_permanent, code, message, "an attempt failed");
    let report = Report::failed(job_id, code, message);
    if is_permanent { report.permanent().into() } else { UpdateJobStatusRequest { retry_after, ..report.into() } }
}

/// Cuts the error's code and message to the contract's limits, and removes NUL characters, which the service refuses.
fn bounded(mut report: UpdateJobStatusRequest) -> UpdateJobStatusRequest {
    const MAX_CODE_CHARS: usize = 100;
    const MAX_MESSAGE_BYTES: usize = 4 << 10;
    report.error_code = report.error_code.chars().filter(|c| *c != '\0').take(MAX_CODE_CHARS).collect();
    report.error_message.retain(|c| c != '\0');
    report.error_message.truncate(report.error_message.floor_char_boundary(MAX_MESSAGE_BYTES));
    report
}

/// Delivers the report. If the service refuses its content, delivers a reduced report instead.
async fn settle(shared: &Shared, held: &Arc<Held>, job_id: &str, report: UpdateJobStatusRequest) {
    let status = report.status();
    let error = match shared.desk.report(report, held).await {
        Ok(()) => return,
        Err(error @ (crate::Error::LeaseLost | crate::Error::JobNotFound { .. })) => {
            held.stop(Stop::Lost);
            return tracing::warn!(job_id, %error, "the lease was lost before the report; it is discarded");
        }
        Err(error) if is_about_report(&error) => error,
        Err(error) => {
            return tracing::error!(job_id, %error, "a report was not accepted in time; the lease will expire, and the job will run again");
        }
    };
    tracing::error!(job_id, %error, "the service refused a report; sending a reduced report");
    let refused = |code, what: &str| Report::failed(job_id, code, format!("{what} was refused: {error}"));
    let bare: UpdateJobStatusRequest = match status {
        // Only the result can have caused the refusal, so another attempt would not help.
        JobStatus::Succeeded => refused(INVALID_RESULT, "the result").permanent().into(),
        JobStatus::Queued => Report::released(job_id).into(),
        JobStatus::Canceled => Report::canceled(job_id).into(),
        JobStatus::Unspecified | JobStatus::Running | JobStatus::Failed | JobStatus::DeadLetter => {
            refused(HANDLER_FAILED, "the report").into()
        }
    };
    let bare = bounded(UpdateJobStatusRequest { lease_token: held.lease_token().to_owned(), ..bare });
    if let Err(error) = shared.desk.report(bare, held).await {
        tracing::error!(job_id, %error, "the service refused the reduced report, too; the lease will expire");
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", text.unwrap_or("without a message"))
}
