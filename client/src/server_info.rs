//! Calls about the server and the organisations that it keeps logs of.

use jobledger_proto::v1::{GetServerInfoRequest, GetServerInfoResponse, ListOrgsRequest, ListOrgsResponse};

use crate::{Client, Error, RawServerClient};

impl Client {
    /// Reads the server's version, the caller's rights, and the limits of the caller's organisation with what it uses of them.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn server_info(&self) -> Result<GetServerInfoResponse, Error> {
        let send = |mut server: RawServerClient, request| async move { server.get_server_info(request).await };
        self.call_on(&self.raw_server(), self.timeout(), GetServerInfoRequest {}, true, send).await
    }

    /// Reads a page of the organisations that have a log, in the order of their ids. For operators. Send the answer's
    /// `next_page_token` as `page_token` to read the next page.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn orgs(&self, list: ListOrgsRequest) -> Result<ListOrgsResponse, Error> {
        let send = |mut server: RawServerClient, request| async move { server.list_orgs(request).await };
        self.call_on(&self.raw_server(), self.timeout(), list, true, send).await
    }
}
