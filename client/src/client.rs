//! The client and its calls.

use std::{future::Future, sync::Arc, time::Duration};

use jobledger_proto::v1::{
    CreateJobRequest, GetJobRequest, GetStatisticsRequest, GetStatisticsResponse, Job, JobStatus,
    StreamJobEventsRequest, UpdateJobStatusRequest, bulk_operation_service_client::BulkOperationServiceClient,
    job_service_client::JobServiceClient, job_type_service_client::JobTypeServiceClient,
    server_service_client::ServerServiceClient, worker_service_client::WorkerServiceClient,
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::{
    ClientBuilder, Endpoints, Error, Follow, Item, RawBulkClient, RawClient, RawJobTypeClient, RawServerClient,
    RawWorkerClient, View, WithCaller, failover::Connections, retry::Backoff, subscription::Subscription,
};

/// The response metadata of a stream that has the log id.
const LOG_ID_HEADER: &str = "jobledger-log-id";
const FINISHED: [JobStatus; 4] = [JobStatus::Succeeded, JobStatus::Failed, JobStatus::Canceled, JobStatus::DeadLetter];

/// A client of one server or cluster. Cheap to clone: clones share their connections.
#[derive(Debug, Clone)]
pub struct Client {
    service: RawClient,
    types: RawJobTypeClient,
    bulk: RawBulkClient,
    server: RawServerClient,
    workers: RawWorkerClient,
    connections: Connections,
    timeout: Duration,
    builder: Arc<ClientBuilder>,
}

/// The result of [`Client::create`].
#[derive(Debug, Clone, PartialEq)]
pub struct Created {
    /// The job, without payload and result.
    pub job: Job,
    /// True if a job with this idempotency key existed before; the call wrote nothing then.
    pub deduplicated: bool,
}

/// The result of [`Client::update`].
#[derive(Debug, Clone, PartialEq)]
pub struct Updated {
    /// The job after the report, without payload and result.
    pub job: Job,
    /// True if somebody asked for the job to be canceled: stop the work, and report it as canceled.
    pub cancel_requested: bool,
}

impl Client {
    pub(crate) fn of(connections: Connections, caller: WithCaller, timeout: Duration, builder: ClientBuilder) -> Self {
        let service = JobServiceClient::with_interceptor(connections.clone(), caller.clone());
        let types = JobTypeServiceClient::with_interceptor(connections.clone(), caller.clone());
        let bulk = BulkOperationServiceClient::with_interceptor(connections.clone(), caller.clone());
        let server = ServerServiceClient::with_interceptor(connections.clone(), caller.clone());
        let workers = WorkerServiceClient::with_interceptor(connections.clone(), caller);
        Self { service, types, bulk, server, workers, connections, timeout, builder: Arc::new(builder) }
    }

    /// The same client with connections of its own. They belong to the tokio runtime that calls this.
    pub(crate) fn reconnected(&self) -> Result<Self, Error> {
        ClientBuilder::clone(&self.builder).build()
    }

    pub(crate) fn endpoints(&self) -> &[String] {
        self.builder.endpoints()
    }

    /// Bounds a call in time. After a timeout, later calls go to the next server.
    pub(crate) async fn bounded<T>(
        &self,
        until: Instant,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Error> {
        let server = self.connections.current();
        match timeout_at(until, call).await {
            Ok(answer) => Ok(answer?),
            Err(_) => {
                self.connections.leave(server, &Error::DeadlineExceeded);
                Err(Error::DeadlineExceeded)
            }
        }
    }

    /// Builds a client with the defaults of [`ClientBuilder`]. It connects on the first call.
    ///
    /// # Errors
    ///
    /// As for [`ClientBuilder::build`].
    pub fn new(endpoints: impl Into<Endpoints>) -> Result<Self, Error> {
        Self::builder(endpoints).build()
    }

    /// Configures a client of one server, or of several servers on the same database. Several URLs are given as a list,
    /// or as a string separated by commas. If a call does not reach one server, the next call goes to the next server.
    pub fn builder(endpoints: impl Into<Endpoints>) -> ClientBuilder {
        ClientBuilder::new(endpoints.into())
    }

    /// Creates a job once. A job without an idempotency key gets a random one, so that a retry is safe. That key is a
    /// UUID of version 7, so keys that are made in sequence are neighbours in the server's index.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::PayloadTooLarge`], [`Error::IdempotencyKeyReused`], [`Error::Exhausted`],
    /// [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn create(&self, job: impl Into<CreateJobRequest>) -> Result<Created, Error> {
        let mut request = job.into();
        if request.idempotency_key.is_empty() {
            request.idempotency_key = Uuid::now_v7().to_string();
        }
        let answer =
            self.call(request, true, |mut service, request| async move { service.create_job(request).await }).await?;
        Ok(Created { deduplicated: answer.deduplicated, job: answer.job.ok_or_else(Error::without_job)? })
    }

    /// Reads a job with its payload, stage, progress and result.
    ///
    /// # Errors
    ///
    /// [`Error::JobNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn get(&self, job_id: impl Into<String>) -> Result<Job, Error> {
        self.get_of(GetJobRequest { job_id: job_id.into(), ..GetJobRequest::default() }).await
    }

    /// Reads the job that was created with this idempotency key, with its payload, stage, progress and result.
    ///
    /// # Errors
    ///
    /// [`Error::KeyNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn get_by_key(&self, idempotency_key: impl Into<String>) -> Result<Job, Error> {
        self.get_of(GetJobRequest { idempotency_key: idempotency_key.into(), ..GetJobRequest::default() }).await
    }

    async fn get_of(&self, request: GetJobRequest) -> Result<Job, Error> {
        let answer =
            self.call(request, true, |mut service, request| async move { service.get_job(request).await }).await?;
        answer.job.ok_or_else(Error::without_job)
    }

    /// Reports on a job. Reporting the same outcome twice succeeds and writes nothing the second time.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::PayloadTooLarge`], [`Error::JobNotFound`], [`Error::LeaseLost`],
    /// [`Error::EtagMismatch`], [`Error::InvalidTransition`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn update(&self, report: impl Into<UpdateJobStatusRequest>) -> Result<Updated, Error> {
        let request = report.into();
        let repeatable = is_repeatable(&request);
        let answer = self
            .call(request, repeatable, |mut service, request| async move { service.update_job_status(request).await })
            .await?;
        Ok(Updated { cancel_requested: answer.cancel_requested, job: answer.job.ok_or_else(Error::without_job)? })
    }

    /// Counts the org's jobs of these types, at most 100. An empty list counts the jobs of all types.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn statistics(&self, types: &[&str]) -> Result<GetStatisticsResponse, Error> {
        let types = types.iter().map(ToString::to_string).collect();
        self.statistics_of(GetStatisticsRequest { types, ..GetStatisticsRequest::default() }).await
    }

    /// Counts the org's jobs, and what happened to them over a window, optionally as a series by minute or hour.
    ///
    /// # Errors
    ///
    /// As for [`Client::statistics`].
    pub async fn statistics_of(&self, request: GetStatisticsRequest) -> Result<GetStatisticsResponse, Error> {
        self.call(request, true, |mut service, request| async move { service.get_statistics(request).await }).await
    }

    /// Subscribes to events; see [`Subscription`]. Returns once the server has accepted the subscription.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::JobNotFound`], [`Error::CursorAhead`], [`Error::CursorExpired`],
    /// [`Error::EpochChanged`], [`Error::Exhausted`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn subscribe(&self, follow: impl Into<StreamJobEventsRequest>) -> Result<Subscription, Error> {
        Subscription::open(self.clone(), follow.into()).await
    }

    /// Waits without bound until a job has finished, and reads it with its result. Wrap the call in a timeout to limit it. Each
    /// wait takes one of the streams that a connection may have open (1,000 by default), or waits until one is free.
    ///
    /// # Errors
    ///
    /// [`Error::JobNotFound`], also if retention removes the job first; [`Error::InvalidRequest`]; any other error that
    /// is not [transient](Error::is_transient).
    pub async fn wait_for(&self, job_id: impl Into<String>) -> Result<Job, Error> {
        let job_id = job_id.into();
        let mut backoff = Backoff::default();
        loop {
            let error = match self.follow_to_end(&job_id).await {
                Ok(Some(job)) => return Ok(job),
                // RetryJob queued the job again after its stream ended.
                Ok(None) => continue,
                Err(error) => error,
            };
            let has_other_log = matches!(error, Error::EpochChanged { .. } | Error::CursorAhead { .. });
            if !(error.is_transient() || has_other_log) {
                return Err(error);
            }
            tracing::debug!(%error, job_id, "waiting on");
            sleep(backoff.next(error.retry_after())).await;
        }
    }

    /// Follows a job until its stream ends. Returns the job if it has finished by then.
    async fn follow_to_end(&self, job_id: &str) -> Result<Option<Job>, Error> {
        let mut events = self.subscribe(Follow::job(job_id).snapshot().statuses(FINISHED)).await?;
        while let Some(item) = events.next().await {
            if let Item::Snapshot(job) = item? {
                return Ok(Some(*job));
            }
        }
        let job = self.get(job_id).await?;
        Ok(FINISHED.contains(&job.status()).then_some(job))
    }

    /// Keeps a local copy of the matching jobs up to date; see [`View`]. Returns once the copy is complete.
    ///
    /// # Errors
    ///
    /// As for [`Client::subscribe`]; [`Error::InvalidRequest`] if the request has a cursor.
    pub async fn view(&self, follow: impl Into<StreamJobEventsRequest>) -> Result<View, Error> {
        View::open(self.clone(), follow.into()).await
    }

    /// The generated client. Its calls carry the org and the token, but no deadline, and the client does not repeat them.
    pub fn raw(&self) -> RawClient {
        self.service.clone()
    }

    /// The same for JobTypeService.
    pub fn raw_job_types(&self) -> RawJobTypeClient {
        self.types.clone()
    }

    /// The same for BulkOperationService.
    pub fn raw_bulk(&self) -> RawBulkClient {
        self.bulk.clone()
    }

    /// The same for ServerService.
    pub fn raw_server(&self) -> RawServerClient {
        self.server.clone()
    }

    /// The same for WorkerService.
    pub fn raw_workers(&self) -> RawWorkerClient {
        self.workers.clone()
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Opens one event stream, with retries until the deadline. Returns the log id too, empty if the server sent none.
    pub(crate) async fn open_stream(
        &self,
        request: StreamJobEventsRequest,
    ) -> Result<(tonic::Streaming<jobledger_proto::v1::StreamJobEventsResponse>, String), Error> {
        self.call(request, true, |mut service, mut request| async move {
            // A deadline on the request would bound the whole stream. Only the opening is bounded, by `call`.
            request.metadata_mut().remove("grpc-timeout");
            let answer = service.stream_job_events(request).await?;
            let log_id = answer.metadata().get(LOG_ID_HEADER).and_then(|id| id.to_str().ok()).unwrap_or_default();
            let log_id = log_id.to_owned();
            Ok(Response::new((answer.into_inner(), log_id)))
        })
        .await
    }

    /// Sends a request until it is answered, fails for good, or the client's timeout is over.
    pub(crate) async fn call<Req, Res, F>(
        &self,
        message: Req,
        repeatable: bool,
        send: impl Fn(RawClient, Request<Req>) -> F,
    ) -> Result<Res, Error>
    where
        Req: Clone,
        F: Future<Output = Result<Response<Res>, Status>>,
    {
        self.call_within(self.timeout, message, repeatable, send).await
    }

    pub(crate) async fn call_within<Req, Res, F>(
        &self,
        timeout: Duration,
        message: Req,
        repeatable: bool,
        send: impl Fn(RawClient, Request<Req>) -> F,
    ) -> Result<Res, Error>
    where
        Req: Clone,
        F: Future<Output = Result<Response<Res>, Status>>,
    {
        self.call_on(&self.service, timeout, message, repeatable, send).await
    }

    /// The same for any service of the contract.
    pub(crate) async fn call_on<S, Req, Res, F>(
        &self,
        service: &S,
        timeout: Duration,
        message: Req,
        repeatable: bool,
        send: impl Fn(S, Request<Req>) -> F,
    ) -> Result<Res, Error>
    where
        S: Clone,
        Req: Clone,
        F: Future<Output = Result<Response<Res>, Status>>,
    {
        let deadline = Instant::now() + timeout;
        let mut backoff = Backoff::default();
        loop {
            let mut request = Request::new(message.clone());
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
            let error = match self.bounded(deadline, send(service.clone(), request)).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(error) => error,
            };
            let wait = backoff.next(error.retry_after());
            let may_repeat = repeatable && error.is_unavailable() || error.is_refused_for_now();
            if !may_repeat || Instant::now() + wait >= deadline {
                return Err(error);
            }
            tracing::debug!(%error, wait_ms = wait.as_millis() as u64, "trying again");
            sleep(wait).await;
        }
    }
}

