//! API tokens. Row-level security shows the owner of the tables all of them, and a server only those of the org that it names.

use std::sync::{Arc, LazyLock};

use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::{
    columns::Columns,
    connections::{Connections, arguments},
    error::{commit, store_error},
    migrations,
};
use crate::{
    domain::{
        access::ApiToken,
        clock::Time,
        id::{Digest, OrgId},
    },
    store::{
        StoreError,
        tokens::{TOKEN_COLUMNS, key_of, listed, token},
    },
};

static FIND: LazyLock<String> =
    LazyLock::new(|| format!("/* find */ SELECT {TOKEN_COLUMNS} FROM jobledger.read_token($1, $2)"));

/// The token with this digest, of an org or of none.
pub(super) async fn find(
    readers: &Arc<Connections>,
    org: Option<OrgId>,
    digest: Digest,
) -> Result<Option<ApiToken>, StoreError> {
    let found = readers.fetch(FIND.as_str(), arguments![key_of(org), digest.0.to_vec()]).await?;
    found.first().map(|row| token(&mut Columns::of(row))).transpose()
}

/// Notes that tokens were used just now.
pub(super) async fn use_tokens(
    connections: &Arc<Connections>,
    tokens: &[(Option<OrgId>, Digest)],
) -> Result<(), StoreError> {
    const SQL: &str = "/* use_tokens */ SELECT jobledger.use_tokens($1, $2)";
    let (orgs, digests): (Vec<_>, Vec<_>) =
        tokens.iter().map(|(org, digest)| (key_of(*org), digest.0.to_vec())).unzip();
    connections.fetch(SQL, arguments![orgs, digests]).await.map(drop)
}

pub(super) async fn make(url: &str, token: &ApiToken) -> Result<(), StoreError> {
    const SQL: &str =
        "/* make */ INSERT INTO jobledger.api_token (id, org_id, digest, name, roles, created_at, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)";
    let mut connection = migrations::open_as_owner(url).await?;
    let mut transaction = connection.begin().await.map_err(store_error)?;
    let query = sqlx::query(SQL).bind(token.id).bind(key_of(token.org)).bind(token.digest.0.to_vec());
    let query = query.bind(&token.name).bind(token.roles.to_string()).bind(token.created_at).bind(token.expires_at);
    query.execute(&mut *transaction).await.map_err(store_error)?;
    tell(&mut transaction).await?;
    commit(transaction.commit()).await.map_err(store_error)?;
    let _ = connection.close().await;
    Ok(())
}

pub(super) async fn list(url: &str) -> Result<Vec<ApiToken>, StoreError> {
    static SQL: LazyLock<String> = LazyLock::new(|| {
        format!(
            "/* list */ SELECT {TOKEN_COLUMNS}, used_at FROM jobledger.api_token
            LEFT JOIN jobledger.api_token_use USING (org_id, digest)"
        )
    });
    let mut connection = migrations::open_as_owner(url).await?;
    let found = sqlx::query(SQL.as_str()).fetch_all(&mut connection).await.map_err(store_error)?;
    let _ = connection.close().await;
    found.iter().map(|row| listed(&mut Columns::of(row))).collect()
}

pub(super) async fn revoke(url: &str, id: Uuid, at: Time) -> Result<bool, StoreError> {
    const SQL: &str = "/* revoke */ UPDATE jobledger.api_token SET revoked_at = coalesce(revoked_at, $2) WHERE id = $1";
    let mut connection = migrations::open_as_owner(url).await?;
    let mut transaction = connection.begin().await.map_err(store_error)?;
    let revoked = sqlx::query(SQL).bind(id).bind(at).execute(&mut *transaction).await.map_err(store_error)?;
    tell(&mut transaction).await?;
    commit(transaction.commit()).await.map_err(store_error)?;
    let _ = connection.close().await;
    Ok(revoked.rows_affected() > 0)
}

/// Raises the revision of credentials, so that servers look tokens up again.
async fn tell(connection: &mut PgConnection) -> Result<(), StoreError> {
    let sql = "/* tell */ UPDATE jobledger.ledger SET credentials = credentials + 1";
    sqlx::query(sql).execute(connection).await.map_err(store_error)?;
    Ok(())
}
