//! `restore`: replaces a database with a copy.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use sqlx::{ConnectOptions as _, Connection as _, SqliteConnection};
use uuid::Uuid;

use super::{
    backup::{Copy, not_written},
    error::store_error,
    file::{beside, lock, resolve},
    migrations, own_log, tokens, wal,
};
use crate::{
    domain::{clock::Time, id::LogId},
    store::{CopyProgress, Restored, RevokeTokens, StoreError},
};

/// Replaces a file that no process has open. A rename puts the copy in place, so that a kill leaves one or the other there.
pub(super) async fn restore(
    path: &Path,
    from: &Path,
    revoke: RevokeTokens,
    now: Time,
    progress: CopyProgress<'_>,
) -> Result<Restored, StoreError> {
    let (path, from) = (&resolve(path)?, &find(from)?);
    if path == from {
        return Err(StoreError::Unusable(format!("{} is the database to be replaced, not a copy", from.display())));
    }
    let held = lock(path).await?;
    let mut source = migrations::earlier(from).await?;
    let mut present = Present::open(path).await?;
    let copy = Copy::make(&mut source, path, ".restoring", progress).await?;
    source.close().await.map_err(store_error)?;
    let log_id = LogId(Uuid::new_v4());
    let mut connection = copy.adopt(log_id).await?;
    let revoked = match (revoke, &mut present) {
        (RevokeTokens::All, _) => Some(tokens::revoke_all(&mut connection, now).await?),
        (RevokeTokens::RevokedSince, Present::Open(present)) => revoke_again(&mut connection, present).await?,
        (RevokeTokens::RevokedSince, Present::Nothing | Present::OthersLog | Present::Damaged) => None,
    };
    connection.close().await.map_err(store_error)?;
    own_log::note_both(&held, path, &copy.path).await?;
    let failed = |error: io::Error| not_written(path, &error);
    let is_there = path.try_exists().map_err(failed)?;
    copy.finish(Some(path.as_path()).filter(|_| is_there)).map_err(failed)?;
    let aside = beside(path, &format!(".replaced-{}", now.format("%Y%m%dT%H%M%SZ")));
    // The WAL belongs to another file. Under the matching name SQLite would apply it to the replaced database.
    let log_aside = if matches!(present, Present::OthersLog) { ".others-wal" } else { "-wal" };
    let mut kept = Kept::default();
    let mut put_in_place = || {
        if is_there {
            fs::hard_link(path, &aside)?;
            kept.linked = Some(aside.clone());
        }
        for (suffix, suffix_aside) in [("-wal", log_aside), ("-journal", "-journal")] {
            let (log, log_aside) = (beside(path, suffix), beside(&aside, suffix_aside));
            if !own_log::is_empty(&log) {
                fs::rename(&log, &log_aside)?;
                kept.moved.push((log, log_aside));
            }
        }
        for suffix in ["-wal", "-shm"] {
            match fs::remove_file(beside(path, suffix)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&copy.path, path)?;
        copy.folder.sync_all()
    };
    if let Err(error) = put_in_place() {
        kept.undo();
        return Err(failed(error));
    }
    // Until here the lock kept other processes from opening the replaced file.
    drop(present);
    Ok(Restored { log_id, replaced: Some(aside).filter(|_| is_there), revoked })
}

/// The path of the copy, which must exist.
fn find(from: &Path) -> Result<PathBuf, StoreError> {
    from.canonicalize().map_err(|error| StoreError::Unusable(format!("can't read {}: {error}", from.display())))
}

/// The files that were linked or renamed so far.
#[derive(Default)]
struct Kept {
    linked: Option<PathBuf>,
    moved: Vec<(PathBuf, PathBuf)>,
}

impl Kept {
    /// Undoes the links and renames, as far as possible.
    fn undo(self) {
        for (name, aside) in self.moved {
            let _ = fs::rename(aside, name);
        }
        if let Some(aside) = self.linked {
            let _ = fs::remove_file(aside);
        }
    }
}

/// What is at the path before the restore.
enum Present {
    Nothing,
    /// A database, locked exclusively, with its whole WAL checkpointed.
    Open(SqliteConnection),
    /// A file beside the WAL of another.
    OthersLog,
    /// A damaged database, or a file that is none.
    Damaged,
}

impl Present {
    async fn open(path: &Path) -> Result<Self, StoreError> {
        if own_log::is_empty(path) && own_log::is_empty(&wal::path_of(path)) {
            return Ok(Self::Nothing);
        }
        if !path.exists() || own_log::check(path).await.is_err() {
            return Ok(Self::OthersLog);
        }
        match Self::lock(path).await {
            Ok(connection) => Ok(Self::Open(connection)),
            Err(sqlx::Error::Database(said)) if is_damage(&*said) => Ok(Self::Damaged),
            Err(error) => Err(StoreError::Unusable(format!("another process has {} open: {error}", path.display()))),
        }
    }

    /// Locks the database exclusively. Changing the journal mode checkpoints the WAL, and fails if others have the file open.
    async fn lock(path: &Path) -> Result<SqliteConnection, sqlx::Error> {
        let mut connection = migrations::options(path).connect().await?;
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode = DELETE").fetch_one(&mut connection).await?;
        if mode != "delete" {
            return Err(sqlx::Error::Protocol(format!("its journal stays in mode {mode}")));
        }
        sqlx::query("BEGIN EXCLUSIVE").execute(&mut connection).await?;
        Ok(connection)
    }
}

/// SQLITE_CORRUPT and SQLITE_NOTADB (<https://www.sqlite.org/rescode.html>), with any extended code.
fn is_damage(said: &dyn sqlx::error::DatabaseError) -> bool {
    let code = said.code().and_then(|code| code.parse::<u32>().ok());
    matches!(code.map(|code| code & 0xff), Some(11 | 26))
}

/// Revokes in the copy what is revoked in the replaced database. Returns how many tokens; `None` if those can't be read.
async fn revoke_again(
    copy: &mut SqliteConnection,
    present: &mut SqliteConnection,
) -> Result<Option<usize>, StoreError> {
    let known = match tokens::list_in(present).await {
        Ok(known) => known,
        Err(error) => {
            tracing::debug!(%error, "which tokens are revoked can't be read");
            return Ok(None);
        }
    };
    let mut revoked = 0;
    for token in known {
        if let Some(at) = token.revoked_at {
            revoked += tokens::revoke_in(copy, token.id, at).await?;
        }
    }
    Ok(Some(revoked))
}
