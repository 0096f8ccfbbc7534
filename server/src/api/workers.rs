//! `jobledger.v1.WorkerService`.

use jobledger_proto::v1::{self as pb, worker_service_server::WorkerService};
use tonic::{Request, Response, Status, async_trait};

use super::{caller::Caller, convert::timestamp, request, status::ApiError};
use crate::ledger::{Holding, Ledger};

pub(crate) struct Workers {
    ledger: Ledger,
}

impl Workers {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }
}

#[async_trait]
impl WorkerService for Workers {
    async fn list_workers(
        &self,
        request: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (after, limit) = request::list_workers(request.into_inner())?;
        let found = self.ledger.workers(caller.org(), &after, limit).await.map_err(ApiError::from)?;
        let last = found.workers.last().filter(|_| found.has_more);
        let next_page_token = last.map(|(last, _)| request::token_after(&last.id)).unwrap_or_default();
        let worker = |(worker, held): &(_, Holding)| {
            let crate::domain::worker::Worker { id, about, is_waiting, heard_at } = worker;
            pb::Worker {
                id: id.to_string(),
                types: about.types.iter().flat_map(|types| types.iter()).map(|name| name.to_string()).collect(),
                version: about.version.to_string(),
                host: about.host.to_string(),
                waiting: *is_waiting,
                held: held.jobs,
                oldest_held_since: held.since.map(timestamp),
                last_heard_at: Some(timestamp(*heard_at)),
            }
        };
        Ok(Response::new(pb::ListWorkersResponse {
            workers: found.workers.iter().map(worker).collect(),
            next_page_token,
            as_of: Some(timestamp(found.as_of)),
            held_truncated: found.is_held_truncated,
            workers_truncated: found.lacks_some,
        }))
    }
}
