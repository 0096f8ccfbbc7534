//! What an old worker says of a job.

use jobledger_proto::v1 as pb;

use super::{super::convert, super::json, check::ending_digest};
use crate::{
    domain::{
        event::JobError,
        id::JobId,
        json::Json,
        status::JobStatus,
        transition::{self, Ending, News, Outcome, Reach, Target},
    },
    ledger::Command,
};

/// A report in the old words, fitted to the ledger's bounds.
pub(in super::super) struct OldReport {
    pub(in super::super) status: Option<JobStatus>,
    pub(in super::super) news: News,
    pub(in super::super) result: Option<Json>,
    /// Of a failure; of anything else it is a remark.
    pub(in super::super) error: Option<String>,
}

/// The command that takes the job where the report says it is.
pub(in super::super) fn reach(job: JobId, report: OldReport) -> Command {
    let OldReport { status, mut news, result, error } = report;
    if let Some(remark) = error.as_ref().filter(|_| status != Some(JobStatus::Failed)) {
        news.message = remark.as_str().into();
    }
    let ending = |status, outcome, result: Option<&Json>, error_message: &str| {
        // The same outcome is the same, whichever way it is reported.
        let digest = ending_digest(&pb::UpdateJobStatusRequest {
            status: Some(convert::status(status).into()),
            result: result.map(json::from_json),
            error_message: error_message.to_owned(),
            ..Default::default()
        });
        Ending { outcome, digest }
    };
    let message = error.unwrap_or_default();
    let to = status.map(|status| match status {
        JobStatus::Queued => Target::Queued(ending(status, Outcome::Released { retry_after: None }, None, "")),
        JobStatus::Running => Target::Running,
        JobStatus::Succeeded => {
            let outcome = Outcome::Succeeded { result: result.clone() };
            Target::Ended(ending(status, outcome, result.as_ref(), ""))
        }
        JobStatus::Failed => {
            let error = JobError { message: message.as_str().into(), ..JobError::default() };
            let outcome = Outcome::Failed { result: result.clone(), error, retryable: true, retry_after: None };
            Target::Ended(ending(status, outcome, result.as_ref(), &message))
        }
        JobStatus::Canceled => Target::Canceled,
        JobStatus::DeadLetter => Target::DeadLetter,
    });
    Command::Apply { job, command: Box::new(transition::Command::Reach(Reach { to, news })) }
}
