//! Brings the file to this server's schema.

use std::borrow::Cow;

use sqlx::{
    SqlSafeStr, SqliteConnection,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use crate::store::StoreError;

/// Number, name, up and down.
const MIGRATIONS: [(i64, &str, &str, &str); 1] = [(
    1,
    "ledger",
    include_str!("../../../../migrations/sqlite/0001_ledger.up.sql"),
    include_str!("../../../../migrations/sqlite/0001_ledger.down.sql"),
)];

pub(super) fn migrator() -> Migrator {
    let migration = |version, name, kind, sql: &'static str| {
        Migration::new(version, Cow::Borrowed(name), kind, SqlSafeStr::into_sql_str(sql), false)
    };
    let all = MIGRATIONS.iter().flat_map(|&(version, name, up, down)| {
        [
            migration(version, name, MigrationType::ReversibleUp, up),
            migration(version, name, MigrationType::ReversibleDown, down),
        ]
    });
    Migrator::with_migrations(all.collect())
}

/// Applies what is missing.
pub(super) async fn run(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    migrator().run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(version) => StoreError::Unusable(format!(
            "the database has migration {version}, which this server doesn't know: it was migrated by a newer jobledger"
        )),
        other => StoreError::Unusable(format!("migration failed: {other}")),
    })
}

#[cfg(test)]
mod tests {
    use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};

    use super::*;

    async fn tables(connection: &mut SqliteConnection) -> Vec<String> {
        let sql = "/* tables */ SELECT name FROM sqlite_schema WHERE name NOT LIKE '%sqlx%' ORDER BY name";
        sqlx::query_scalar(sql).fetch_all(connection).await.unwrap()
    }

    #[tokio::test]
    async fn every_migration_can_be_undone_and_done_again() {
        let folder = tempfile::TempDir::new().unwrap();
        let options = SqliteConnectOptions::new().filename(folder.path().join("x.db")).create_if_missing(true);
        let mut connection = options.connect().await.unwrap();
        run(&mut connection).await.unwrap();
        let there = tables(&mut connection).await;
        assert!(there.contains(&"job_event".to_owned()), "{there:?}");
        migrator().undo(&mut connection, 0).await.unwrap();
        assert_eq!(tables(&mut connection).await, Vec::<String>::new());
        run(&mut connection).await.unwrap();
        run(&mut connection).await.expect("nothing to do");
        assert_eq!(tables(&mut connection).await, there);
    }
}
