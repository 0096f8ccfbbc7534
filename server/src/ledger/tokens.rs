//! API tokens of orgs, on behalf of their admins. Credentials are checked elsewhere (`access/`).

use std::sync::Arc;

use uuid::Uuid;

use super::{Ledger, LedgerError, error::Quantity};
use crate::{
    domain::{access::ApiToken, id::OrgId},
    store::Store,
};

/// Tokens of one org. Those that ended make room for others after an hour.
pub const MOST_TOKENS: usize = 1_000;

impl Ledger {
    /// Makes an API token of an org. Returns it with the database's time.
    ///
    /// # Errors
    ///
    /// [`LedgerError::QuotaExceeded`] if the org has [`MOST_TOKENS`]; an error of the database.
    pub async fn create_token(&self, org: OrgId, token: ApiToken) -> Result<ApiToken, LedgerError> {
        let make = move |store: Arc<dyn Store>| async move { store.create_token(&token, MOST_TOKENS).await };
        let (quantity, limit) = (Quantity::Tokens, MOST_TOKENS as u64);
        self.token_calls.read(org, make).await?.ok_or(LedgerError::QuotaExceeded { quantity, limit })
    }

    /// Reads at most `limit` API tokens of an org whose ids come after `after`, in ascending order: those made first come first.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn tokens(&self, org: OrgId, after: Uuid, limit: usize) -> Result<Vec<ApiToken>, LedgerError> {
        self.token_calls.read(org, move |store| async move { store.list_tokens(org, after, limit).await }).await
    }

    /// Revokes an API token of an org, unless it was revoked before. Servers notice within seconds.
    ///
    /// # Errors
    ///
    /// [`LedgerError::TokenNotFound`]; an error of the database.
    pub async fn revoke_token(&self, org: OrgId, id: Uuid) -> Result<ApiToken, LedgerError> {
        let revoke = move |store: Arc<dyn Store>| async move { store.revoke_token(org, id).await };
        self.token_calls.read(org, revoke).await?.ok_or(LedgerError::TokenNotFound { id })
    }
}
