//! API tokens as the database has them.

use chrono::TimeDelta;
use uuid::Uuid;

use super::{
    StoreError,
    rows::{Columns, damaged},
};
use crate::domain::{
    access::{ApiToken, NO_ORG, Roles},
    id::{Digest, OrgId},
};

/// By what a token is found: its org, or none, and the SHA-256 of its secret.
pub type TokenKey = (Option<OrgId>, Digest);

/// How long ended tokens stay before they make room for new ones: every server has noticed their end by then.
pub(super) const STAYS: TimeDelta = TimeDelta::hours(1);

/// The columns of a token, in the order in which [`token`] reads them.
pub(super) const TOKEN_COLUMNS: &str = "id, org_id, digest, name, roles, created_at, expires_at, revoked_at";

/// The org id under which a token is stored.
pub(super) fn key_of(org: Option<OrgId>) -> Uuid {
    org.map_or(NO_ORG, |org| org.0)
}

fn org_of(key: Uuid) -> Option<OrgId> {
    Some(key).filter(|org| *org != NO_ORG).map(OrgId)
}

/// Reads a token's org and digest.
pub(super) fn token_key<'r>(columns: &mut impl Columns<'r>) -> Result<TokenKey, StoreError> {
    Ok((org_of(columns.uuid()?), columns.digest()?.ok_or_else(|| damaged("digest"))?))
}

/// Reads [`TOKEN_COLUMNS`].
pub(super) fn token<'r>(columns: &mut impl Columns<'r>) -> Result<ApiToken, StoreError> {
    Ok(ApiToken {
        id: columns.uuid()?,
        org: org_of(columns.uuid()?),
        digest: columns.digest()?.ok_or_else(|| damaged("digest"))?,
        name: columns.text()?.to_owned(),
        roles: Roles::parse(columns.text()?),
        created_at: columns.time()?,
        expires_at: columns.optional_time()?,
        revoked_at: columns.optional_time()?,
        used_at: None,
    })
}

/// Reads [`TOKEN_COLUMNS`], then the time of the last use.
pub(super) fn listed<'r>(columns: &mut impl Columns<'r>) -> Result<ApiToken, StoreError> {
    let token = token(columns)?;
    Ok(ApiToken { used_at: columns.optional_time()?, ..token })
}
