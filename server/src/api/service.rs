//! `jobledger.v1.JobService`: a few lines an RPC.

use std::time::Duration;

use jobledger_proto::v1::{self as pb, job_service_server::JobService};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait};

use super::{
    convert, request,
    status::ApiError,
    stream::{self, EventStream},
};
use crate::ledger::{JobReply, Ledger, LedgerError};

/// The service over a ledger.
pub(crate) struct Service {
    ledger: Ledger,
    slow_consumer_after: Duration,
    draining: CancellationToken,
}

impl Service {
    pub(crate) fn new(ledger: Ledger, slow_consumer_after: Duration, draining: CancellationToken) -> Self {
        Self { ledger, slow_consumer_after, draining }
    }
}

#[async_trait]
impl JobService for Service {
    async fn create_job(
        &self,
        request: Request<pb::CreateJobRequest>,
    ) -> Result<Response<pb::CreateJobResponse>, Status> {
        let org = request::org(request.metadata())?;
        let command = request::create(request.into_inner())?;
        let JobReply { job, deduplicated } = self.ledger.submit(org, command).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::CreateJobResponse { job: Some(convert::job(&job)), deduplicated }))
    }

    async fn get_job(&self, request: Request<pb::GetJobRequest>) -> Result<Response<pb::GetJobResponse>, Status> {
        let org = request::org(request.metadata())?;
        let id = request::get(request.get_ref())?;
        let record = self.ledger.job(org, id).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::GetJobResponse { job: Some(convert::job_record(&record)) }))
    }

    async fn update_job_status(
        &self,
        request: Request<pb::UpdateJobStatusRequest>,
    ) -> Result<Response<pb::UpdateJobStatusResponse>, Status> {
        let org = request::org(request.metadata())?;
        let command = request::update(request.into_inner())?;
        let JobReply { job, .. } = self.ledger.submit(org, command).await.map_err(ApiError::from)?;
        Ok(Response::new(pb::UpdateJobStatusResponse {
            cancel_requested: job.cancel_requested,
            job: Some(convert::job(&job)),
        }))
    }

    type StreamJobEventsStream = EventStream;

    async fn stream_job_events(
        &self,
        request: Request<pb::StreamJobEventsRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let org = request::org(request.metadata())?;
        let wanted = request::subscribe(request.get_ref())?;
        if self.draining.is_cancelled() {
            return Err(ApiError::from(LedgerError::Draining).into());
        }
        let subscription = self.ledger.subscribe(org, wanted).await.map_err(ApiError::from)?;
        let stream = stream::start(subscription, self.slow_consumer_after, self.draining.clone());
        Ok(Response::new(stream))
    }

    async fn get_statistics(
        &self,
        request: Request<pb::GetStatisticsRequest>,
    ) -> Result<Response<pb::GetStatisticsResponse>, Status> {
        let org = request::org(request.metadata())?;
        let types = request::statistics(request.into_inner())?;
        let statistics = self.ledger.statistics(org, &types).await.map_err(ApiError::from)?;
        Ok(Response::new(convert::statistics(statistics)))
    }
}
