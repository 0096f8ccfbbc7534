//! API tokens.

use std::{path::Path, sync::LazyLock};

use sqlx::{Connection as _, Sqlite, SqliteConnection, SqlitePool, query::Query, sqlite::SqliteArguments};
use uuid::Uuid;

use super::{
    columns::{Columns, micros},
    error::store_error,
    load::hex,
    migrations,
};
use crate::{
    domain::{
        access::ApiToken,
        clock::Time,
        id::{Digest, OrgId},
    },
    store::{
        StoreError, rows,
        tokens::{TOKEN_COLUMNS, key_of, listed, token},
    },
};

/// The token with this digest, of an org or of none.
pub(super) async fn find(
    readers: &SqlitePool,
    org: Option<OrgId>,
    digest: Digest,
) -> Result<Option<ApiToken>, StoreError> {
    static SQL: LazyLock<String> =
        LazyLock::new(|| format!("/* find */ SELECT {TOKEN_COLUMNS} FROM api_token WHERE org_id = $1 AND digest = $2"));
    let query = sqlx::query(SQL.as_str()).bind(key_of(org)).bind(digest.0.to_vec());
    let found = query.fetch_optional(readers).await.map_err(store_error)?;
    found.map(|row| token(&mut Columns::of(&row))).transpose()
}

pub(super) async fn make(path: &Path, token: &ApiToken) -> Result<(), StoreError> {
    const SQL: &str = "/* make */ INSERT INTO api_token (id, org_id, digest, name, roles, created_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    let mut connection = migrations::beside(path).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
    let query = sqlx::query(SQL).bind(token.id).bind(key_of(token.org)).bind(token.digest.0.to_vec());
    let query = query.bind(&token.name).bind(token.roles.to_string());
    let query = query.bind(micros(token.created_at)).bind(token.expires_at.map(micros));
    query.execute(&mut *transaction).await.map_err(store_error)?;
    tell(&mut transaction).await?;
    transaction.commit().await.map_err(store_error)?;
    connection.close().await.map_err(store_error)
}

pub(super) async fn list(path: &Path) -> Result<Vec<ApiToken>, StoreError> {
    let mut connection = migrations::beside(path).await?;
    let tokens = list_in(&mut connection).await?;
    connection.close().await.map_err(store_error)?;
    Ok(tokens)
}

pub(super) async fn list_in(connection: &mut SqliteConnection) -> Result<Vec<ApiToken>, StoreError> {
    static SQL: LazyLock<String> = LazyLock::new(|| {
        format!(
            "/* list_in */ SELECT {TOKEN_COLUMNS}, used_at FROM api_token LEFT JOIN api_token_use USING (org_id, digest)"
        )
    });
    let found = sqlx::query(SQL.as_str()).fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| listed(&mut Columns::of(row))).collect()
}

pub(super) async fn revoke(path: &Path, id: Uuid, at: Time) -> Result<bool, StoreError> {
    const SQL: &str = "/* revoke */ UPDATE api_token SET revoked_at = coalesce(revoked_at, $2) WHERE id = $1";
    let mut connection = migrations::beside(path).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
    let query = sqlx::query(SQL).bind(id).bind(micros(at));
    let revoked = query.execute(&mut *transaction).await.map_err(store_error)?;
    tell(&mut transaction).await?;
    transaction.commit().await.map_err(store_error)?;
    connection.close().await.map_err(store_error)?;
    Ok(revoked.rows_affected() > 0)
}

/// Revokes a token in a copy that no server uses. Returns 0 if it is unknown or was revoked before, else 1.
pub(super) async fn revoke_in(copy: &mut SqliteConnection, id: Uuid, at: Time) -> Result<usize, StoreError> {
    const SQL: &str = "/* revoke_in */ UPDATE api_token SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL";
    let done = sqlx::query(SQL).bind(id).bind(micros(at)).execute(copy).await.map_err(store_error)?;
    Ok(done.rows_affected() as usize)
}

/// Revokes all tokens in a copy that no server uses. Returns how many were not revoked before.
pub(super) async fn revoke_all(copy: &mut SqliteConnection, at: Time) -> Result<usize, StoreError> {
    const SQL: &str = "/* revoke_all */ UPDATE api_token SET revoked_at = $1 WHERE revoked_at IS NULL";
    let done = sqlx::query(SQL).bind(micros(at)).execute(copy).await.map_err(store_error)?;
    Ok(done.rows_affected() as usize)
}

/// Records when tokens were last used.
pub(super) fn note_use(used: &[(Option<OrgId>, Digest)], at: Time) -> Query<'static, Sqlite, SqliteArguments> {
    const SQL: &str = "/* note_use */ INSERT INTO api_token_use (org_id, digest, used_at)
    SELECT unhex(used.value ->> 0), unhex(used.value ->> 1), $2 FROM json_each($1) used WHERE true
    ON CONFLICT (org_id, digest) DO UPDATE SET used_at = max(used_at, excluded.used_at)";
    let used: Vec<_> = used.iter().map(|(org, digest)| [hex(key_of(*org)), hex::encode(digest.0)]).collect();
    sqlx::query(SQL).bind(rows::json_text(&used)).bind(micros(at))
}

/// Raises the revision of the credentials. Servers poll it, and check their cached tokens again.
async fn tell(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let sql = "/* tell */ UPDATE ledger SET credentials = credentials + 1";
    sqlx::query(sql).execute(connection).await.map_err(store_error)?;
    Ok(())
}
