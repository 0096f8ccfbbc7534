//! The calls of workers, and of whoever looks after jobs.

use std::time::Duration;

use jobledger_proto::v1::{
    CancelJobRequest, ClaimJobsRequest, HeartbeatRequest, HeartbeatResult, Job, Lease, ListJobsRequest,
    ListJobsResponse, RetryJobRequest,
};
use uuid::Uuid;

use crate::{Client, Error};

impl Client {
    /// Takes jobs that are ready, under leases. [`Worker`](crate::worker::Worker) does it all: this is for those who must do it
    /// themselves. Dropped before its answer, it has taken nothing.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn claim(&self, claim: impl Into<ClaimJobsRequest>) -> Result<Vec<Lease>, Error> {
        let mut request: ClaimJobsRequest = claim.into();
        if request.request_id.is_empty() {
            request.request_id = Uuid::now_v7().to_string();
        }
        let wait = request.wait.and_then(|wait| Duration::try_from(wait).ok()).unwrap_or_default();
        let timeout = self.timeout().saturating_add(wait);
        let send = |mut service: crate::RawClient, request| async move { service.claim_jobs(request).await };
        Ok(self.call_within(timeout, request, true, send).await?.leases)
    }

    /// Extends leases, and brings news of their jobs along: how each stands, in order. What is wrong with one of them is in its own
    /// result (`error`), and costs the others nothing.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`]: then it isn't known
    /// of any lease that it is lost.
    pub async fn heartbeat(&self, heartbeat: HeartbeatRequest) -> Result<Vec<HeartbeatResult>, Error> {
        let send = |mut service: crate::RawClient, request| async move { service.heartbeat(request).await };
        Ok(self.call(heartbeat, true, send).await?.results)
    }

    /// Asks for a job to end: the job, canceled or asked to stop. A reason is for the event log, and may be empty.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::JobNotFound`], [`Error::InvalidTransition`], [`Error::Unavailable`],
    /// [`Error::DeadlineExceeded`].
    pub async fn cancel(&self, job_id: impl Into<String>, reason: impl Into<String>) -> Result<Job, Error> {
        let request = CancelJobRequest { job_id: job_id.into(), reason: reason.into(), etag: String::new() };
        let send = |mut service: crate::RawClient, request| async move { service.cancel_job(request).await };
        self.call(request, true, send).await?.job.ok_or_else(Error::without_job)
    }

    /// Queues a finished job again, once, with a fresh budget of attempts.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::JobNotFound`], [`Error::InvalidTransition`], [`Error::Unavailable`],
    /// [`Error::DeadlineExceeded`].
    pub async fn retry(&self, job_id: impl Into<String>) -> Result<Job, Error> {
        let request_id = Uuid::now_v7().to_string();
        let request = RetryJobRequest { job_id: job_id.into(), etag: String::new(), request_id };
        let send = |mut service: crate::RawClient, request| async move { service.retry_job(request).await };
        self.call(request, true, send).await?.job.ok_or_else(Error::without_job)
    }

    /// Reads a page of jobs, the newest first. For the next one, ask the same with its `next_page_token`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn list(&self, list: ListJobsRequest) -> Result<ListJobsResponse, Error> {
        self.call(list, true, |mut service, request| async move { service.list_jobs(request).await }).await
    }
}
