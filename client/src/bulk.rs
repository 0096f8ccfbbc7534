//! Calls about bulk operations.

use jobledger_proto::v1::{
    BulkOperation, GetBulkOperationRequest, ListBulkOperationsRequest, ListBulkOperationsResponse,
    StartBulkOperationRequest, StopBulkOperationRequest,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::{Client, Error, RawBulkClient};

impl Client {
    /// Starts a bulk operation, and returns it as it starts. It goes on by itself. A request without an id gets a random one, so
    /// that a retry is safe.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::BulkOperationExists`], [`Error::Exhausted`] if too many are under way,
    /// [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn start_bulk(&self, mut request: StartBulkOperationRequest) -> Result<BulkOperation, Error> {
        if request.operation_id.is_empty() {
            request.operation_id = Uuid::now_v7().to_string();
        }
        let send = |mut bulk: RawBulkClient, request| async move { bulk.start_bulk_operation(request).await };
        self.on_bulk(request, send).await?.operation.ok_or_else(without)
    }

    /// Reads a bulk operation.
    ///
    /// # Errors
    ///
    /// [`Error::BulkOperationNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn bulk_operation(&self, operation_id: impl Into<String>) -> Result<BulkOperation, Error> {
        let request = GetBulkOperationRequest { operation_id: operation_id.into() };
        let send = |mut bulk: RawBulkClient, request| async move { bulk.get_bulk_operation(request).await };
        self.on_bulk(request, send).await?.operation.ok_or_else(without)
    }

    /// Reads a page of bulk operations, the newest first. Send the answer's `next_page_token` as `page_token` to read the next
    /// page.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn bulk_operations(&self, list: ListBulkOperationsRequest) -> Result<ListBulkOperationsResponse, Error> {
        self.on_bulk(list, |mut bulk, request| async move { bulk.list_bulk_operations(request).await }).await
    }

    /// Stops a bulk operation: once this returns, no further job is changed. What was done stays.
    ///
    /// # Errors
    ///
    /// [`Error::BulkOperationNotFound`], [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn stop_bulk(&self, operation_id: impl Into<String>) -> Result<BulkOperation, Error> {
        let request = StopBulkOperationRequest { operation_id: operation_id.into() };
        let send = |mut bulk: RawBulkClient, request| async move { bulk.stop_bulk_operation(request).await };
        self.on_bulk(request, send).await?.operation.ok_or_else(without)
    }

    /// Sends a request about bulk operations. Each may be repeated: the second time it changes nothing.
    async fn on_bulk<Req, Res, F>(
        &self,
        message: Req,
        send: impl Fn(RawBulkClient, Request<Req>) -> F,
    ) -> Result<Res, Error>
    where
        Req: Clone,
        F: Future<Output = Result<Response<Res>, Status>>,
    {
        self.call_on(&self.raw_bulk(), self.timeout(), message, true, send).await
    }
}

fn without() -> Error {
    Error::without("the operation")
}
