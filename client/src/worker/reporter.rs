//! Reports the outcomes of attempts, many in one call: while one is under way the next gathers.
//!
//! A report is repeated until the service has taken it, or said that it never will: under its lease's token that is safe.

use std::time::Duration;

use jobledger_proto::v1::{BatchUpdateJobStatusRequest, UpdateJobStatusRequest};
use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::{Client, Error, retry::Backoff};

/// Reports in one call, at most.
const AT_ONCE: usize = 1_000;
/// Bytes in one call: a report at its limit and some others stay below the service's 4 MiB.
const BYTES: usize = 2 << 20;
/// What one call may take: another may have better luck.
const CALL: Duration = Duration::from_secs(10);

/// A report, and who waits for it to be settled.
struct Report {
    update: UpdateJobStatusRequest,
    settled: oneshot::Sender<Result<(), Error>>,
}

/// Where reports are handed in.
#[derive(Clone)]
pub(super) struct Desk(mpsc::UnboundedSender<Report>);

impl Desk {
    /// Reports, and waits until it is settled: taken, or refused for good.
    pub(super) async fn report(&self, update: UpdateJobStatusRequest) -> Result<(), Error> {
        let (settled, answer) = oneshot::channel();
        // Without a reporter there is nobody to say it to: the worker is gone, and the lease will end.
        let _ = self.0.send(Report { update, settled });
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
    loop {
        if waiting.is_empty() {
            let Some(first) = desk.recv().await else { return };
            waiting.push(first);
        }
        while let Ok(next) = desk.try_recv() {
            waiting.push(next);
        }
        let rest = waiting.split_off(fitting(&waiting));
        let answers = send(&client, &waiting).await;
        let mut failed = None;
        let mut again = Vec::new();
        for (report, answer) in waiting.into_iter().zip(answers) {
            match answer {
                Err(error) if may_pass(&error) => {
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
fn fitting(reports: &[Report]) -> usize {
    let mut bytes = 0;
    let fits = |report: &&Report| {
        bytes += report.update.encoded_len() + 8;
        bytes <= BYTES
    };
    reports.iter().take(AT_ONCE).take_while(fits).count().max(1)
}

/// An answer for each report.
async fn send(client: &Client, reports: &[Report]) -> Vec<Result<(), Error>> {
    let updates = reports.iter().map(|report| report.update.clone()).collect();
    let call = async {
        let mut service = client.raw();
        service.batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await
    };
    let all_fail = |make: &dyn Fn() -> Error| reports.iter().map(|_| Err(make())).collect();
    match timeout(CALL, call).await {
        Ok(Ok(answer)) => {
            let results = answer.into_inner().results.into_iter();
            results.map(|result| result.error.map_or(Ok(()), |error| Err(error.into()))).collect()
        }
        Ok(Err(status)) => all_fail(&|| Error::from(status.clone())),
        Err(_) => all_fail(&|| Error::DeadlineExceeded),
    }
}

/// True if the same report may be taken later.
fn may_pass(error: &Error) -> bool {
    match error {
        Error::Unavailable { .. } | Error::DeadlineExceeded | Error::Exhausted { .. } => true,
        // A defect of the service, or one that is newer: to be told again is better than to be lost.
        Error::Other { code, .. } => *code != tonic::Code::InvalidArgument && *code != tonic::Code::Unimplemented,
        _ => false,
    }
}
