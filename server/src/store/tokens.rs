//! API tokens. The owner of the database makes, lists and revokes them, and servers look them up.

use uuid::Uuid;

use super::{
    DatabaseUrl, StoreError, postgres,
    rows::{Columns, damaged},
    sqlite,
};
use crate::domain::{
    access::{ApiToken, NO_ORG, Roles},
    clock::Time,
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

/// Stores a token. Servers may be running, and accept it at once.
///
/// # Errors
///
/// If the database can't be opened, lacks migrations, or if the role does not own its tables (PostgreSQL).
pub async fn make(url: &DatabaseUrl, token: &ApiToken) -> Result<(), StoreError> {
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::tokens::make(path.as_ref(), token).await,
        DatabaseUrl::Postgres(url) => postgres::tokens::make(url, token).await,
        DatabaseUrl::Other => Err(DatabaseUrl::refused()),
    }
}

/// All tokens, or those of one org, oldest first.
///
/// # Errors
///
/// If the database can't be opened, lacks migrations, or if the role does not own its tables (PostgreSQL).
pub async fn list(url: &DatabaseUrl, org: Option<OrgId>) -> Result<Vec<ApiToken>, StoreError> {
    let mut tokens = match url {
        DatabaseUrl::Sqlite(path) => sqlite::tokens::list(path.as_ref()).await?,
        DatabaseUrl::Postgres(url) => postgres::tokens::list(url).await?,
        DatabaseUrl::Other => return Err(DatabaseUrl::refused()),
    };
    tokens.retain(|token| org.is_none() || token.org == org);
    tokens.sort_by_key(|token| (token.created_at, token.id));
    Ok(tokens)
}

/// Revokes a token. Servers notice within seconds. Returns true if there is a token with this id.
///
/// # Errors
///
/// As for [`list`].
pub async fn revoke(url: &DatabaseUrl, id: Uuid, at: Time) -> Result<bool, StoreError> {
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::tokens::revoke(path.as_ref(), id, at).await,
        DatabaseUrl::Postgres(url) => postgres::tokens::revoke(url, id, at).await,
        DatabaseUrl::Other => Err(DatabaseUrl::refused()),
    }
}
