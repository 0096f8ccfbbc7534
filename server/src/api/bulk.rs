//! `jobledger.v1.BulkOperationService`: a few lines for each RPC.

use jobledger_proto::v1::{self as pb, bulk_operation_service_server::BulkOperationService};
use tonic::{Request, Response, Status, async_trait};

use super::{caller::Caller, convert, request, status::ApiError};
use crate::ledger::{BulkCommand, BulkPage, Ledger};

pub(crate) struct BulkOperations {
    ledger: Ledger,
}

impl BulkOperations {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }

    async fn submit(&self, caller: Caller, command: BulkCommand) -> Result<pb::BulkOperation, ApiError> {
        let org = caller.org();
        Ok(convert::bulk_operation(org, &self.ledger.bulk(caller.by, command).await?))
    }
}

#[async_trait]
impl BulkOperationService for BulkOperations {
    async fn start_bulk_operation(
        &self,
        request: Request<pb::StartBulkOperationRequest>,
    ) -> Result<Response<pb::StartBulkOperationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let command = BulkCommand::Start(Box::new(request::start_bulk(request.into_inner())?));
        let operation = Some(self.submit(caller, command).await?);
        Ok(Response::new(pb::StartBulkOperationResponse { operation }))
    }

    async fn get_bulk_operation(
        &self,
        request: Request<pb::GetBulkOperationRequest>,
    ) -> Result<Response<pb::GetBulkOperationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let id = request::operation(&request.get_ref().operation_id)?;
        let found = self.ledger.bulk_operation(caller.org(), id).await.map_err(ApiError::from)?;
        let operation = Some(convert::bulk_operation(caller.org(), &found));
        Ok(Response::new(pb::GetBulkOperationResponse { operation }))
    }

    async fn list_bulk_operations(
        &self,
        request: Request<pb::ListBulkOperationsRequest>,
    ) -> Result<Response<pb::ListBulkOperationsResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (before, limit) = request::list_bulk(request.into_inner())?;
        let BulkPage { operations, next } =
            self.ledger.bulk_operations(caller.org(), before, limit).await.map_err(ApiError::from)?;
        let one = |operation| convert::bulk_operation(caller.org(), operation);
        Ok(Response::new(pb::ListBulkOperationsResponse {
            operations: operations.iter().map(one).collect(),
            next_page_token: next.map(request::bulk_token).unwrap_or_default(),
        }))
    }

    async fn stop_bulk_operation(
        &self,
        request: Request<pb::StopBulkOperationRequest>,
    ) -> Result<Response<pb::StopBulkOperationResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let command = BulkCommand::Stop(request::operation(&request.get_ref().operation_id)?);
        let operation = Some(self.submit(caller, command).await?);
        Ok(Response::new(pb::StopBulkOperationResponse { operation }))
    }
}
