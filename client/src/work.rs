//! The calls of workers, and of people who manage jobs.

use std::time::Duration;

use jobledger_proto::v1::{
    CancelJobRequest, ClaimJobsRequest, ExplainJobRequest, ExplainJobResponse, HeartbeatRequest, HeartbeatResult, Job,
    Lease, ListJobsRequest, ListJobsResponse, ListWorkersRequest, ListWorkersResponse, RetryJobRequest,
};
use uuid::Uuid;

use crate::{Client, Error};

impl Client {
    /// Claims ready jobs under leases, for workers that don't use [`Worker`](crate::worker::Worker). If the future is
    /// dropped before its answer, the server gives the jobs back.
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

    /// Extends leases, and sends the progress of their jobs. Returns one result per lease, in order. A problem with one
    /// lease is in the `error` of its own result, and does not affect the others.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`]. After such
    /// an error no lease is known to be lost.
    pub async fn heartbeat(&self, heartbeat: HeartbeatRequest) -> Result<Vec<HeartbeatResult>, Error> {
        let send = |mut service: crate::RawClient, request| async move { service.heartbeat(request).await };
        Ok(self.call(heartbeat, true, send).await?.results)
    }

    /// Cancels a job, or asks the worker that holds it to stop, and returns the job. `reason` is for the event log; it
    /// may be empty.
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

    /// Queues a failed, canceled or dead-lettered job again, once, with `failures` and `lost_attempts` at 0.
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

    /// Explains why a queued job does not run: its time, pauses, jobs before it, workers.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::JobNotFound`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn explain(&self, job_id: impl Into<String>) -> Result<ExplainJobResponse, Error> {
        let request = ExplainJobRequest { job_id: job_id.into() };
        self.call(request, true, |mut service, request| async move { service.explain_job(request).await }).await
    }

    /// Reads a page of the workers that any server has heard of within the last five minutes, in the order of their ids. Send
    /// the answer's `next_page_token` as `page_token` to read the next page.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn workers(&self, list: ListWorkersRequest) -> Result<ListWorkersResponse, Error> {
        let send = |mut workers: crate::RawWorkerClient, request| async move { workers.list_workers(request).await };
        self.call_on(&self.raw_workers(), self.timeout(), list, true, send).await
    }

    /// Reads a page of jobs, the newest first. Send the answer's `next_page_token` as `page_token` to read the next page.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn list(&self, list: ListJobsRequest) -> Result<ListJobsResponse, Error> {
        self.call(list, true, |mut service, request| async move { service.list_jobs(request).await }).await
    }
}
