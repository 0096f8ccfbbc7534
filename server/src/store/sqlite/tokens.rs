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
        tokens::{STAYS, TOKEN_COLUMNS, TokenKey, key_of, listed, token, token_key},
    },
};

/// When a token was revoked or expired, whichever was first. SQLite's min is null if either is.
const ENDED_AT: &str = "coalesce(min(revoked_at, expires_at), revoked_at, expires_at)";

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

/// Makes a token of an org that has fewer than `most`. `None` if it has as many.
pub(super) async fn create(
    writer: &mut SqliteConnection,
    token: &ApiToken,
    most: usize,
    now: Time,
) -> Result<Option<ApiToken>, StoreError> {
    let org = key_of(token.org);
    let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
    if count(&mut transaction, org).await? >= most as i64 {
        static SQL: LazyLock<String> =
            LazyLock::new(|| format!("/* make_room */ DELETE FROM api_token WHERE org_id = $1 AND {ENDED_AT} < $2"));
        let ended = micros(now - STAYS);
        sqlx::query(SQL.as_str()).bind(org).bind(ended).execute(&mut *transaction).await.map_err(store_error)?;
        let sql = "/* make_room */ DELETE FROM api_token_use WHERE org_id = $1
            AND digest NOT IN (SELECT digest FROM api_token WHERE org_id = $1)";
        sqlx::query(sql).bind(org).execute(&mut *transaction).await.map_err(store_error)?;
    }
    if count(&mut transaction, org).await? >= most as i64 {
        transaction.commit().await.map_err(store_error)?;
        return Ok(None);
    }
    let made = ApiToken { created_at: now, ..token.clone() };
    insert(&mut transaction, &made).await?;
    // A server without other credentials starts once there was a token.
    let sql = "/* create_token */ UPDATE ledger SET credentials = 1 WHERE credentials = 0";
    sqlx::query(sql).execute(&mut *transaction).await.map_err(store_error)?;
    transaction.commit().await.map_err(store_error)?;
    Ok(Some(made))
}

async fn count(connection: &mut SqliteConnection, org: Uuid) -> Result<i64, StoreError> {
    let sql = "/* count_tokens */ SELECT count(*) FROM api_token WHERE org_id = $1";
    sqlx::query_scalar(sql).bind(org).fetch_one(connection).await.map_err(store_error)
}

/// A page of an org's tokens, in the order of their ids.
pub(super) async fn page(
    readers: &SqlitePool,
    org: OrgId,
    after: Uuid,
    limit: usize,
) -> Result<Vec<ApiToken>, StoreError> {
    static SQL: LazyLock<String> = LazyLock::new(|| {
        format!(
            "/* list_tokens */ SELECT {TOKEN_COLUMNS}, used_at FROM api_token LEFT JOIN api_token_use USING (org_id, digest)
            WHERE org_id = $1 AND id > $2 ORDER BY id LIMIT +$3"
        )
    });
    let query = sqlx::query(SQL.as_str()).bind(org.0).bind(after).bind(limit as i64);
    let found = query.fetch_all(readers).await.map_err(store_error)?;
    found.iter().map(|row| listed(&mut Columns::of(row))).collect()
}

/// The token of an org with this id.
pub(super) async fn of_org(readers: &SqlitePool, org: OrgId, id: Uuid) -> Result<Option<ApiToken>, StoreError> {
    static SQL: LazyLock<String> =
        LazyLock::new(|| format!("/* of_org */ SELECT {TOKEN_COLUMNS} FROM api_token WHERE org_id = $1 AND id = $2"));
    let query = sqlx::query(SQL.as_str()).bind(org.0).bind(id);
    let found = query.fetch_optional(readers).await.map_err(store_error)?;
    found.map(|row| token(&mut Columns::of(&row))).transpose()
}

