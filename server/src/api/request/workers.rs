//! Requests of WorkerService.

use jobledger_proto::v1 as pb;

use super::{super::status::ApiError, check::Check};

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;

/// The id after which the page begins, and how many workers it has at most.
pub(in super::super) fn list_workers(request: pb::ListWorkersRequest) -> Result<(String, usize), ApiError> {
    let mut check = Check::default();
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let after = check.page_after_name(&request.page_token);
    check.name("page_token", &after);
    check.finish()?;
    Ok((after, limit))
}
