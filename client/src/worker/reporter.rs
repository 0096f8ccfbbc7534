//! Reports the outcomes of attempts, many per call. While one call is under way, the reports of the next one gather.
//!
//! A report is repeated until the service has accepted it or refused it for good. Its lease token makes that safe.

use std::{sync::Arc, time::Duration};

use jobledger_proto::v1::{BatchUpdateJobStatusRequest, UpdateJobStatusRequest};
use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};
use tonic::Code;

use super::heartbeats::Held;
use crate::{Client, Error, retry::Backoff};

/// The service's limit of reports per call.
const AT_ONCE: usize = 1_000;
/// Upper bound of a call's size in bytes: half of the service's 4 MiB, and more than the largest report.
const BYTES: usize = 2 << 20;
/// Timeout of one call, after which a retry goes to another server.
const CALL: Duration = Duration::from_secs(10);
const LONGEST_CALL: Duration = Duration::from_secs(120);

/// A report, and the channel on which its sender waits for the outcome.
struct Report {
    update: UpdateJobStatusRequest,
    held: Arc<Held>,
    /// When the service first refused the report for a reason that is neither the report itself nor an outage.
    refused_since: Option<Instant>,
    settled: oneshot::Sender<Result<(), Error>>,
}

/// The queue of reports. Clones share it.
#[derive(Clone)]
pub(super) struct ReportQueue(mpsc::UnboundedSender<Report>);

impl ReportQueue {
    /// Queues a report and waits until the service has accepted it or refused it for good.
    pub(super) async fn report(&self, update: UpdateJobStatusRequest, held: &Arc<Held>) -> Result<(), Error> {
        let (settled, answer) = oneshot::channel();
        // The send fails only if the reporter is gone. The worker has then ended, and the lease will expire.
        let _ = self.0.send(Report { update, held: Arc::clone(held), refused_since: None, settled });
        answer.await.unwrap_or(Err(Error::LeaseLost))
    }
}

/// The queue, and the future that sends its reports for as long as it is polled.
pub(super) fn open(client: Client) -> (ReportQueue, impl Future<Output = ()>) {
    // The queue is unbounded, but has at most one report per claimed job.
    let (sender, receiver) = mpsc::unbounded_channel();
    (ReportQueue(sender), carry(client, receiver))
}

async fn carry(client: Client, mut desk: mpsc::UnboundedReceiver<Report>) {
    let mut backoff = Backoff::default();
    let mut waiting = Vec::new();
    // If calls time out, as on a slow network, the next calls are smaller and get more time.
    let (mut bytes, mut time) = (BYTES, CALL);
    loop {
        if waiting.is_empty() {
            let Some(first) = desk.recv().await else { return };
            waiting.push(first);
        }
        while let Ok(next) = desk.try_recv() {
            waiting.push(next);
        }
        let rest = waiting.split_off(fitting(&waiting, bytes));
        let answers = send_or_split(&client, &waiting, time).await;
        if answers.iter().all(|answer| matches!(answer, Err(Error::DeadlineExceeded))) {
            (bytes, time) = (bytes / 2, (2 * time).min(LONGEST_CALL));
        } else {
            (bytes, time) = (BYTES, CALL);
        }
        let mut failed = None;
        let mut again = Vec::new();
        for (mut report, answer) in waiting.into_iter().zip(answers) {
            match answer {
                Err(error) if report.goes_again(&error) => {
                    again.push(report);
                    failed = Some(error);
                }
                // The sender may be gone.
                answer => drop(report.settled.send(answer)),
            }
        }
        waiting = again;
        waiting.extend(rest);
        if let Some(error) = failed {
            let wait = backoff.next(error.retry_after());
            tracing::warn!(%error, reports = waiting.len(), wait_ms = wait.as_millis() as u64, "can't deliver reports; trying again");
            sleep(wait).await;
        } else {
            backoff.reset();
        }
    }
}

/// How many of the reports one call takes, within `most` bytes.
fn fitting(reports: &[Report], most: usize) -> usize {
    let mut bytes = 0;
    let fits = |report: &&Report| {
        bytes += report.update.encoded_len() + 8;
        bytes <= most
    };
    reports.iter().take(AT_ONCE).take_while(fits).count().max(1)
}

/// Returns an answer per report. If a call is refused as a whole, the reports are sent one by one.
async fn send_or_split(client: &Client, reports: &[Report], time: Duration) -> Vec<Result<(), Error>> {
    match send(client, reports, time).await {
        Ok(answers) => answers,
        Err(error) if reports.len() > 1 && !concerns_all(&error) => {
            let mut answers = Vec::with_capacity(reports.len());
            for report in reports {
                let alone = send(client, std::slice::from_ref(report), time).await;
                answers.push(alone.and_then(|mut answers| answers.remove(0)));
            }
            answers
        }
        Err(error) => vec![Err(error); reports.len()],
    }
}

/// Sends reports in one call. Returns an answer per report, or the error of the call.
async fn send(client: &Client, reports: &[Report], time: Duration) -> Result<Vec<Result<(), Error>>, Error> {
    let updates = reports.iter().map(|report| report.update.clone()).collect();
    let mut service = client.raw();
    let call = async { service.batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await };
    let results = client.bounded(Instant::now() + time, call).await?.into_inner().results;
    if results.len() != reports.len() {
        return Err(Error::without("a result for each report"));
    }
    Ok(results.into_iter().map(|result| result.error.map_or(Ok(()), |error| Err(error.into()))).collect())
}

/// True if the report's content caused the error, so that another report may be accepted.
pub(super) fn is_about_report(error: &Error) -> bool {
    match error {
        Error::InvalidRequest { .. } | Error::PayloadTooLarge { .. } | Error::InvalidTransition { .. } => true,
        Error::Exhausted { reason, .. } => reason == "MESSAGE_TOO_LARGE",
        Error::Other { code, .. } => *code == Code::InvalidArgument,
        Error::JobNotFound { .. }
        | Error::KeyNotFound { .. }
        | Error::JobTypeNotFound { .. }
        | Error::BulkOperationNotFound { .. }
        | Error::TokenNotFound { .. }
        | Error::BulkOperationExists { .. }
        | Error::LeaseLost
        | Error::EtagMismatch { .. }
        | Error::Unauthenticated { .. }
        | Error::PermissionDenied { .. }
        | Error::Unavailable { .. }
        | Error::DeadlineExceeded
        | Error::IdempotencyKeyReused { .. }
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
        | Error::Worker(_) => false,
    }
}

/// True if the error has nothing to do with the content of the reports.
fn concerns_all(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::Unauthenticated { .. } | Error::PermissionDenied { .. })
}

/// True if the service has decided on the report: it is invalid, or too late.
fn is_settled(error: &Error) -> bool {
    is_about_report(error) || matches!(error, Error::LeaseLost | Error::JobNotFound { .. } | Error::EtagMismatch { .. })
}

impl Report {
    /// True if the report has to be sent again. Transient errors are retried without limit. Others, such as an expired token or
    /// a defect of the service, are retried for the length of one lease; heartbeats may extend the lease without end.
    fn goes_again(&mut self, error: &Error) -> bool {
        if error.is_transient() {
            return true;
        }
        let now = Instant::now();
        let refused_since = *self.refused_since.get_or_insert(now);
        !is_settled(error) && self.held.may_be_alive() && now - refused_since < self.held.lease()
    }
}
