//! Calls that create, or report on, many jobs at once.

use std::time::Duration;

use jobledger_proto::v1::{
    BatchCreateJobsRequest, BatchUpdateJobStatusRequest, CreateJobRequest, UpdateJobStatusRequest,
};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{Client, Created, Error, RawClient, Updated, client::is_repeatable, retry::Backoff};

impl Client {
    /// Creates up to 1,000 jobs, each once, and returns one result per job, in order. The returned jobs have only `id`,
    /// `status`, `attempt`, `created_at`, `etag` and `last_seq`. Items that fail for a transient reason are sent again
    /// until the timeout is over.
    ///
    /// # Errors
    ///
    /// The call fails as a whole as [`Client::create`] does, and with [`Error::InvalidRequest`] for more than 1,000 jobs.
    pub async fn create_all<J: Into<CreateJobRequest>>(
        &self,
        jobs: impl IntoIterator<Item = J>,
    ) -> Result<Vec<Result<Created, Error>>, Error> {
        let mut requests: Vec<CreateJobRequest> = jobs.into_iter().map(Into::into).collect();
        for request in requests.iter_mut().filter(|request| request.idempotency_key.is_empty()) {
            request.idempotency_key = Uuid::now_v7().to_string();
        }
        let send = |requests: Vec<CreateJobRequest>, within| async move {
            let request = BatchCreateJobsRequest { requests };
            let send = |mut service: RawClient, request| async move { service.batch_create_jobs(request).await };
            let answer = self.call_within(within, request, true, send).await?;
            let results = answer.results.into_iter().map(|result| match (result.error, result.job) {
                (Some(error), _) => Err(error.into()),
                (None, Some(job)) => Ok(Created { job, deduplicated: result.deduplicated }),
                (None, None) => Err(Error::without_job()),
            });
            Ok(results.collect())
        };
        self.until_all_are_answered(requests, |_| true, send).await
    }

    /// Reports on up to 1,000 jobs and returns one result per report, in order. The returned jobs have the same fields
    /// as those of [`Client::create_all`]. Items that fail for a transient reason are sent again where that is safe, as
    /// for [`Client::update`].
    ///
    /// # Errors
    ///
    /// Of the whole call: [`Error::InvalidRequest`] for more than 1,000 reports, [`Error::Unavailable`],
    /// [`Error::DeadlineExceeded`].
    pub async fn update_all<R: Into<UpdateJobStatusRequest>>(
        &self,
        reports: impl IntoIterator<Item = R>,
    ) -> Result<Vec<Result<Updated, Error>>, Error> {
        let updates: Vec<UpdateJobStatusRequest> = reports.into_iter().map(Into::into).collect();
        let send = |updates: Vec<UpdateJobStatusRequest>, within| async move {
            let is_repeatable = updates.iter().all(is_repeatable);
            let request = BatchUpdateJobStatusRequest { updates };
            let send = |mut service: RawClient, request| async move { service.batch_update_job_status(request).await };
            let answer = self.call_within(within, request, is_repeatable, send).await?;
            let results = answer.results.into_iter().map(|result| match (result.error, result.job) {
                (Some(error), _) => Err(error.into()),
                (None, Some(job)) => Ok(Updated { job, cancel_requested: result.cancel_requested }),
                (None, None) => Err(Error::without_job()),
            });
            Ok(results.collect())
        };
        self.until_all_are_answered(updates, is_repeatable, send).await
    }

    /// Sends all items, and sends items that failed for a transient reason again until the timeout is over.
    async fn until_all_are_answered<I: Clone, T, F>(
        &self,
        items: Vec<I>,
        is_repeatable: impl Fn(&I) -> bool,
        send: impl Fn(Vec<I>, Duration) -> F,
    ) -> Result<Vec<Result<T, Error>>, Error>
    where
        F: Future<Output = Result<Vec<Result<T, Error>>, Error>>,
    {
        let deadline = Instant::now() + self.timeout();
        let mut backoff = Backoff::default();
        let mut answers: Vec<_> = send(items.clone(), self.timeout()).await?.into_iter().map(Some).collect();
        loop {
            let failed: Vec<usize> = (0..items.len())
                .filter(|n| {
                    let error = answers.get(*n).and_then(Option::as_ref).and_then(|answer| answer.as_ref().err());
                    error.is_some_and(|error| {
                        error.is_unavailable() && is_repeatable(&items[*n]) || error.is_refused_for_now()
                    })
                })
                .collect();
            let errors = failed.iter().filter_map(|n| answers[*n].as_ref()?.as_ref().err());
            let wait = backoff.next(errors.filter_map(Error::retry_after).max());
            if failed.is_empty() || Instant::now() + wait >= deadline {
                return Ok(answers.into_iter().flatten().collect());
            }
            sleep(wait).await;
            let left = deadline.saturating_duration_since(Instant::now());
            // If the retry fails as a whole, the answers of the other items are still returned.
            let again = send(failed.iter().map(|n| items[*n].clone()).collect(), left).await;
            for (n, answer) in failed.into_iter().zip(again.unwrap_or_default()) {
                answers[n] = Some(answer);
            }
        }
    }
}
