//! `jobledger.v1.ServerService`: a few lines for each RPC.

use std::{collections::BTreeSet, sync::Arc};

use jobledger_proto::v1::{self as pb, server_service_server::ServerService};
use tonic::{Request, Response, Status, async_trait};

use super::{
    caller::Caller,
    convert::timestamp,
    request,
    statistics::{counts, total},
    status::ApiError,
    tokens,
};
use crate::{
    access::Credential,
    config::Config,
    domain::{
        access::{NO_ORG, Role},
        id::OrgId,
        job_type::ALL_TYPES,
        status::JobStatus,
    },
    ledger::{Ledger, Usage},
};

const MAX_JOBS: &str = "max-jobs-per-org";
const MAX_BYTES: &str = "max-bytes-per-org";
const MAX_TYPES: &str = "max-types-per-org";

/// What of a server's configuration its callers are told.
pub(crate) struct ServerFacts {
    database: &'static str,
    /// Limits by the option that sets them, in the order of docs/operations.md.
    limits: Vec<(&'static str, Option<u64>)>,
}

impl ServerFacts {
    pub(crate) fn of(config: &Config) -> Self {
        let (calls, limits) = (&config.calls, &config.limits);
        let some = |n: usize| Some(n as u64);
        let limits = vec![
            ("max-calls-per-org", some(calls.calls_per_org)),
            (MAX_TYPES, some(limits.types_per_org)),
            (MAX_JOBS, limits.jobs_per_org),
            (MAX_BYTES, limits.bytes_per_org),
            ("max-rate-per-org", calls.rate_per_org.map(u64::from)),
            ("max-request-bytes", some(calls.request_bytes)),
            ("max-claims-per-org", some(limits.claims_per_org)),
            ("max-streams-per-org", some(limits.streams.per_org)),
            ("max-queued-per-org", some(limits.queued_commands_per_org)),
        ];
        Self { database: config.database_url.kind(), limits }
    }
}

pub(crate) struct ServerInfo {
    ledger: Ledger,
    facts: ServerFacts,
}

impl ServerInfo {
    pub(crate) fn new(ledger: Ledger, facts: ServerFacts) -> Self {
        Self { ledger, facts }
    }
}

#[async_trait]
impl ServerService for ServerInfo {
    async fn get_server_info(
        &self,
        request: Request<pb::GetServerInfoRequest>,
    ) -> Result<Response<pb::GetServerInfoResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let expires_at = request.extensions().get::<Arc<Credential>>().and_then(|of| of.principal.expires_at);
        let log_id = self.ledger.log_id().await.map_err(ApiError::from)?;
        let usage = self.ledger.usage(caller.org(), caller.org()).await.map_err(ApiError::from)?;
        let limit = |(name, value): &(&'static str, Option<u64>)| pb::Limit {
            name: (*name).to_owned(),
            value: value.map(|value| i64::try_from(value).unwrap_or(i64::MAX)),
            used: match *name {
                MAX_JOBS => Some(total(&usage.statistics).total()),
                MAX_BYTES => Some(usage.bytes),
                MAX_TYPES => Some(types(&usage)),
                _ => None,
            },
        };
        Ok(Response::new(pb::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            database: self.facts.database.to_owned(),
            log_id: log_id.to_string(),
            time: Some(timestamp(usage.statistics.as_of)),
            caller: Some(pb::Caller {
                actor: caller.name().map(|name| name.to_string()).unwrap_or_default(),
                org_id: caller.org().to_string(),
                roles: caller.roles.iter().map(|role| word(role).into()).collect(),
                expires_at: expires_at.map(timestamp),
            }),
            limits: self.facts.limits.iter().map(limit).collect(),
        }))
    }

    async fn list_orgs(&self, request: Request<pb::ListOrgsRequest>) -> Result<Response<pb::ListOrgsResponse>, Status> {
        let (after, limit) = request::list_orgs(request.into_inner())?;
        let mut found = self.ledger.orgs(after, limit + 1).await.map_err(ApiError::from)?;
        let has_more = found.len() > limit;
        found.truncate(limit);
        let next_page_token = found.last().filter(|_| has_more).map(OrgId::to_string).unwrap_or_default();
        let mut orgs = Vec::with_capacity(found.len());
        for org in found {
            let usage = self.ledger.usage(OrgId(NO_ORG), org).await.map_err(ApiError::from)?;
            let counted = total(&usage.statistics);
            let scheduled = usage.statistics.types.iter().map(|of_type| of_type.scheduled).sum();
            orgs.push(pb::Org {
                id: org.to_string(),
                as_of_seq: usage.statistics.as_of_seq,
                counts: Some(counts(&counted)),
                claimable: counted.get(JobStatus::Queued) - scheduled,
                scheduled,
                bytes: usage.bytes,
                types: types(&usage),
            });
        }
        Ok(Response::new(pb::ListOrgsResponse { orgs, next_page_token }))
    }

    async fn create_token(
        &self,
        request: Request<pb::CreateTokenRequest>,
    ) -> Result<Response<pb::CreateTokenResponse>, Status> {
        tokens::create(&self.ledger, request).await
    }

    async fn list_tokens(
        &self,
        request: Request<pb::ListTokensRequest>,
    ) -> Result<Response<pb::ListTokensResponse>, Status> {
        tokens::list(&self.ledger, request).await
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenResponse>, Status> {
        tokens::revoke(&self.ledger, request).await
    }
}

/// How many types have jobs or settings.
fn types(usage: &Usage) -> i64 {
    let with_jobs = usage.statistics.types.iter().filter(|of_type| of_type.exists());
    let names: BTreeSet<&str> = with_jobs.map(|of_type| &*of_type.job_type).collect();
    let settings = usage.statistics.settings.types.keys().map(|name| &**name);
    let others = settings.filter(|name| *name != ALL_TYPES && !names.contains(name)).count();
    (names.len() + others) as i64
}

pub(super) fn word(role: Role) -> pb::Role {
    match role {
        Role::Producer => pb::Role::Producer,
        Role::Worker => pb::Role::Worker,
        Role::Observer => pb::Role::Observer,
        Role::Auditor => pb::Role::Auditor,
        Role::Admin => pb::Role::Admin,
        Role::Operator => pb::Role::Operator,
    }
}
