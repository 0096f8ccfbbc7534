//! Which jobs: the filter of lists and bulk operations.

use std::collections::BTreeMap;

use super::{clock::Time, job::Job, status::JobStatus};

/// A filter of jobs. A field that is empty or absent matches all jobs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobFilter {
    /// Jobs with one of these statuses, each named once.
    pub statuses: Vec<JobStatus>,
    /// Jobs of one of these types, each named once.
    pub types: Vec<String>,
    /// Jobs with all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Jobs that this requester asked for.
    pub requested_by: Option<String>,
    /// Jobs created then or later.
    pub created_after: Option<Time>,
    /// Jobs created before then.
    pub created_before: Option<Time>,
    /// The job with this idempotency key.
    pub idempotency_key: Option<String>,
    /// Jobs whose last failure or lost attempt has this code.
    pub error_code: Option<String>,
    /// Jobs that this worker holds a lease on.
    pub worker: Option<String>,
    /// Jobs finished then or later.
    pub finished_after: Option<Time>,
    /// Jobs finished before then.
    pub finished_before: Option<Time>,
}

impl JobFilter {
    /// True for a job that passes the filter.
    pub fn matches(&self, job: &Job) -> bool {
        let spec = &job.spec;
        let is =
            |wanted: &Option<String>, found: Option<&str>| wanted.as_deref().is_none_or(|wanted| found == Some(wanted));
        (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && (self.types.is_empty() || self.types.iter().any(|wanted| **wanted == *spec.job_type))
            && self.labels.iter().all(|(key, value)| spec.labels.get(key) == Some(value))
            && is(&self.requested_by, Some(&spec.requested_by))
            && self.created_after.is_none_or(|time| job.created_at >= time)
            && self.created_before.is_none_or(|time| job.created_at < time)
            && is(&self.idempotency_key, spec.idempotency.as_ref().map(|idempotency| &*idempotency.key))
            && is(&self.error_code, job.last_error.as_ref().map(|error| &*error.code))
            && is(&self.worker, job.lease.as_ref().map(|lease| &*lease.worker))
            && self.finished_after.is_none_or(|time| job.finished_at.is_some_and(|finished| finished >= time))
            && self.finished_before.is_none_or(|time| job.finished_at.is_some_and(|finished| finished < time))
    }

    /// The statuses that a matching job may have.
    pub fn possible_statuses(&self) -> impl Iterator<Item = JobStatus> {
        let has_finished = self.finished_after.is_some() || self.finished_before.is_some();
        JobStatus::ALL.into_iter().filter(move |status| {
            (self.statuses.is_empty() || self.statuses.contains(status))
                && (self.worker.is_none() || *status == JobStatus::Running)
                && (!has_finished || status.is_terminal())
        })
    }
}
