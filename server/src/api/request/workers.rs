//! Requests of WorkerService.

use jobledger_proto::v1 as pb;

use super::{super::status::ApiError, check::Check};

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;
/// Marks page tokens, so that other texts are refused.
const TOKEN: &str = "after:";

/// The id after which the page begins, and how many workers it has at most.
pub(in super::super) fn list_workers(request: pb::ListWorkersRequest) -> Result<(String, usize), ApiError> {
    let mut check = Check::default();
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let after = request.page_token.strip_prefix(TOKEN);
    check.that("page_token", request.page_token.is_empty() || after.is_some(), || {
        "is not the next_page_token of an answer".to_owned()
    });
    check.name("page_token", after.unwrap_or_default());
    check.finish()?;
    Ok((after.unwrap_or_default().to_owned(), limit))
}

/// The token of the page that begins after this worker.
pub(in super::super) fn worker_token(last: &str) -> String {
    format!("{TOKEN}{last}")
}
