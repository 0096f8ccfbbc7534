//! A database as its owner sees it: what is done to it as a whole, beside servers or before they start.

use std::{future::Future, path::Path, pin::Pin, sync::Arc};

use async_trait::async_trait;
use uuid::Uuid;

use super::{
    DatabaseUrl, OpenOptions, Restored, RevokeTokens, Store, StoreError, migrations::MigrationStatus, postgres, sqlite,
};
use crate::domain::{access::ApiToken, clock::Time, id::LogId};

/// Gets, a few times a second, the bytes written and about how many there will be.
pub type CopyProgress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// Migrations on their way back. sqlx's future for them stays on one thread.
pub type MigratingDown<'a> = Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>>;

/// A database that a URL names. Nothing is opened before a method is called.
#[async_trait]
pub trait Database: Send + Sync {
    /// Opens the database to serve it, or to read and write it beside servers.
    ///
    /// # Errors
    ///
    /// If the database can't be opened or migrated, is in use by another server, is newer than this server, or if the role must
    /// not serve it.
    async fn open(&self, options: OpenOptions) -> Result<Arc<dyn Store>, StoreError>;

    /// True if there is a ledger. Changes nothing.
    ///
    /// # Errors
    ///
    /// If the database can't be read.
    async fn exists(&self) -> Result<bool, StoreError>;

    /// True if a server has this file open: whatever writes to the file delays that server. False for PostgreSQL.
    ///
    /// # Errors
    ///
    /// If the file or its lock file can't be opened.
    fn is_served(&self) -> Result<bool, StoreError>;

    /// The state of each step of the schema that the database or this program knows. Changes nothing.
    ///
    /// # Errors
    ///
    /// If the database can't be read.
    async fn schema(&self) -> Result<Vec<MigrationStatus>, StoreError>;

    /// Applies the missing steps, and returns them.
    ///
    /// # Errors
    ///
    /// If the database is newer than this program, is in use by a server (SQLite), or refuses a step.
    async fn migrate_up(&self) -> Result<Vec<MigrationStatus>, StoreError>;

    /// Undoes every migration above `target`, the last one first. What these migrations added is lost.
    ///
    /// # Errors
    ///
    /// As for [`Database::migrate_up`].
    fn migrate_down(&self, target: i64) -> MigratingDown<'_>;

    /// Grants a role what it needs to serve, and creates it if it is missing. PostgreSQL only.
    ///
    /// # Errors
    ///
    /// If the database lacks migrations; if this role may not grant these rights, or create a role; on SQLite.
    async fn grant(&self, role: &str) -> Result<(), StoreError>;

    /// Stores a token. Servers may be running, and accept it at once.
    ///
    /// # Errors
    ///
    /// If the database can't be opened, lacks migrations, or if the role does not own its tables (PostgreSQL).
    async fn add_token(&self, token: &ApiToken) -> Result<(), StoreError>;

    /// All tokens, in no order.
    ///
    /// # Errors
    ///
    /// As for [`Database::add_token`].
    async fn tokens(&self) -> Result<Vec<ApiToken>, StoreError>;

    /// Revokes a token. Servers notice within seconds. Returns true if there is a token with this id.
    ///
    /// # Errors
    ///
    /// As for [`Database::add_token`].
    async fn revoke_token(&self, id: Uuid, at: Time) -> Result<bool, StoreError>;

    /// Gives the log this id. To be called once after the database was restored from a backup, while no server is on it.
    /// Cursors from before are then refused, instead of skipping events that are written after the restore.
    ///
    /// # Errors
    ///
    /// If the database is in use by a server (SQLite), lacks migrations, or if the role does not own its tables (PostgreSQL).
    async fn set_log_id(&self, log_id: LogId) -> Result<(), StoreError>;

    /// Copies the database, as of one moment, to a new file, and returns the log id of the copy. It is a new one, so that
    /// cursors from after the backup are refused once the copy is restored. Servers may go on. SQLite only.
    ///
    /// # Errors
    ///
    /// If the file exists, or can't be written; if the database lacks migrations; on PostgreSQL.
    async fn back_up(&self, to: &Path, progress: CopyProgress<'_>) -> Result<LogId, StoreError>;

    /// Replaces the database with a copy, and keeps the replaced file beside it under another name ([`Restored::replaced`]).
    /// The copy may have this program's schema or an earlier one, and is only read. API tokens are revoked as of `at`. SQLite
    /// only.
    ///
    /// # Errors
    ///
    /// If any process has the database open; if the copy is no ledger, or can't be read; on PostgreSQL. The database then stays
    /// as it was.
    async fn restore(
        &self,
        copy: &Path,
        tokens: RevokeTokens,
        at: Time,
        progress: CopyProgress<'_>,
    ) -> Result<Restored, StoreError>;
}

impl DatabaseUrl {
    /// The database that the URL names.
    ///
    /// # Errors
    ///
    /// If it names none that jobledger knows.
    pub fn database(&self) -> Result<Box<dyn Database>, StoreError> {
        match self {
            Self::Sqlite(path) => Ok(Box::new(sqlite::SqliteFile::new(path))),
            Self::Postgres(url) => Ok(Box::new(postgres::PostgresDatabase::new(url))),
            Self::Other => Err(Self::refused()),
        }
    }
}

/// Opens the store that the URL names.
///
/// # Errors
///
/// As for [`DatabaseUrl::database`] and [`Database::open`].
pub async fn open(url: &DatabaseUrl, options: OpenOptions) -> Result<Arc<dyn Store>, StoreError> {
    url.database()?.open(options).await
}
