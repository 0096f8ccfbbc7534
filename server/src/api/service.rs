//! `jobledger.v1.JobService`: a few lines for each RPC.

use std::time::Duration;

use jobledger_proto::v1::{self as pb, job_service_server::JobService};
use tokio_stream::Empty;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait, metadata::MetadataValue};

use super::{
    buffered_response::OnTaken,
    caller::Caller,
    convert, explain, listing,
    request::{self, JobName},
    statistics,
    status::{ApiError, item_error},
    stream::{self, EventStream},
};
use crate::{
    domain::transition::TransitionError,
    ledger::{Command, JobReply, Ledger, LedgerError},
    net::Peer,
};

/// The metadata key by which the answer of a stream names its log.
const LOG_ID_HEADER: &str = "jobledger-log-id";

pub(crate) struct Service {
    ledger: Ledger,
    slow_consumer_after: Duration,
    draining: CancellationToken,
}

impl Service {
    pub(crate) fn new(ledger: Ledger, slow_consumer_after: Duration, draining: CancellationToken) -> Self {
        Self { ledger, slow_consumer_after, draining }
    }

    pub(super) async fn stream_events(
        &self,
        request: Request<pb::StreamJobEventsRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let caller = Caller::of(request.extensions())?;
        let peer = request.extensions().get::<Peer>().cloned();
        let wanted = request::subscribe(request.into_inner())?;
        if wanted.filter.job.is_none() {
            caller.may_follow_all()?;
        }
        if self.draining.is_cancelled() {
            return Err(ApiError::from(LedgerError::Draining).into());
        }
        let subscription = self
            .ledger
            .subscribe(caller.org(), peer.as_ref().map(|peer| peer.address), wanted)
            .await
            .map_err(ApiError::from)?;
        let ends = peer.map(|peer| (peer.ending, peer.cut)).unwrap_or_default();
        let log_id = MetadataValue::try_from(subscription.log_id().to_string());
        let stream = stream::start(subscription, caller.view(), self.slow_consumer_after, self.draining.clone(), ends);
        let mut answer = Response::new(stream);
        if let Ok(log_id) = log_id {
            answer.metadata_mut().insert(LOG_ID_HEADER, log_id);
        }
        Ok(answer)
    }

    /// Submits the valid items of a batch. Returns a result for each item, in order.
    async fn submit_all(
        &self,
        caller: &Caller,
        items: impl Iterator<Item = Result<Command, ApiError>>,
    ) -> Result<Vec<Result<JobReply, tonic_types::Status>>, ApiError> {
        let (mut commands, mut refused) = (Vec::new(), Vec::new());
        for item in items {
            refused.push(item.map(|command| commands.push(command)).err());
        }
        let mut replies = self.ledger.submit_all(caller.by.clone(), commands).await?.into_iter();
        let mut answer = |refused: Option<ApiError>| match refused {
            Some(error) => Err(item_error(error)),
            None => replies.next().unwrap_or(Err(LedgerError::OutcomeUnknown)).map_err(item_error),
        };
        Ok(refused.into_iter().map(&mut answer).collect())
    }
}

