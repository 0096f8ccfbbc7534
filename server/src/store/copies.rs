//! Backups and restores, and the log ids that tell a copy from its original.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{DatabaseUrl, StoreError, postgres, sqlite};
use crate::domain::{clock::Time, id::LogId};

/// Gives the log a new id, and returns it. To be called once after the database was restored from a backup, while no server is
/// on it. Cursors from before are then refused, instead of skipping events that are written after the restore.
///
/// # Errors
///
/// If the database is in use by a server (SQLite), lacks migrations, or if the role does not own its tables (PostgreSQL).
pub async fn renew_log_id(url: &DatabaseUrl) -> Result<LogId, StoreError> {
    let log_id = LogId(Uuid::new_v4());
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::migrations::renew_log_id(path.as_ref(), log_id).await?,
        DatabaseUrl::Postgres(url) => postgres::migrations::renew_log_id(url, log_id).await?,
        DatabaseUrl::Other => return Err(DatabaseUrl::refused()),
    }
    Ok(log_id)
}

/// Copies the database, as of one moment, to a new file, and returns the log id of the copy. It is a new one, so that cursors
/// from after the backup are refused once the copy is restored. Servers may go on. `progress` gets, a few times a second, the
/// bytes written and about how many there will be. SQLite only.
///
/// # Errors
///
/// If the file exists, or can't be written; if the database lacks migrations; on PostgreSQL.
pub async fn backup(url: &DatabaseUrl, to: &Path, progress: impl FnMut(u64, u64)) -> Result<LogId, StoreError> {
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::backup(path.as_ref(), to, progress).await,
        DatabaseUrl::Postgres(_) => Err(StoreError::Unusable(
            "PostgreSQL has its own ways to be backed up, pg_dump and pg_basebackup among them: docs/postgresql.md"
                .to_owned(),
        )),
        DatabaseUrl::Other => Err(DatabaseUrl::refused()),
    }
}

/// Replaces the database with a copy, and keeps the replaced file beside it under another name ([`Restored::replaced`]). The
/// copy may have this program's schema or an earlier one, and is only read. API tokens are revoked as of `at`. `progress` gets,
/// a few times a second, the bytes written and about how many there will be. SQLite only.
///
/// # Errors
///
/// If any process has the database open; if the copy is no ledger, or can't be read; on PostgreSQL. The database then stays as
/// it was.
pub async fn restore(
    url: &DatabaseUrl,
    copy: &Path,
    tokens: RevokeTokens,
    at: Time,
    progress: impl FnMut(u64, u64),
) -> Result<Restored, StoreError> {
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::restore(path.as_ref(), copy, tokens, at, progress).await,
        DatabaseUrl::Postgres(_) => Err(StoreError::Unusable(
            "what has backed PostgreSQL up restores it, pg_restore for instance; then `jobledger renew-log-id`: docs/postgresql.md"
                .to_owned(),
        )),
        DatabaseUrl::Other => Err(DatabaseUrl::refused()),
    }
}

/// Which API tokens are revoked in a restored database, besides those that are revoked in the copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RevokeTokens {
    /// Tokens that are revoked in the replaced database.
    RevokedSince,
    /// All tokens.
    All,
}

/// What a restore did.
#[derive(Debug)]
pub struct Restored {
    /// The new id of the log.
    pub log_id: LogId,
    /// The replaced file's new name; `None` if there was no file.
    pub replaced: Option<PathBuf>,
    /// How many API tokens were revoked; `None` if the replaced database could not be read for them.
    pub revoked: Option<usize>,
}
