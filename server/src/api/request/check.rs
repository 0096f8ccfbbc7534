//! Validates the fields of requests.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

use chrono::{DateTime, SubsecRound};
use jobledger_proto::v1 as pb;
use prost::Message;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::super::{
    json,
    status::{ApiError, MAX_VIOLATIONS, Violation},
};
use crate::domain::{
    clock::Time,
    event::JobError,
    id::{Digest, JobId},
    job::{MAX_ERROR_CODE_CHARS, MAX_LABELS, MAX_NAME_CHARS, MAX_STAGE_CHARS, MAX_TYPE_CHARS},
    json::Json,
    lease::{LONGEST_LEASE, LeaseToken},
    name::{is_seen, is_unseen},
    retry::RetryPolicy,
    status::JobStatus,
    transition::{Ending, News, Outcome, Step},
};

const MAX_LABEL_CHARS: usize = 63;
const MAX_MESSAGE_BYTES: usize = 4 << 10;
/// Bytes of the encoded `Value`, as received.
const MAX_VALUE_BYTES: usize = 1 << 20;
const MAX_FILTER_TYPES: usize = 100;
const MAX_RETRY_AFTER: Duration = Duration::from_secs(365 * 24 * 3_600);
const INITIAL_BACKOFF: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(24 * 3_600)];
const MAX_BACKOFF: Duration = Duration::from_secs(7 * 24 * 3_600);
const MULTIPLIER: [f64; 2] = [1.0, 100.0];
pub(super) const LEASE: [Duration; 2] = [Duration::from_secs(1), LONGEST_LEASE];
/// The server makes no lease token, etag or page token that is longer.
const MAX_TOKEN_CHARS: usize = 255;

/// Collects the violations of a request, so that the caller sees all of them at once.
#[derive(Default)]
pub(super) struct Check {
    violations: Vec<Violation>,
    too_large: Option<ApiError>,
}

impl Check {
    pub(super) fn finish(self) -> Result<(), ApiError> {
        if !self.violations.is_empty() {
            return Err(ApiError::Invalid(self.violations));
        }
        self.too_large.map_or(Ok(()), Err)
    }

    pub(super) fn refuse(&mut self, field: &str, description: impl Into<String>) {
        if self.violations.len() == MAX_VIOLATIONS {
            return;
        }
        self.violations.push(Violation { field: field.to_owned(), description: description.into() });
    }

