//! Requests of JobTypeService.

use std::sync::Arc;

use jobledger_proto::v1 as pb;

use super::{super::status::ApiError, check::Check};
use crate::domain::job_type::{ALL_TYPES, TypeChange, TypeCommand};

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;
/// The settings that `update_mask` may name.
const DESCRIPTION: &str = "description";

/// The name after which the page begins, and how many types it has at most.
pub(in super::super) fn list_types(request: pb::ListJobTypesRequest) -> Result<(String, usize), ApiError> {
    let mut check = Check::default();
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let after = check.page_after_name(&request.page_token);
    if !after.is_empty() {
        check.job_type("page_token", &after);
    }
    check.finish()?;
    Ok((after, limit))
}

pub(in super::super) fn get_type(request: pb::GetJobTypeRequest) -> Result<String, ApiError> {
    let mut check = Check::default();
    check.job_type("type", &request.r#type);
    check.finish()?;
    Ok(request.r#type)
}

pub(in super::super) fn update_type(request: pb::UpdateJobTypeRequest) -> Result<TypeCommand, ApiError> {
    let mut check = Check::default();
    check.job_type("type", &request.r#type);
    let etag = check.token("etag", request.etag);
    let paths = request.update_mask.unwrap_or_default().paths;
    check.that("update_mask", !paths.is_empty(), || "must name at least one field of settings".to_owned());
    if let Some(unknown) = paths.iter().find(|path| *path != DESCRIPTION) {
        check.refuse("update_mask", format!("{unknown:.100?} is not a field of settings that can be changed"));
    }
    let description = request.settings.unwrap_or_default().description;
    check.bytes("settings.description", &description);
    check.finish()?;
    let change = TypeChange::Describe { description: description.into() };
    Ok(TypeCommand { job_type: request.r#type.into(), etag, change })
}

pub(in super::super) fn delete_type(request: pb::DeleteJobTypeRequest) -> Result<TypeCommand, ApiError> {
    let mut check = Check::default();
    check.job_type("type", &request.r#type);
    let etag = check.token("etag", request.etag);
    check.finish()?;
    Ok(TypeCommand { job_type: request.r#type.into(), etag, change: TypeChange::Reset })
}

pub(in super::super) fn pause_type(request: pb::PauseJobTypeRequest) -> Result<TypeCommand, ApiError> {
    let mut check = Check::default();
    let job_type = one_or_all(&mut check, request.r#type, request.all_types);
    let until = request.until.and_then(|until| check.time("until", until));
    check.bytes("reason", &request.reason);
    let etag = check.token("etag", request.etag);
    check.finish()?;
    Ok(TypeCommand { job_type, etag, change: TypeChange::Pause { until, reason: request.reason.into() } })
}

pub(in super::super) fn resume_type(request: pb::ResumeJobTypeRequest) -> Result<TypeCommand, ApiError> {
    let mut check = Check::default();
    let job_type = one_or_all(&mut check, request.r#type, request.all_types);
    let etag = check.token("etag", request.etag);
    check.finish()?;
    Ok(TypeCommand { job_type, etag, change: TypeChange::Resume })
}

/// The type that a request names, or all types.
fn one_or_all(check: &mut Check, name: String, all: bool) -> Arc<str> {
    if all {
        check.that("type", name.is_empty(), || "must not be combined with all_types".to_owned());
        return ALL_TYPES.into();
    }
    check.job_type("type", &name);
    name.into()
}
