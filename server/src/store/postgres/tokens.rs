//! API tokens. Row-level security shows the owner of the tables all of them, and a server only those of the org that it names.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use sqlx::{
    Connection as _, PgConnection,
    postgres::{PgArguments, PgRow},
};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    columns::Columns,
    connections::{Connections, arguments},
    error::{commit, commit_error, store_error},
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
        tokens::{TOKEN_COLUMNS, TokenKey, key_of, listed, token, token_key},
    },
};

/// How long a commit may take. It may wait for a standby.
const LONGEST_COMMIT: Duration = Duration::from_secs(10);

static FIND: LazyLock<String> =
    LazyLock::new(|| format!("/* find */ SELECT {TOKEN_COLUMNS} FROM jobledger.read_token($1, $2)"));

/// The token with this digest, of an org or of none.
pub(super) async fn find(
    readers: &Arc<Connections>,
    org: Option<OrgId>,
    digest: Digest,
) -> Result<Option<ApiToken>, StoreError> {
    let found = readers.fetch(FIND.as_str(), arguments![key_of(org), digest.0.to_vec()]).await?;
    one(&found)
}

static CREATE: LazyLock<String> = LazyLock::new(|| {
    format!("/* create_token */ SELECT {TOKEN_COLUMNS} FROM jobledger.create_token($1, $2, $3, $4, $5, $6, $7)")
});

/// Makes a token of an org that has fewer than `most`. `None` if it has as many.
pub(super) async fn create(
    writers: &Arc<Connections>,
    token: &ApiToken,
    most: usize,
) -> Result<Option<ApiToken>, StoreError> {
    let (org, digest, roles) = (key_of(token.org), token.digest.0.to_vec(), token.roles.to_string());
    let values = arguments![org, token.id, digest, token.name.clone(), roles, token.expires_at, most as i64];
    one(&written(writers, CREATE.as_str(), values).await?)
}

/// A page of an org's tokens, in the order of their ids.
pub(super) async fn page(
    readers: &Arc<Connections>,
    org: OrgId,
    after: Uuid,
    limit: usize,
) -> Result<Vec<ApiToken>, StoreError> {
    static SQL: LazyLock<String> = LazyLock::new(|| {
        format!("/* list_tokens */ SELECT {TOKEN_COLUMNS}, used_at FROM jobledger.list_tokens($1, $2, $3)")
    });
    let found = readers.fetch(SQL.as_str(), arguments![org.0, after, limit as i64]).await?;
    found.iter().map(|row| listed(&mut Columns::of(row))).collect()
}

/// Revokes a token of an org. `None` if there is none with this id.
pub(super) async fn revoke_of(
    writers: &Arc<Connections>,
    org: OrgId,
    id: Uuid,
) -> Result<Option<ApiToken>, StoreError> {
    static SQL: LazyLock<String> =
        LazyLock::new(|| format!("/* revoke_token */ SELECT {TOKEN_COLUMNS} FROM jobledger.revoke_token($1, $2)"));
    one(&written(writers, SQL.as_str(), arguments![org.0, id]).await?)
}

/// Runs a statement that writes, and commits it as batches are: it waits for synchronous standbys, and an unknown outcome is told
/// as one.
async fn written(writers: &Arc<Connections>, sql: &'static str, values: PgArguments) -> Result<Vec<PgRow>, StoreError> {
    const BEGIN: &str = "/* written */ BEGIN";
    const COMMIT: &str = "/* written */ SET LOCAL statement_timeout = 0; COMMIT";
    let mut connection = writers.take().await?;
    let begun = sqlx::raw_sql(BEGIN).execute(&mut *connection).await;
    if begun.is_err() && connection.is_reused() {
        // It may have died while it was idle.
        connection.replace().await?;
        sqlx::raw_sql(BEGIN).execute(&mut *connection).await.map_err(store_error)?;
    } else {
        begun.map_err(store_error)?;
    }
    let found = sqlx::query_with(sql, values).fetch_all(&mut *connection).await.map_err(store_error)?;
    connection.commits();
    match timeout(LONGEST_COMMIT, commit(sqlx::raw_sql(COMMIT).execute(&mut *connection))).await {
        Ok(committed) => committed.map_err(commit_error)?,
        Err(_) => return Err(StoreError::OutcomeUnknown("the commit takes too long".to_owned())),
    };
    connection.give_back();
    Ok(found)
}

/// At most `limit` tokens that were revoked after this revision.
pub(super) async fn revoked(
    connections: &Arc<Connections>,
    since: i64,
    limit: usize,
) -> Result<Vec<TokenKey>, StoreError> {
    const SQL: &str = "/* revoked_tokens */ SELECT org_id, digest FROM jobledger.revoked_tokens($1, $2)";
    let found = connections.fetch(SQL, arguments![since, limit as i64]).await?;
    found.iter().map(|row| token_key(&mut Columns::of(row))).collect()
}

fn one(rows: &[PgRow]) -> Result<Option<ApiToken>, StoreError> {
    rows.first().map(|row| token(&mut Columns::of(row))).transpose()
}

/// Notes that tokens were used just now.
pub(super) async fn use_tokens(connections: &Arc<Connections>, tokens: &[TokenKey]) -> Result<(), StoreError> {
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
    const SQL: &str = "/* revoke */ UPDATE jobledger.api_token t SET revoked_at = coalesce(t.revoked_at, $2),
            revoked_revision = coalesce(t.revoked_revision, ledger.credentials)
        FROM jobledger.ledger WHERE t.id = $1";
    let mut connection = migrations::open_as_owner(url).await?;
    let mut transaction = connection.begin().await.map_err(store_error)?;
    tell(&mut transaction).await?;
    let revoked = sqlx::query(SQL).bind(id).bind(at).execute(&mut *transaction).await.map_err(store_error)?;
    commit(transaction.commit()).await.map_err(store_error)?;
    let _ = connection.close().await;
    Ok(revoked.rows_affected() > 0)
}

/// Raises the revision of the credentials: servers read it, and then which tokens were revoked.
async fn tell(connection: &mut PgConnection) -> Result<(), StoreError> {
    let sql = "/* tell */ UPDATE jobledger.ledger SET credentials = credentials + 1";
    sqlx::query(sql).execute(connection).await.map_err(store_error)?;
    Ok(())
}
