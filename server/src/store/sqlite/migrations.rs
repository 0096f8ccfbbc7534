//! Migrates the file to this program's schema, and back.

use std::{path::Path, sync::LazyLock};

use sqlx::{ConnectOptions, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

use super::{
    BUSY_TIMEOUT,
    error::store_error,
    file::{find, lock},
    own_log,
};
use crate::{
    domain::id::LogId,
    store::{
        StoreError,
        migrations::{self, MigrationStatus, Migrations},
    },
};

static MIGRATIONS: LazyLock<Migrations> = LazyLock::new(|| Migrations::new(migrations::SQLITE, "_sqlx_migrations"));

/// Applies the missing migrations. If `may_migrate` is false, refuses a file that lacks any.
pub(super) async fn prepare(connection: &mut SqliteConnection, may_migrate: bool) -> Result<(), StoreError> {
    let missing = migrations::missing(read_status(connection).await?)?;
    match missing.as_slice() {
        [] => Ok(()),
        missing if !may_migrate => Err(migrations::refuse(missing)),
        _ => MIGRATIONS.up(connection).await,
    }
}

async fn read_status(connection: &mut SqliteConnection) -> Result<Vec<MigrationStatus>, StoreError> {
    let table = "/* read_status */ SELECT count(*) FROM sqlite_schema WHERE name = '_sqlx_migrations'";
    let tables: i64 = sqlx::query_scalar(table).fetch_one(&mut *connection).await.map_err(store_error)?;
    if tables == 0 { Ok(MIGRATIONS.compare(&[])) } else { MIGRATIONS.status(connection).await }
}

/// Connection options outside the store's pools.
pub(super) fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).busy_timeout(BUSY_TIMEOUT)
}

async fn connect(path: &Path) -> Result<SqliteConnection, StoreError> {
    own_log::check(path).await?;
    options(path)
        .connect()
        .await
        .map_err(|error| StoreError::Unusable(format!("can't open {}: {error}", path.display())))
}

pub(super) async fn status(path: &Path) -> Result<Vec<MigrationStatus>, StoreError> {
    read_status(&mut connect(&find(path)?).await?).await
}

/// True if the file has all migrations.
pub(super) async fn is_current(path: &Path) -> bool {
    let status = if path.exists() { status(path).await.ok() } else { None };
    status.and_then(|status| migrations::missing(status).ok()).is_some_and(|missing| missing.is_empty())
}

pub(super) async fn up(path: &Path) -> Result<Vec<MigrationStatus>, StoreError> {
    let path = &find(path)?;
    let _held = lock(path).await?;
    let mut connection = connect(path).await?;
    let missing = migrations::missing(read_status(&mut connection).await?)?;
    MIGRATIONS.up(&mut connection).await?;
    Ok(missing)
}

pub(super) async fn down(path: &Path, target: i64) -> Result<(), StoreError> {
    let path = &find(path)?;
    let _held = lock(path).await?;
    let mut connection = connect(path).await?;
    migrations::missing(read_status(&mut connection).await?)?;
    MIGRATIONS.down(&mut connection, target).await
}

/// A connection to a ledger with this program's schema or an earlier one.
pub(super) async fn earlier(path: &Path) -> Result<SqliteConnection, StoreError> {
    let is_none = |why: &str| StoreError::Unusable(format!("{} is not a jobledger database{why}", path.display()));
    let mut connection = connect(path).await?;
    let status = read_status(&mut connection).await.map_err(|error| is_none(&format!(": {error}")))?;
    let all = status.len();
    if migrations::missing(status)?.len() == all {
        return Err(is_none(""));
    }
    Ok(connection)
}

/// A connection to a file that has all migrations. A server may have the file open.
pub(super) async fn beside(path: &Path) -> Result<SqliteConnection, StoreError> {
    let mut connection = connect(&find(path)?).await?;
    prepare(&mut connection, false).await?;
    Ok(connection)
}

/// Gives the log another id. No server may have the file open.
pub(super) async fn renew_log_id(path: &Path, log_id: LogId) -> Result<(), StoreError> {
    let path = &find(path)?;
    let _held = lock(path).await?;
    rename_log(path, log_id).await
}

async fn rename_log(path: &Path, log_id: LogId) -> Result<(), StoreError> {
    let mut connection = connect(path).await?;
    prepare(&mut connection, false).await?;
    rename(&mut connection, log_id).await?;
    connection.close().await.map_err(store_error)
}

/// Migrates a copy that no other process uses to this program's schema, and gives it its own log id and mark.
pub(super) async fn adopt(copy: &Path, log_id: LogId) -> Result<SqliteConnection, StoreError> {
    let mut connection = connect(copy).await?;
    MIGRATIONS.up(&mut connection).await?;
    rename(&mut connection, log_id).await?;
    own_log::mark_copy(&mut connection).await?;
    Ok(connection)
}

async fn rename(connection: &mut SqliteConnection, log_id: LogId) -> Result<(), StoreError> {
    let query = sqlx::query("/* renew_log_id */ UPDATE ledger SET log_id = $1").bind(log_id.0);
    query.execute(connection).await.map_err(store_error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tables(path: &Path) -> Vec<String> {
        let sql = "/* tables */ SELECT name FROM sqlite_schema WHERE name NOT LIKE '%sqlx%' ORDER BY name";
        sqlx::query_scalar(sql).fetch_all(&mut connect(path).await.unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn every_migration_can_be_undone_and_done_again() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("x.db");
        std::fs::write(&path, "").unwrap();
        assert_eq!(up(&path).await.unwrap().len(), migrations::SQLITE.len());
        let there = tables(&path).await;
        assert!(there.contains(&"job_event".to_owned()), "{there:?}");
        for target in (0..migrations::SQLITE.len() as i64).rev() {
            down(&path, target).await.unwrap();
            up(&path).await.unwrap();
            assert_eq!(tables(&path).await, there);
        }
        down(&path, 0).await.unwrap();
        assert_eq!(tables(&path).await, Vec::<String>::new());
        up(&path).await.unwrap();
        assert!(up(&path).await.unwrap().is_empty(), "nothing to do");
    }
}
