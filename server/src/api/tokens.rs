//! The RPCs about API tokens.

use jobledger_proto::v1 as pb;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{caller::Caller, convert::timestamp, request, server_info::word, status::ApiError};
use crate::{
    access::Secret,
    domain::{
        access::ApiToken,
        clock::{Clock as _, SystemClock},
    },
    ledger::Ledger,
};

pub(super) async fn create(
    ledger: &Ledger,
    request: Request<pb::CreateTokenRequest>,
) -> Result<Response<pb::CreateTokenResponse>, Status> {
    let caller = Caller::of(request.extensions())?;
    let now = SystemClock.now();
    let (name, roles, expires_at) = request::create_token(request.into_inner(), now)?;
    let secret = Secret::generate(Some(caller.org())).map_err(|error| {
        tracing::error!(%error, "the system gives no random bytes");
        ApiError::Internal
    })?;
    let token = ApiToken {
        id: Uuid::now_v7(),
        org: Some(caller.org()),
        digest: secret.digest(),
        name,
        roles,
        created_at: now,
        expires_at: Some(expires_at),
        revoked_at: None,
        used_at: None,
    };
    let made = ledger.create_token(caller.org(), token).await.map_err(ApiError::from)?;
    tracing::info!(org_id = %caller.org(), actor = caller.name().map(|name| name.to_string()), token_id = %made.id, "an API token was made");
    Ok(Response::new(pb::CreateTokenResponse { token: Some(shown(&made)), secret: secret.text().to_owned() }))
}

pub(super) async fn list(
    ledger: &Ledger,
    request: Request<pb::ListTokensRequest>,
) -> Result<Response<pb::ListTokensResponse>, Status> {
    let caller = Caller::of(request.extensions())?;
    let (after, limit) = request::list_tokens(request.into_inner())?;
    let mut tokens = ledger.tokens(caller.org(), after, limit + 1).await.map_err(ApiError::from)?;
    let has_more = tokens.len() > limit;
    tokens.truncate(limit);
    let next_page_token = tokens.last().filter(|_| has_more).map(|last| last.id.to_string()).unwrap_or_default();
    Ok(Response::new(pb::ListTokensResponse { tokens: tokens.iter().map(shown).collect(), next_page_token }))
}

pub(super) async fn revoke(
    ledger: &Ledger,
    request: Request<pb::RevokeTokenRequest>,
) -> Result<Response<pb::RevokeTokenResponse>, Status> {
    let caller = Caller::of(request.extensions())?;
    let id = request::revoke_token(&request.into_inner())?;
    let revoked = ledger.revoke_token(caller.org(), id).await.map_err(ApiError::from)?;
    tracing::debug!(org_id = %caller.org(), actor = caller.name().map(|name| name.to_string()), token_id = %id, "an API token was revoked");
    Ok(Response::new(pb::RevokeTokenResponse { token: Some(shown(&revoked)) }))
}

fn shown(token: &ApiToken) -> pb::ApiToken {
    pb::ApiToken {
        id: token.id.to_string(),
        name: token.name.clone(),
        roles: token.roles.iter().map(|role| word(role).into()).collect(),
        created_at: Some(timestamp(token.created_at)),
        expires_at: token.expires_at.map(timestamp),
        revoked_at: token.revoked_at.map(timestamp),
        last_used_at: token.used_at.map(timestamp),
    }
}
