//! Calls about API tokens.

use jobledger_proto::v1::{ApiToken, CreateTokenRequest, ListTokensRequest, ListTokensResponse, RevokeTokenRequest};

use crate::{Client, Error, RawServerClient, Token};

impl Client {
    /// Makes an API token of the organisation. Returns it and its text, which the service does not tell again: [`Token::text`]
    /// gives it. Not retried after UNAVAILABLE: the token may have been made.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::Exhausted`] if there are too many, [`Error::PermissionDenied`],
    /// [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn create_token(&self, token: CreateTokenRequest) -> Result<(ApiToken, Token), Error> {
        let send = |mut server: RawServerClient, request| async move { server.create_token(request).await };
        let made = self.call_on(&self.raw_server(), self.timeout(), token, false, send).await?;
        Ok((made.token.ok_or_else(|| Error::without("a token"))?, Token::new(&made.secret)?))
    }

    /// Reads a page of the organisation's API tokens, in the order in which they were made. Send the answer's `next_page_token`
    /// as `page_token` to read the next page.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`], [`Error::PermissionDenied`], [`Error::Unavailable`], [`Error::DeadlineExceeded`].
    pub async fn tokens(&self, list: ListTokensRequest) -> Result<ListTokensResponse, Error> {
        let send = |mut server: RawServerClient, request| async move { server.list_tokens(request).await };
        self.call_on(&self.raw_server(), self.timeout(), list, true, send).await
    }

    /// Revokes an API token: within 5 s every server refuses it.
    ///
    /// # Errors
    ///
    /// [`Error::TokenNotFound`], [`Error::InvalidRequest`], [`Error::PermissionDenied`], [`Error::Unavailable`],
    /// [`Error::DeadlineExceeded`].
    pub async fn revoke_token(&self, token_id: impl Into<String>) -> Result<ApiToken, Error> {
        let request = RevokeTokenRequest { token_id: token_id.into() };
        let send = |mut server: RawServerClient, request| async move { server.revoke_token(request).await };
        let revoked = self.call_on(&self.raw_server(), self.timeout(), request, true, send).await?;
        revoked.token.ok_or_else(|| Error::without("a token"))
    }
}
