//! Who makes a call, as the access layer (`access.rs`) has found.

use std::sync::Arc;

use http::Extensions;

use super::status::ApiError;
use crate::{
    domain::{
        access::{Role, Roles},
        id::OrgId,
    },
    ledger::Author,
};

/// Which parts of jobs and events a caller may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// All.
    Whole,
    /// All but payload, result, message and error message.
    WithoutContents,
}

/// Who makes a call, and which org it is about.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// The org, and the actor of the call's events; no actor where authentication is off.
    pub(crate) by: Author,
    pub(super) roles: Roles,
}

impl Caller {
    /// The caller where authentication is off: an operator without a name.
    pub(super) fn anybody(org: OrgId) -> Self {
        Self { by: org.into(), roles: Roles::of(&[Role::Operator]) }
    }

    /// The caller of a request. [`ApiError::Internal`] if the access layer has set none.
    pub(super) fn of(extensions: &Extensions) -> Result<Self, ApiError> {
        extensions.get::<Self>().cloned().ok_or(ApiError::Internal)
    }

    pub(crate) fn org(&self) -> OrgId {
        self.by.org
    }

    /// The principal's name: the `requested_by` of jobs that name none.
    pub(super) fn name(&self) -> Option<&Arc<str>> {
        self.by.actor.as_ref()
    }

    /// Which parts of jobs and events its answers have. An auditor with another role sees what that role sees.
    pub(crate) fn view(&self) -> View {
        let all = Roles::of(&[Role::Producer, Role::Worker, Role::Observer, Role::Admin, Role::Operator]);
        if self.roles.meets(all) { View::Whole } else { View::WithoutContents }
    }

    /// Refuses streams of all jobs to callers without one of the roles observer, auditor, admin and operator.
    pub(super) fn may_follow_all(&self) -> Result<(), ApiError> {
        if self.roles.meets(Roles::of(&[Role::Observer, Role::Auditor, Role::Admin, Role::Operator])) {
            return Ok(());
        }
        Err(ApiError::Denied("streams of all jobs are for observers and admins; name a job_id"))
    }
}