    pub(super) fn that(&mut self, field: &str, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.refuse(field, otherwise());
        }
    }

    pub(super) fn job_id(&mut self, text: &str) -> JobId {
        match Uuid::try_parse(text) {
            Ok(id) => JobId(id),
            Err(_) => {
                self.refuse("job_id", if text.is_empty() { "is required" } else { "must be a UUID" });
                JobId(Uuid::nil())
            }
        }
    }

    pub(super) fn text(&mut self, field: &str, text: &str, max_chars: usize) {
        let chars = text.chars().count();
        self.that(field, chars <= max_chars, || format!("must have at most {max_chars} characters, not {chars}"));
        self.seen(field, text);
    }

    /// Checks a short text of a worker, replacing characters that can't be seen: refusing them could cost the worker its job.
    fn said(&mut self, field: &str, text: &str, max_chars: usize) -> Arc<str> {
        let chars = text.chars().count();
        self.that(field, chars <= max_chars, || format!("must have at most {max_chars} characters, not {chars}"));
        self.no_nul(field, text);
        if is_seen(text) { text.into() } else { text.replace(is_unseen, "\u{fffd}").into() }
    }

    fn seen(&mut self, field: &str, text: &str) {
        self.that(field, is_seen(text), || {
            "must not contain control or bidirectional formatting characters".to_owned()
        });
    }

    pub(super) fn bytes(&mut self, field: &str, text: &str) {
        let bytes = text.len();
        self.that(field, bytes <= MAX_MESSAGE_BYTES, || {
            format!("must have at most {MAX_MESSAGE_BYTES} bytes, not {bytes}")
        });
        self.no_nul(field, text);
    }

    /// Checks a text that names something: at most 255 characters, all of which can be seen.
    pub(super) fn name(&mut self, field: &str, text: &str) {
        self.text(field, text, MAX_NAME_CHARS);
    }

    /// Checks such a text that must not be empty.
    pub(super) fn required_name(&mut self, field: &str, text: &str) {
        self.that(field, !text.is_empty(), || "is required".to_owned());
        self.name(field, text);
    }

    /// Checks a token that the server has made; `None` for an empty one.
    pub(super) fn token(&mut self, field: &str, token: String) -> Option<String> {
        self.text(field, &token, MAX_TOKEN_CHARS);
        (!token.is_empty()).then_some(token)
    }

    pub(super) fn no_nul(&mut self, field: &str, text: &str) {
        self.that(field, !text.contains('\0'), || "must not hold the NUL character".to_owned());
    }

    pub(super) fn job_type(&mut self, field: &str, name: &str) {
        self.that(field, !name.is_empty(), || "is required".to_owned());
        let chars = name.chars().count();
        self.that(field, chars <= MAX_TYPE_CHARS, || {
            format!("must have at most {MAX_TYPE_CHARS} characters, not {chars}")
        });
        self.seen(field, name);
    }

    /// Checks the types to filter by, sorts them and removes duplicates.
    pub(super) fn types(&mut self, field: &str, mut types: Vec<String>) -> Vec<String> {
        self.that(field, types.len() <= MAX_FILTER_TYPES, || format!("must name at most {MAX_FILTER_TYPES} types"));
        for name in types.iter().take(MAX_FILTER_TYPES) {
            self.job_type(field, name);
        }
        types.sort_unstable();
        types.dedup();
        types
    }

    /// Checks the size of a page; 0 stands for the default, and more than the maximum for that.
    pub(super) fn page_size(&mut self, n: i32, default: usize, max: usize) -> usize {
        self.that("page_size", n >= 0, || "must not be negative".to_owned());
        match usize::try_from(n).unwrap_or_default() {
            0 => default,
            n => n.min(max),
        }
    }

    /// Checks a number of items; 0 stands for the default.
    pub(super) fn count(&mut self, field: &str, n: i32, default: i32, allowed: RangeInclusive<i32>) -> usize {
        let n = if n == 0 { default } else { n };
        self.that(field, allowed.contains(&n), || format!("must be {} to {}", allowed.start(), allowed.end()));
        usize::try_from(n).unwrap_or_default()
    }

    /// Checks stage, progress and message. `prefix` goes before their names in violations.
    pub(super) fn news(&mut self, prefix: &str, stage: Option<String>, progress: Option<i32>, message: String) -> News {
        let stage = stage.map(|stage| self.said(&format!("{prefix}stage"), &stage, MAX_STAGE_CHARS));
        let progress = progress.and_then(|progress| {
            let percent = u8::try_from(progress).ok().filter(|percent| *percent <= 100);
            self.that(&format!("{prefix}progress"), percent.is_some(), || "must be 0 to 100".to_owned());
            percent
        });
        self.bytes(&format!("{prefix}message"), &message);
        News { stage, progress, message: message.into() }
    }

    /// Parses a lease token; `None` for an empty one. Any other text becomes [`LeaseToken::NOBODYS`], which the ledger refuses.
    pub(super) fn lease_token(&mut self, field: &str, token: String) -> Option<LeaseToken> {
        self.token(field, token).map(|token| token.parse().unwrap_or(LeaseToken::NOBODYS))
    }

    pub(super) fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        self.that(field, labels.len() <= MAX_LABELS, || format!("must be at most {MAX_LABELS}"));
        for (key, value) in labels.iter().take(MAX_LABELS) {
            self.that(field, !key.is_empty(), || "must not have an empty key".to_owned());
            self.text(&format!("{field}[{key:.20}]"), key, MAX_LABEL_CHARS);
            self.text(&format!("{field}[{key:.20}]"), value, MAX_LABEL_CHARS);
        }
    }

    pub(super) fn time(&mut self, field: &str, time: prost_types::Timestamp) -> Option<Time> {
        // The range of google.protobuf.Timestamp: the years 1 to 9999.
        const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;
        let valid = u32::try_from(time.nanos)
            .ok()
            .filter(|nanos| *nanos < 1_000_000_000 && SECONDS.contains(&time.seconds))
            .and_then(|nanos| DateTime::from_timestamp(time.seconds, nanos));
        self.that(field, valid.is_some(), || "must be a time from the years 1 to 9999".to_owned());
        valid.map(|time| time.trunc_subsecs(6))
    }

    pub(super) fn duration(
        &mut self,
        field: &str,
        duration: &prost_types::Duration,
        [min, max]: [Duration; 2],
    ) -> Option<Duration> {
        let valid = Duration::try_from(*duration).ok().filter(|duration| (min..=max).contains(duration));
        // Durations are stored in microseconds. The answer has to equal what is stored.
        let valid = valid.map(|duration| Duration::from_micros(duration.as_micros() as u64));
        self.that(field, valid.is_some(), || format!("must be {} to {}", in_words(min), in_words(max)));
        valid
    }

    pub(super) fn retry_policy(&mut self, policy: Option<&pb::RetryPolicy>) -> RetryPolicy {
        let default = RetryPolicy::default();
        let Some(policy) = policy else { return default };
        let initial = policy.initial_backoff.as_ref();
        let initial = initial.and_then(|wait| self.duration("retry_policy.initial_backoff", wait, INITIAL_BACKOFF));
        let initial_backoff = initial.unwrap_or(default.initial_backoff);
        let longest = policy.max_backoff.as_ref();
        let longest =
            longest.and_then(|wait| self.duration("retry_policy.max_backoff", wait, [initial_backoff, MAX_BACKOFF]));
        let multiplier = policy.multiplier.unwrap_or(default.multiplier);
        let [least, most] = MULTIPLIER;
        self.that("retry_policy.multiplier", (least..=most).contains(&multiplier), || {
            format!("must be {least} to {most}")
        });
        let max_backoff = longest.unwrap_or(default.max_backoff.max(initial_backoff));
        RetryPolicy { initial_backoff, multiplier, max_backoff }
    }

    pub(super) fn value(&mut self, field: &'static str, value: Option<&prost_types::Value>) -> Option<Json> {
        let value = value?;
        let size = value.encoded_len();
        if size > MAX_VALUE_BYTES {
            self.too_large = Some(ApiError::TooLarge { field, limit: MAX_VALUE_BYTES, size });
            return None;
        }
        json::to_json(value).map_err(|error| self.refuse(field, error.to_string())).ok()
    }

    pub(super) fn status(&mut self, field: &str, status: i32) -> Option<JobStatus> {
        let known = match pb::JobStatus::try_from(status) {
            Ok(pb::JobStatus::Queued) => Some(JobStatus::Queued),
            Ok(pb::JobStatus::Running) => Some(JobStatus::Running),
            Ok(pb::JobStatus::Succeeded) => Some(JobStatus::Succeeded),
            Ok(pb::JobStatus::Failed) => Some(JobStatus::Failed),
            Ok(pb::JobStatus::Canceled) => Some(JobStatus::Canceled),
            Ok(pb::JobStatus::DeadLetter) => Some(JobStatus::DeadLetter),
            Ok(pb::JobStatus::Unspecified) | Err(_) => None,
        };
        self.that(field, known.is_some(), || format!("{status} is not a status"));
        known
    }

    pub(super) fn statuses(&mut self, field: &str, numbers: &[i32]) -> Vec<JobStatus> {
        let most = JobStatus::ALL.len();
        self.that(field, numbers.len() <= most, || format!("must name at most {most} statuses"));
        let mut statuses: Vec<_> = numbers.iter().take(most).filter_map(|number| self.status(field, *number)).collect();
        statuses.sort_unstable();
        statuses.dedup();
        statuses
    }

    /// Checks where a report takes the job, and that only fields are set which belong to that status.
    pub(super) fn step(&mut self, request: &pb::UpdateJobStatusRequest) -> Option<Step> {
        let status = match request.status {
            Some(number) => Some(self.status("status", number)?),
            None => None,
        };
        let allows = |wanted: &[JobStatus]| status.is_some_and(|status| wanted.contains(&status));
        let ends = allows(&[JobStatus::Succeeded, JobStatus::Failed, JobStatus::Canceled]);
        let fails = allows(&[JobStatus::Failed, JobStatus::Canceled]);
        let waits = allows(&[JobStatus::Failed, JobStatus::Queued]);
        let only = |names: &str| format!("is only for {names}");
        self.that("result", request.result.is_none() || ends, || only("SUCCEEDED, FAILED and CANCELED"));
        self.that("error_code", request.error_code.is_empty() || fails, || only("FAILED and CANCELED"));
        self.that("error_message", request.error_message.is_empty() || fails, || only("FAILED and CANCELED"));
        self.that("retryable", request.retryable.is_none() || allows(&[JobStatus::Failed]), || only("FAILED"));
        self.that("retry_after", request.retry_after.is_none() || waits, || only("FAILED and QUEUED"));
        let code = self.said("error_code", &request.error_code, MAX_ERROR_CODE_CHARS);
        self.bytes("error_message", &request.error_message);
        let result = self.value("result", request.result.as_ref());
        let wait = request.retry_after.as_ref();
        let retry_after = wait.and_then(|wait| self.duration("retry_after", wait, [Duration::ZERO, MAX_RETRY_AFTER]));
        let error = JobError { code, message: request.error_message.as_str().into() };
        let retryable = request.retryable.unwrap_or(true);
        let outcome = match status? {
            JobStatus::Running => return Some(Step::Run),
            JobStatus::Queued => Outcome::Released { retry_after },
            JobStatus::Succeeded => Outcome::Succeeded { result },
            JobStatus::Failed => Outcome::Failed { result, error, retryable, retry_after },
            JobStatus::Canceled => Outcome::Canceled { result, error: (error != JobError::default()).then_some(error) },
            JobStatus::DeadLetter => {
                self.refuse(
                    "status",
                    "DEAD_LETTER can't be reported: the server sets it after the last FAILED attempt",
                );
                return None;
            }
        };
        Some(Step::End(Ending { outcome, digest: ending_digest(request) }))
    }
}

/// The digest of a reported outcome. Two reports with the same digest report the same outcome.
pub(crate) fn ending_digest(report: &pb::UpdateJobStatusRequest) -> Digest {
    digest(&pb::UpdateJobStatusRequest {
        status: report.status,
        result: report.result.clone(),
        error_code: report.error_code.clone(),
        error_message: report.error_message.clone(),
        retryable: Some(report.retryable.unwrap_or(true)),
        retry_after: report.retry_after,
        ..Default::default()
    })
}

/// Prints a bound in whole days, else in seconds, else in milliseconds.
fn in_words(duration: Duration) -> String {
    match duration.as_secs() {
        0 if !duration.is_zero() => format!("{} ms", duration.as_millis()),
        seconds if seconds > 0 && seconds % 86_400 == 0 => format!("{} days", seconds / 86_400),
        seconds => format!("{seconds} s"),
    }
}

pub(super) fn digest(message: &impl Message) -> Digest {
    Digest(Sha256::digest(message.encode_to_vec()).into())
}
