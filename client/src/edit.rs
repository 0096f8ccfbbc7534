//! Changes of queued jobs.

use std::time::{Duration, SystemTime};

use jobledger_proto::v1::{Job, UpdateJobRequest};
use prost_types::FieldMask;
use serde::Serialize;

use crate::{Client, Error, json::to_field, request::duration};

/// Changes of a queued job, for [`Client::edit`]. What is not named stays as it is.
///
/// ```no_run
/// # async fn example(client: jobledger_client::Client) -> Result<(), jobledger_client::Error> {
/// use jobledger_client::Edit;
///
/// // A job that was scheduled for tonight runs now, before others.
/// client.edit(Edit::of("6f2c1f0e-8a39-4c8a-9d0f-1d6a0f7d3b11").at_once().priority(100)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct Edit(UpdateJobRequest);

impl Edit {
    /// Of the job with this id.
    pub fn of(job_id: impl Into<String>) -> Self {
        Self(UpdateJobRequest { job_id: job_id.into(), ..UpdateJobRequest::default() })
    }

    fn naming(mut self, field: &str) -> Self {
        let paths = &mut self.0.update_mask.get_or_insert_with(FieldMask::default).paths;
        if paths.iter().all(|path| path != field) {
            paths.push(field.to_owned());
        }
        self
    }

    /// Another payload: any JSON, at most 1 MiB encoded and nested at most 32 deep.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if the payload has no JSON form; [`Error::Number`] if it contains a number of ±2⁵³ or beyond.
    pub fn payload<T: Serialize + ?Sized>(mut self, payload: &T) -> Result<Self, Error> {
        self.0.payload = Some(to_field("payload", payload)?);
        Ok(self.naming("payload"))
    }

    /// Another priority, −1,000 to 1,000.
    pub fn priority(mut self, priority: i32) -> Self {
        self.0.priority = priority;
        self.naming("priority")
    }

    /// The job becomes ready at this time.
    pub fn scheduled_at(mut self, time: impl Into<SystemTime>) -> Self {
        self.0.scheduled_at = Some(time.into().into());
        self.naming("scheduled_at")
    }

    /// The job is ready now, also if it waits for its next attempt.
    pub fn at_once(mut self) -> Self {
        self.0.scheduled_at = None;
        self.naming("scheduled_at")
    }

    /// These labels instead of those that the job has.
    pub fn labels<K: Into<String>, V: Into<String>>(mut self, labels: impl IntoIterator<Item = (K, V)>) -> Self {
        self.0.labels = labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        self.naming("labels")
    }

    /// How many failures end the retries, 1 to 100.
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.0.max_attempts = attempts;
        self.naming("max_attempts")
    }

    /// How long an attempt may take, 1 s to 365 days; `None`: without limit.
    pub fn run_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.0.run_timeout = timeout.map(duration);
        self.naming("run_timeout")
    }

    /// Refuses the change if the job has another etag, that is, if it has changed.
    pub fn etag(mut self, etag: impl Into<String>) -> Self {
        self.0.etag = etag.into();
        self
    }
}

impl From<Edit> for UpdateJobRequest {
    fn from(edit: Edit) -> Self {
        edit.0
    }
}

impl Client {
    /// Changes what a queued job asks for, and returns the job. Succeeds without effect if the job has these values already.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::JobNotFound`], [`Error::EtagMismatch`], [`Error::InvalidTransition`] unless the job
    /// is queued, [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn edit(&self, edit: impl Into<UpdateJobRequest>) -> Result<Job, Error> {
        let send = |mut service: crate::RawClient, request| async move { service.update_job(request).await };
        self.call(edit.into(), true, send).await?.job.ok_or_else(Error::without_job)
    }
}
