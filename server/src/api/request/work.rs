//! What workers ask: for work, and to go on with it.

use std::time::Duration;

use jobledger_proto::v1 as pb;

use super::{
    super::status::ApiError,
    check::{Check, LEASE},
    items,
};
use crate::{
    domain::{
        lease::LeaseToken,
        transition::{self, Heartbeat},
    },
    ledger::{Claim, Command},
};

const DEFAULT_LEASE: Duration = Duration::from_secs(30);
const WAIT: [Duration; 2] = [Duration::ZERO, Duration::from_secs(60)];
const MAX_JOBS: i32 = 100;

/// The claim, and how long to wait where there is nothing.
pub(in super::super) fn claim(request: pb::ClaimJobsRequest) -> Result<(Claim, Duration), ApiError> {
    let mut check = Check::default();
    check.required_name("worker_id", &request.worker_id);
    let types = check.types(request.types);
    let max_jobs = check.count("max_jobs", request.max_jobs, 1, 1..=MAX_JOBS);
    let lease = request.lease_duration.as_ref().and_then(|lease| check.duration("lease_duration", lease, LEASE));
    let wait = request.wait.as_ref().and_then(|wait| check.duration("wait", wait, WAIT));
    check.name("request_id", &request.request_id);
    check.finish()?;
    let claim = Claim {
        worker: request.worker_id.into(),
        types: types.into_iter().map(Into::into).collect(),
        max_jobs,
        lease: lease.unwrap_or(DEFAULT_LEASE),
        request: (!request.request_id.is_empty()).then(|| request.request_id.into()),
    };
    Ok((claim, wait.unwrap_or_default()))
}

/// Heartbeats, each `None` where its token is nobody's.
pub(in super::super) fn heartbeat(request: pb::HeartbeatRequest) -> Result<Vec<Option<Command>>, ApiError> {
    items("leases", request.leases.len())?;
    let mut check = Check::default();
    check.required_name("worker_id", &request.worker_id);
    let extend_by = request.extend_by.as_ref().and_then(|by| check.duration("extend_by", by, LEASE));
    let mut commands = Vec::with_capacity(request.leases.len());
    for (n, lease) in request.leases.into_iter().enumerate() {
        let prefix = format!("leases[{n}].");
        let token = check.lease_token(&format!("{prefix}lease_token"), lease.lease_token);
        let news = check.news(&prefix, lease.stage, lease.progress, lease.message);
        commands.push(token.filter(|token| *token != LeaseToken::NOBODYS).map(|token| Command::Apply {
            job: token.job,
            command: Box::new(transition::Command::Heartbeat(Heartbeat { token, news, extend_by })),
        }));
    }
    check.finish()?;
    Ok(commands)
}
