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
