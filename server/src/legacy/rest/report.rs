//! Status reports of the old REST calls.

use jobledger_proto::v1 as pb;

use crate::{
    api::{ending_digest, json_value, status_word},
    domain::{
        event::JobError,
        id::JobId,
        json::Json,
        status::JobStatus,
        transition::{self, Ending, LegacyReport, News, Outcome, Target},
    },
    ledger::Command,
};

/// An old report, with its texts cut to the ledger's bounds.
pub(super) struct OldReport {
    pub(super) status: Option<JobStatus>,
    pub(super) news: News,
    pub(super) result: Option<Json>,
    /// The error of a failure. With any other status it becomes the event's message.
    pub(super) error: Option<String>,
}

/// The command that moves the job to the reported status, over as many transitions as that takes.
pub(super) fn report_command(job: JobId, report: OldReport) -> Command {
    let OldReport { status, mut news, result, error } = report;
    if let Some(remark) = error.as_ref().filter(|_| status != Some(JobStatus::Failed)) {
        news.message = remark.as_str().into();
    }
    let ending = |status, outcome, result: Option<&Json>, error_message: &str| {
        // An outcome has the same digest whether it comes by REST or by UpdateJobStatus.
        let digest = ending_digest(&pb::UpdateJobStatusRequest {
            status: Some(status_word(status).into()),
            result: result.map(json_value),
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
    Command::Apply { job, command: Box::new(transition::Command::LegacyReport(LegacyReport { to, news })) }
}
