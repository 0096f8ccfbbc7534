//! Who a call is from, as the layer before the services has found (`access.rs`).

use std::sync::Arc;

use http::Extensions;

use super::status::ApiError;
use crate::{
    domain::{
        access::{Role, Roles},
        id::OrgId,
    },
    ledger::By,
};

/// Who a call is from, and which org it is about.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// The org, and who is said to have done it; nobody where authentication is off.
    pub(super) by: By,
    pub(super) roles: Roles,
}

impl Caller {
    /// Anybody, where authentication is off.
    pub(super) fn anybody(org: OrgId) -> Self {
        Self { by: org.into(), roles: Roles::of(&[Role::Operator]) }
    }

    /// The caller of a request.
    pub(super) fn of(extensions: &Extensions) -> Result<Self, ApiError> {
        extensions.get::<Self>().cloned().ok_or(ApiError::Internal)
    }

    pub(super) fn org(&self) -> OrgId {
        self.by.org
    }

    /// Who creates a job that does not say.
    pub(super) fn name(&self) -> Option<&Arc<str>> {
        self.by.actor.as_ref()
    }

    /// Refuses to tell of all jobs whom it is not for.
    pub(super) fn may_follow_all(&self) -> Result<(), ApiError> {
        if self.roles.meets(Roles::of(&[Role::Observer, Role::Admin, Role::Operator])) {
            return Ok(());
        }
        Err(ApiError::Denied("streams of all jobs are for observers and admins; name a job_id"))
    }
}