/// True if sending a report twice has the same effect as sending it once, whatever happens in between.
///
/// The service recognises a repeated outcome until the next attempt begins. After a retryable failure or a release that
/// may be soon, and the repetition would end the next attempt. An etag or a lease rules that out. On a report without
/// an outcome an etag prevents repetition, because a first try that went through has changed the etag.
pub(crate) fn is_repeatable(request: &UpdateJobStatusRequest) -> bool {
    let is_conditional = !request.etag.is_empty();
    let is_held = !request.lease_token.is_empty();
    match request.status.map(JobStatus::try_from) {
        None | Some(Ok(JobStatus::Running)) => !is_conditional,
        Some(Ok(JobStatus::Succeeded | JobStatus::Canceled)) => true,
        Some(Ok(JobStatus::Failed)) => is_conditional || is_held || request.retryable == Some(false),
        Some(_) => is_conditional || is_held,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Report;

    #[test]
    fn only_reports_that_are_safe_to_repeat_are_repeated() {
        let repeatable = |report: Report| is_repeatable(&report.into());
        for report in [Report::start("j"), Report::progress("j")] {
            assert!(repeatable(report.clone()) && !repeatable(report.etag("1")));
        }
        for report in [Report::succeeded("j"), Report::canceled("j"), Report::failed("j", "E", "").permanent()] {
            assert!(repeatable(report.clone()) && repeatable(report.etag("1")));
        }
        for report in [Report::failed("j", "E", ""), Report::released("j")] {
            assert!(!repeatable(report.clone()) && repeatable(report.clone().etag("1")));
            assert!(repeatable(report.lease("token")));
        }
    }

    #[test]
    fn outside_a_runtime_a_client_is_an_error() {
        let error = Client::new("http://localhost:1").unwrap_err();
        assert!(matches!(&error, Error::Runtime(reason) if reason.contains("tokio runtime")), "{error}");
        assert!(crate::shutdown_signal().is_err());
    }

    #[tokio::test]
    async fn an_endpoint_that_can_not_work_is_refused_at_once() {
        for endpoint in ["127.0.0.1:50051", "ftp://localhost:1", "http://", "http://a b"] {
            assert!(matches!(Client::new(endpoint), Err(Error::Endpoint(_))), "{endpoint}");
        }
        for endpoints in [vec![], vec!["http://localhost:1", "localhost:2"]] {
            assert!(matches!(Client::new(endpoints), Err(Error::Endpoint(_))));
        }
        let several = Client::new("http://localhost:1, http://localhost:2").unwrap();
        assert_eq!(several.endpoints(), ["http://localhost:1", "http://localhost:2"]);
        for builder in [
            Client::builder("http://localhost:1").ca("…"),
            Client::builder("https://localhost:1").ca("…").identity("…", "…"),
        ] {
            assert!(matches!(builder.build(), Err(Error::Endpoint(_))));
        }
    }
}
