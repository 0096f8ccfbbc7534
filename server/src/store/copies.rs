//! Copies of a database: made, put in place, and told from what they are copies of.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{DatabaseUrl, StoreError, postgres, sqlite};
use crate::domain::{clock::Time, id::LogId};

/// Gives the database's log another identity, and says which: to be done once after it was restored from a backup, while no
/// server is on it. Cursors of before are void then, instead of skipping what is written anew.
///
/// # Errors
///
/// If the database is in use by a server (SQLite), lacks migrations, or the role is not its owner's (PostgreSQL).
pub async fn renew_log_id(url: &DatabaseUrl) -> Result<LogId, StoreError> {
    let log_id = LogId(Uuid::new_v4());
    match url {
        DatabaseUrl::Sqlite(path) => sqlite::migrations::renew_log_id(path.as_ref(), log_id).await?,
        DatabaseUrl::Postgres(url) => postgres::migrations::renew_log_id(url, log_id).await?,
        DatabaseUrl::Other => return Err(DatabaseUrl::refused()),
    }
    Ok(log_id)
}

/// Copies the database, as of one moment, to a file that is not there yet, and says which log the copy has: another, so that cursors of
/// what is written after this are void where the copy is restored. Servers go on meanwhile. `progress` is told now and then how many
/// bytes are written of about how many. SQLite only.
///
/// # Errors
///
/// If the file is there, or can't be written; if the database lacks migrations; on PostgreSQL.
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

/// Replaces the database with a copy, and keeps what was there beside it under another name: see [`Restored`]. The copy is of this program's
/// schema or an earlier one, and stays as it is. API tokens are revoked as of `at`. `progress` is told now and then how many bytes are written of about how many. SQLite only.
///
/// # Errors
///
/// If a server, or anybody else, has the database; if the copy is none, or can't be read; on PostgreSQL. Nothing is changed then.
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

/// Which API tokens a database that is restored refuses, besides those that its copy does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RevokeTokens {
    /// Those that are revoked in the database that it replaces.
    RevokedSince,
    /// All.
    All,
}

/// What was put in place.
#[derive(Debug)]
pub struct Restored {
    /// The log's identity, which no database had before.
    pub log_id: LogId,
    /// Where what it replaces is kept, if there was something.
    pub replaced: Option<PathBuf>,
    /// How many API tokens it refuses besides those that its copy did; `None` where it isn't known which were revoked since that was made.
    pub revoked: Option<usize>,
}
