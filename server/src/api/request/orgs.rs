//! Requests of ServerService.

use jobledger_proto::v1 as pb;
use uuid::Uuid;

use super::{super::status::ApiError, check::Check};
use crate::domain::id::OrgId;

const DEFAULT_PAGE: usize = 20;
const MAX_PAGE: usize = 100;

/// The org after which the page begins, and how many orgs it has at most.
pub(in super::super) fn list_orgs(request: pb::ListOrgsRequest) -> Result<(Option<OrgId>, usize), ApiError> {
    let mut check = Check::default();
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let after = check.page_after(&request.page_token, |token| Uuid::try_parse(token).ok().map(OrgId));
    check.finish()?;
    Ok((after, limit))
}
