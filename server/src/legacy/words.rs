//! The old service's words.

use chrono::{SecondsFormat, Timelike as _};

use crate::domain::{clock::Time, event::JobError, status::JobStatus};

/// The type of jobs from a table without a type column.
pub const DEFAULT_TYPE: &str = "mock_process";

/// The old word for a status. Old clients see a dead letter as failed.
pub const fn old_word(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Queued => "pending",
        JobStatus::Running => "processing",
        JobStatus::Succeeded => "completed",
        JobStatus::Failed | JobStatus::DeadLetter => "failed",
        JobStatus::Canceled => "canceled",
    }
}

/// The status for an old or a new word; `None` if it is unknown.
pub fn parse_status(word: &str) -> Option<JobStatus> {
    match word {
        "pending" => Some(JobStatus::Queued),
        "processing" => Some(JobStatus::Running),
        "completed" => Some(JobStatus::Succeeded),
        other => JobStatus::parse(other),
    }
}

/// The error text for old clients, which have no codes: the message, or the code if there is none.
pub fn error_text(error: &JobError) -> &str {
    if error.message.is_empty() { &error.code } else { &error.message }
}

/// Prints a time as Python's `datetime.isoformat` does: with six digits of fraction, or none if it is zero.
pub fn isoformat(time: Time) -> String {
    let is_whole = time.nanosecond() / 1_000 == 0;
    time.to_rfc3339_opts(if is_whole { SecondsFormat::Secs } else { SecondsFormat::Micros }, false)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn times_are_printed_as_python_does() {
        let print = |micros| isoformat(DateTime::from_timestamp_micros(micros).unwrap());
        assert_eq!(print(1_761_739_200_000_000), "2025-10-29T12:00:00+00:00");
        assert_eq!(print(1_761_739_200_000_010), "2025-10-29T12:00:00.000010+00:00");
        assert_eq!(print(1_761_739_200_120_000), "2025-10-29T12:00:00.120000+00:00");
    }

    #[test]
    fn every_status_has_an_old_word_that_leads_back() {
        for status in JobStatus::ALL {
            let back = parse_status(old_word(status)).unwrap();
            assert!(back == status || (status, back) == (JobStatus::DeadLetter, JobStatus::Failed));
            assert_eq!(parse_status(status.as_str()), Some(status));
        }
        assert_eq!(parse_status("archived"), None);
    }
}