#[async_trait]
impl JobService for Service {
    async fn create_job(
        &self,
        request: Request<pb::CreateJobRequest>,
    ) -> Result<Response<pb::CreateJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let command = request::create(request.into_inner(), &caller)?;
        let JobReply { job, deduplicated, .. } =
            self.ledger.submit(caller.by, command).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::CreateJobResponse { job: Some(convert::job(&job)), deduplicated }))
    }

    async fn batch_create_jobs(
        &self,
        request: Request<pb::BatchCreateJobsRequest>,
    ) -> Result<Response<pb::BatchCreateJobsResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let requests = request.into_inner().requests;
        request::items("requests", requests.len())?;
        let replies =
            self.submit_all(&caller, requests.into_iter().map(|request| request::create(request, &caller))).await?;
        let result = |reply| match reply {
            Ok(JobReply { job, deduplicated, .. }) => {
                pb::BatchCreateJobsResult { job: Some(convert::brief_job(&job)), deduplicated, error: None }
            }
            Err(error) => pb::BatchCreateJobsResult { error: Some(error), ..Default::default() },
        };
        Ok(Response::new(pb::BatchCreateJobsResponse { results: replies.into_iter().map(result).collect() }))
    }

    async fn list_jobs(&self, request: Request<pb::ListJobsRequest>) -> Result<Response<pb::ListJobsResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let listing = request::list(request.into_inner())?;
        let turn = self.ledger.read_turn(caller.org()).await.map_err(ApiError::from)?;
        let mut response = Response::new(listing::answer(&turn, caller.org(), listing, caller.view()).await?);
        response.extensions_mut().insert(turn);
        Ok(response)
    }

    async fn claim_jobs(
        &self,
        request: Request<pb::ClaimJobsRequest>,
    ) -> Result<Response<pb::ClaimJobsResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (claim, wait, about) = request::claim(request.into_inner())?;
        let _heard = self.ledger.hear_claim(caller.org(), &claim.worker, about);
        let mut leases = self.ledger.claim(caller.by, claim, wait).await.map_err(ApiError::from)?;
        let answer = pb::ClaimJobsResponse { leases: leases.jobs().iter().map(convert::lease).collect() };
        let mut response = Response::new(answer);
        if let Some(turn) = leases.take_turn() {
            response.extensions_mut().insert(turn);
        }
        response.extensions_mut().insert(OnTaken::new(leases.into_delivery()));
        Ok(response)
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (worker, beats) = request::heartbeat(request.into_inner())?;
        let (commands, refusals): (Vec<_>, Vec<_>) = beats.into_iter().map(|beat| (beat.command, beat.refusal)).unzip();
        let held: Vec<_> = commands.iter().map(Option::is_some).collect();
        let commands = commands.into_iter().flatten().collect();
        let org = caller.org();
        let replies = self.ledger.submit_all(caller.by, commands).await.map_err(ApiError::from)?;
        // Anybody can send made-up names and tokens.
        if replies.iter().any(Result::is_ok) {
            self.ledger.hear_heartbeat(org, &worker);
        }
        let mut replies = replies.into_iter();
        let result = |(is_held, refusal): (bool, Option<ApiError>)| {
            let reply = if is_held { replies.next() } else { None };
            let mut result = match reply {
                Some(Ok(reply)) => convert::heartbeat(Some(&reply.job)),
                // The item was refused and names no lease: whether a lease is lost is unknown.
                None if refusal.is_some() => pb::HeartbeatResult::default(),
                None
                | Some(Err(LedgerError::JobNotFound { .. } | LedgerError::Transition(TransitionError::LeaseLost))) => {
                    convert::heartbeat(None)
                }
                // The lease was not extended, but is not known to be lost.
                Some(Err(error)) => {
                    pb::HeartbeatResult { error: Some(item_error(ApiError::from(error))), ..Default::default() }
                }
            };
            if result.error.is_none() && !result.lease_lost {
                result.error = refusal.map(item_error);
            }
            result
        };
        let results = held.into_iter().zip(refusals).map(result).collect();
        Ok(Response::new(pb::HeartbeatResponse { results }))
    }

    async fn cancel_job(
        &self,
        request: Request<pb::CancelJobRequest>,
    ) -> Result<Response<pb::CancelJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let command = request::cancel(request.into_inner())?;
        let JobReply { job, .. } = self.ledger.submit(caller.by, command).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::CancelJobResponse { job: Some(convert::job(&job)) }))
    }

    async fn retry_job(&self, request: Request<pb::RetryJobRequest>) -> Result<Response<pb::RetryJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let command = request::retry(request.into_inner())?;
        let JobReply { job, .. } = self.ledger.submit(caller.by, command).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::RetryJobResponse { job: Some(convert::job(&job)) }))
    }

    async fn update_job(
        &self,
        request: Request<pb::UpdateJobRequest>,
    ) -> Result<Response<pb::UpdateJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (job, edit) = request::edit(request.into_inner())?;
        let JobReply { job, .. } = self.ledger.edit(caller.by, job, edit).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::UpdateJobResponse { job: Some(convert::job(&job)) }))
    }

    async fn erase_job(&self, request: Request<pb::EraseJobRequest>) -> Result<Response<pb::EraseJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (job, erase) = request::erase(request.into_inner())?;
        let JobReply { job, .. } = self.ledger.erase(caller.by, job, erase).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::EraseJobResponse { job: Some(convert::job(&job)) }))
    }

    async fn get_job(&self, request: Request<pb::GetJobRequest>) -> Result<Response<pb::GetJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let found = match request::get(request.into_inner())? {
            JobName::Id(id) => self.ledger.job(caller.org(), id).await,
            JobName::Key(key) => self.ledger.job_with_key(caller.org(), key).await,
        };
        let (record, turn) = found.map_err(ApiError::from)?;
        let job = convert::seen_job(convert::job_record(&record), caller.view());
        let mut response = Response::new(pb::GetJobResponse { job: Some(job) });
        if let Some(turn) = turn {
            response.extensions_mut().insert(turn);
        }
        Ok(response)
    }

    async fn explain_job(
        &self,
        request: Request<pb::ExplainJobRequest>,
    ) -> Result<Response<pb::ExplainJobResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (job, view) = (request::explain(&request.into_inner())?, caller.view());
        let explained = self.ledger.explain(caller.by, job).await.map_err(ApiError::from)?;
        Ok(Response::new(explain::answer(&explained, view)))
    }

    async fn update_job_status(
        &self,
        request: Request<pb::UpdateJobStatusRequest>,
    ) -> Result<Response<pb::UpdateJobStatusResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let command = request::update(request.into_inner())?;
        let JobReply { job, .. } = self.ledger.submit(caller.by, command).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::UpdateJobStatusResponse {
            cancel_requested: job.cancel_requested,
            job: Some(convert::job(&job)),
        }))
    }

    async fn batch_update_job_status(
        &self,
        request: Request<pb::BatchUpdateJobStatusRequest>,
    ) -> Result<Response<pb::BatchUpdateJobStatusResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let updates = request.into_inner().updates;
        request::items("updates", updates.len())?;
        let replies = self.submit_all(&caller, updates.into_iter().map(request::update)).await?;
        let result = |reply: Result<JobReply, _>| match reply {
            Ok(JobReply { job, .. }) => pb::BatchUpdateJobStatusResult {
                job: Some(convert::brief_job(&job)),
                cancel_requested: job.cancel_requested,
                error: None,
            },
            Err(error) => pb::BatchUpdateJobStatusResult { error: Some(error), ..Default::default() },
        };
        Ok(Response::new(pb::BatchUpdateJobStatusResponse { results: replies.into_iter().map(result).collect() }))
    }

    type StreamJobEventsStream = Empty<Result<pb::StreamJobEventsResponse, Status>>;

    /// Served by [`WireService`](super::wire::WireService), which encodes events once.
    async fn stream_job_events(
        &self,
        _request: Request<pb::StreamJobEventsRequest>,
    ) -> Result<Response<Self::StreamJobEventsStream>, Status> {
        Err(Status::unimplemented("StreamJobEvents is served otherwise"))
    }

    async fn get_statistics(
        &self,
        request: Request<pb::GetStatisticsRequest>,
    ) -> Result<Response<pb::GetStatisticsResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let query = request::statistics(request.into_inner())?;
        let found = self.ledger.statistics(caller.org(), &query).await.map_err(ApiError::from)?;
        Ok(Response::new(statistics::answer(found, &query)))
    }
}
