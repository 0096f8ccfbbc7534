//! Reports the outcomes of attempts, many in one call: while one is under way the next gathers.
//!
//! A report is repeated until the service has taken it, or said that it never will: under its lease's token that is safe.

use std::{sync::Arc, time::Duration};

use jobledger_proto::v1::{BatchUpdateJobStatusRequest, UpdateJobStatusRequest};
use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};
use tonic::Code;

use super::keeper::Held;
use crate::{Client, Error, retry::Backoff};

/// Reports in one call, at most.
const AT_ONCE: usize = 1_000;
/// Bytes in one call: a report at its limit and some others stay below the service's 4 MiB.
const BYTES: usize = 2 << 20;
/// What one call may take: another may have better luck.
const CALL: Duration = Duration::from_secs(10);
const LONGEST_CALL: Duration = Duration::from_secs(120);

/// A report, and who waits for it to be settled.
struct Report {
    update: UpdateJobStatusRequest,
    held: Arc<Held>,
    /// Since when it is refused for a reason that is neither its own nor an outage.
    refused_since: Option<Instant>,
    settled: oneshot::Sender<Result<(), Error>>,
}

/// Where reports are handed in.
#[derive(Clone)]
pub(super) struct Desk(mpsc::UnboundedSender<Report>);

impl Desk {
    /// Reports under a lease, and waits until it is settled: taken, or refused for good.
    pub(super) async fn report(&self, update: UpdateJobStatusRequest, held: &Arc<Held>) -> Result<(), Error> {
        let (settled, answer) = oneshot::channel();
        // Without a reporter there is nobody to say it to: the worker is gone, and the lease will end.
        let _ = self.0.send(Report { update, held: Arc::clone(held), refused_since: None, settled });
        answer.await.unwrap_or(Err(Error::LeaseLost))
    }
}

/// The desk, and what carries reports away from it for as long as it is polled.
pub(super) fn open(client: Client) -> (Desk, impl Future<Output = ()>) {
    // No more wait in it than the worker has jobs in its hands.
    let (sender, receiver) = mpsc::unbounded_channel();
    (Desk(sender), carry(client, receiver))
}

async fn carry(client: Client, mut desk: mpsc::UnboundedReceiver<Report>) {
    let mut backoff = Backoff::default();
    let mut waiting = Vec::new();
    // On a line that is too slow for so much, smaller calls with more time get through.
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
                // Nobody may wait any more.
                answer => drop(report.settled.send(answer)),
            }
        }
        waiting = again;
        waiting.extend(rest);
        if let Some(error) = failed {
            let wait = backoff.next(error.retry_after());
            tracing::warn!(%error, reports = waiting.len(), wait_ms = wait.as_millis() as u64, "reports have to wait");
            sleep(wait).await;
        } else {
            backoff.reset();
        }
    }
}

/// How many of the reports one call takes.
fn fitting(reports: &[Report], most: usize) -> usize {
    let mut bytes = 0;
    let fits = |report: &&Report| {
        bytes += report.update.encoded_len() + 8;
        bytes <= most
    };
    reports.iter().take(AT_ONCE).take_while(fits).count().max(1)
}

/// An answer for each report. A call that is refused as a whole says nothing of the single ones: they go one by one.
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

/// An answer for each report, or one for the call.
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

/// True of an error that says what is wrong with a report: another one may be taken.
pub(super) fn is_about_report(error: &Error) -> bool {
    match error {
        Error::InvalidRequest { .. } | Error::PayloadTooLarge { .. } | Error::InvalidTransition { .. } => true,
        Error::Exhausted { reason, .. } => reason == "MESSAGE_TOO_LARGE",
        Error::Other { code, .. } => *code == Code::InvalidArgument,
        Error::JobNotFound { .. }
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

/// True of an error that has nothing to do with what is reported.
fn concerns_all(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::Unauthenticated { .. } | Error::PermissionDenied { .. })
}

/// True of an error that settles a report: it is wrong, or too late.
fn is_settled(error: &Error) -> bool {
    is_about_report(error) || matches!(error, Error::LeaseLost | Error::JobNotFound { .. } | Error::EtagMismatch { .. })
}

impl Report {
    /// True if it is to be sent again after this error. While the service is away, for as long as that takes. A token that lapsed may be
    /// replaced, and a defect of the service mended, while the lease lives: for one more lease, since heartbeats may go on.
    fn goes_again(&mut self, error: &Error) -> bool {
        if error.is_transient() {
            return true;
        }
        let now = Instant::now();
        let refused_since = *self.refused_since.get_or_insert(now);
        !is_settled(error) && self.held.may_be_alive() && now - refused_since < self.held.lease()
    }
}
