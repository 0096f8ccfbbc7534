//! Erasures of jobs.

use jobledger_proto::v1::{EraseJobRequest, Job};

use crate::{Client, Error};

impl Client {
    /// Blanks a finished job for good, with its events: payload, result, texts, labels, requester and key. `cancel` in the request
    /// also erases one that has not finished. Returns what is left of the job. Succeeds without effect if it was erased already.
    ///
    /// ```no_run
    /// # async fn example(client: jobledger_client::Client) -> Result<(), jobledger_client::Error> {
    /// use jobledger_client::proto::EraseJobRequest;
    ///
    /// let job_id = "6f2c1f0e-8a39-4c8a-9d0f-1d6a0f7d3b11".to_owned();
    /// client.erase(EraseJobRequest { job_id, cancel: true, ..EraseJobRequest::default() }).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::JobNotFound`], [`Error::EtagMismatch`], [`Error::InvalidTransition`] unless the job has
    /// finished or is to be canceled, [`Error::PermissionDenied`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn erase(&self, request: EraseJobRequest) -> Result<Job, Error> {
        let send = |mut service: crate::RawClient, request| async move { service.erase_job(request).await };
        self.call(request, true, send).await?.job.ok_or_else(Error::without_job)
    }
}
