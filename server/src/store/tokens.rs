//! API tokens as the database has them.

use uuid::Uuid;

use super::{
    StoreError,
    rows::{Columns, damaged},
};
use crate::domain::{
    access::{ApiToken, NO_ORG, Roles},
    id::OrgId,
};

/// The columns of a token, in the order in which [`token`] reads them.
pub(super) const TOKEN_COLUMNS: &str = "id, org_id, digest, name, roles, created_at, expires_at, revoked_at";

/// The org id under which a token is stored.
pub(super) fn key_of(org: Option<OrgId>) -> Uuid {
    org.map_or(NO_ORG, |org| org.0)
}

/// Reads [`TOKEN_COLUMNS`].
pub(super) fn token<'r>(columns: &mut impl Columns<'r>) -> Result<ApiToken, StoreError> {
    Ok(ApiToken {
        id: columns.uuid()?,
        org: Some(columns.uuid()?).filter(|org| *org != NO_ORG).map(OrgId),
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
