//! Requests of ClaimJobs and Heartbeat.

use std::{sync::Arc, time::Duration};

use jobledger_proto::v1 as pb;

use super::{
    super::status::ApiError,
    check::{Check, LEASE},
    items,
};
use crate::{
    domain::{
        lease::LeaseToken,
        transition::{self, Heartbeat, News},
        worker::WorkerAbout,
    },
    ledger::{Claim, Command},
};

const DEFAULT_LEASE: Duration = Duration::from_secs(30);
const WAIT: [Duration; 2] = [Duration::ZERO, Duration::from_secs(60)];
const MAX_JOBS: i32 = 100;

/// The claim, how long it may wait if no job is ready, and what the worker says of itself.
pub(in super::super) fn claim(request: pb::ClaimJobsRequest) -> Result<(Claim, Duration, WorkerAbout), ApiError> {
    let mut check = Check::default();
    check.required_name("worker_id", &request.worker_id);
    let types = check.types("types", request.types);
    let max_jobs = check.count("max_jobs", request.max_jobs, 1, 1..=MAX_JOBS);
    let lease = request.lease_duration.as_ref().and_then(|lease| check.duration("lease_duration", lease, LEASE));
    let wait = request.wait.as_ref().and_then(|wait| check.duration("wait", wait, WAIT));
    check.name("request_id", &request.request_id);
    check.name("worker_version", &request.worker_version);
    check.name("worker_host", &request.worker_host);
    check.finish()?;
    let claim = Claim {
        worker: request.worker_id.into(),
        types: types.into_iter().map(Into::into).collect(),
        max_jobs,
        lease: lease.unwrap_or(DEFAULT_LEASE),
        request: (!request.request_id.is_empty()).then(|| request.request_id.into()),
    };
    let types = Arc::clone(&claim.types);
    let about =
        WorkerAbout { types: Some(types), version: request.worker_version.into(), host: request.worker_host.into() };
    Ok((claim, wait.unwrap_or_default(), about))
}

pub(in super::super) struct Beat {
    /// `None` if the token is not one of a lease.
    pub(in super::super) command: Option<Command>,
    /// Why the news of this lease is refused. The lease is extended all the same.
    pub(in super::super) refusal: Option<ApiError>,
}

/// Converts the worker's id and the heartbeats of all its leases. A violation in one does not affect the others.
pub(in super::super) fn heartbeat(request: pb::HeartbeatRequest) -> Result<(Arc<str>, Vec<Beat>), ApiError> {
    items("leases", request.leases.len())?;
    let mut check = Check::default();
    check.required_name("worker_id", &request.worker_id);
    let extend_by = request.extend_by.as_ref().and_then(|by| check.duration("extend_by", by, LEASE));
    check.finish()?;
    let worker: Arc<str> = request.worker_id.into();
    let beat = |(n, lease): (usize, pb::LeaseHeartbeat)| {
        let mut check = Check::default();
        let prefix = format!("leases[{n}].");
        let token = check.lease_token(&format!("{prefix}lease_token"), lease.lease_token);
        let news = check.news(&prefix, lease.stage, lease.progress, lease.message);
        let refusal = check.finish().err();
        let news = if refusal.is_none() { news } else { News::default() };
        let command = token.filter(|token| *token != LeaseToken::NOBODYS).map(|token| Command::Apply {
            job: token.job,
            command: Box::new(transition::Command::Heartbeat(Heartbeat {
                worker: Arc::clone(&worker),
                token,
                news,
                extend_by,
            })),
        });
        Beat { command, refusal }
    };
    let beats = request.leases.into_iter().enumerate().map(beat).collect();
    Ok((worker, beats))
}
