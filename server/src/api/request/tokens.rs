//! Requests of ServerService about API tokens.

use chrono::TimeDelta;
use jobledger_proto::v1 as pb;
use uuid::Uuid;

use super::{super::status::ApiError, check::Check};
use crate::{
    access::Principal,
    domain::{
        access::{Role, Roles},
        clock::Time,
    },
};

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;
/// How long a token is valid by default, and at most.
const VALID_FOR: TimeDelta = TimeDelta::days(90);
const LONGEST: TimeDelta = TimeDelta::days(3_653);

/// A token to make: its name, its roles, and when it expires.
pub(in super::super) fn create_token(
    request: pb::CreateTokenRequest,
    now: Time,
) -> Result<(String, Roles, Time), ApiError> {
    let mut check = Check::default();
    check.that("name", Principal::is_name(&request.name), || {
        format!(
            "must be 1 to {} characters, none of them control or bidirectional formatting characters",
            Principal::MAX_NAME_CHARS
        )
    });
    check.that("roles", !request.roles.is_empty(), || "must have at least one role".to_owned());
    let most = Role::ALL.len();
    check.that("roles", request.roles.len() <= most, || format!("must have at most {most} roles"));
    let roles = request.roles.iter().take(most).filter_map(|role| check.role("roles", *role)).collect();
    let expires_at = request.expires_at.map_or(Some(now + VALID_FOR), |time| check.time("expires_at", time));
    let is_sensible = expires_at.is_none_or(|time| now < time && time <= now + LONGEST);
    check.that("expires_at", is_sensible, || "must be in the future, and within ten years".to_owned());
    check.finish()?;
    Ok((request.name, roles, expires_at.unwrap_or(now)))
}

/// The id after which the page begins, and how many tokens it has at most.
pub(in super::super) fn list_tokens(request: pb::ListTokensRequest) -> Result<(Uuid, usize), ApiError> {
    let mut check = Check::default();
    let limit = check.page_size(request.page_size, DEFAULT_PAGE, MAX_PAGE);
    let after = check.page_after(&request.page_token, |token| Uuid::try_parse(token).ok());
    check.finish()?;
    Ok((after.unwrap_or_default(), limit))
}

/// The id of the token to revoke.
pub(in super::super) fn revoke_token(request: &pb::RevokeTokenRequest) -> Result<Uuid, ApiError> {
    Uuid::try_parse(&request.token_id).map_err(|_| ApiError::invalid("token_id", "must be a UUID"))
}

impl Check {
    /// A role that a credential of an org may have.
    fn role(&mut self, field: &str, role: i32) -> Option<Role> {
        let known = match pb::Role::try_from(role) {
            Ok(pb::Role::Producer) => Some(Role::Producer),
            Ok(pb::Role::Worker) => Some(Role::Worker),
            Ok(pb::Role::Observer) => Some(Role::Observer),
            Ok(pb::Role::Auditor) => Some(Role::Auditor),
            Ok(pb::Role::Admin) => Some(Role::Admin),
            Ok(pb::Role::Operator) => {
                self.refuse(
                    field,
                    "must not have ROLE_OPERATOR: an operator's token is made by `jobledger token create`",
                );
                return None;
            }
            Ok(pb::Role::Unspecified) | Err(_) => None,
        };
        self.that(field, known.is_some(), || format!("{role} is not a role"));
        known
    }
}