/// True if an org has fewer than `most` tokens, or some that make room.
pub(super) async fn may_have_room(
    readers: &SqlitePool,
    org: Option<OrgId>,
    most: usize,
    now: Time,
) -> Result<bool, StoreError> {
    static SQL: LazyLock<String> = LazyLock::new(|| {
        format!(
            "/* may_have_room */ SELECT count(*) < $2 OR count(*) FILTER (WHERE {ENDED_AT} < $3) > 0
            FROM api_token WHERE org_id = $1"
        )
    });
    let query = sqlx::query_scalar(SQL.as_str()).bind(key_of(org)).bind(most as i64).bind(micros(now - STAYS));
    query.fetch_one(readers).await.map_err(store_error)
}

/// Revokes a token, unless it was revoked before.
pub(super) async fn end_of(writer: &mut SqliteConnection, id: Uuid, now: Time) -> Result<(), StoreError> {
    let mut transaction = writer.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
    end(&mut transaction, id, now).await?;
    transaction.commit().await.map_err(store_error)
}

/// Raises the revision, and revokes a token as of it. Returns false if there is none with this id.
async fn end(connection: &mut SqliteConnection, id: Uuid, at: Time) -> Result<bool, StoreError> {
    const SQL: &str = "/* revoke */ UPDATE api_token SET revoked_at = coalesce(revoked_at, $2),
        revoked_revision = coalesce(revoked_revision, (SELECT credentials FROM ledger)) WHERE id = $1";
    tell(connection).await?;
    let revoked = sqlx::query(SQL).bind(id).bind(micros(at)).execute(connection).await.map_err(store_error)?;
    Ok(revoked.rows_affected() > 0)
}

/// At most `limit` tokens that were revoked after this revision.
pub(super) async fn revoked(readers: &SqlitePool, since: i64, limit: usize) -> Result<Vec<TokenKey>, StoreError> {
    const SQL: &str = "/* revoked */ SELECT org_id, digest FROM api_token WHERE revoked_revision > $1
        ORDER BY revoked_revision LIMIT +$2";
    let found = sqlx::query(SQL).bind(since).bind(limit as i64).fetch_all(readers).await.map_err(store_error)?;
    found.iter().map(|row| token_key(&mut Columns::of(row))).collect()
}

pub(super) async fn make(path: &Path, token: &ApiToken) -> Result<(), StoreError> {
    let mut connection = migrations::beside(path).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
    insert(&mut transaction, token).await?;
    tell(&mut transaction).await?;
    transaction.commit().await.map_err(store_error)?;
    connection.close().await.map_err(store_error)
}

async fn insert(connection: &mut SqliteConnection, token: &ApiToken) -> Result<(), StoreError> {
    const SQL: &str = "/* make */ INSERT INTO api_token (id, org_id, digest, name, roles, created_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    let query = sqlx::query(SQL).bind(token.id).bind(key_of(token.org)).bind(token.digest.0.to_vec());
    let query = query.bind(&token.name).bind(token.roles.to_string());
    let query = query.bind(micros(token.created_at)).bind(token.expires_at.map(micros));
    query.execute(connection).await.map_err(store_error)?;
    Ok(())
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
    let mut connection = migrations::beside(path).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
    let was_found = end(&mut transaction, id, at).await?;
    transaction.commit().await.map_err(store_error)?;
    connection.close().await.map_err(store_error)?;
    Ok(was_found)
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
pub(super) fn note_use(used: &[TokenKey], at: Time) -> Query<'static, Sqlite, SqliteArguments> {
    const SQL: &str = "/* note_use */ INSERT INTO api_token_use (org_id, digest, used_at)
    SELECT unhex(used.value ->> 0), unhex(used.value ->> 1), $2 FROM json_each($1) used WHERE true
    ON CONFLICT (org_id, digest) DO UPDATE SET used_at = max(used_at, excluded.used_at)";
    let used: Vec<_> = used.iter().map(|(org, digest)| [hex(key_of(*org)), hex::encode(digest.0)]).collect();
    sqlx::query(SQL).bind(rows::json_text(&used)).bind(micros(at))
}

/// Raises the revision of the credentials: servers read it, and then which tokens were revoked.
async fn tell(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let sql = "/* tell */ UPDATE ledger SET credentials = credentials + 1";
    sqlx::query(sql).execute(connection).await.map_err(store_error)?;
    Ok(())
}
