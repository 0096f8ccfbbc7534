//! A copy that takes a file's place.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use sqlx::{Connection as _, SqliteConnection};
use uuid::Uuid;

use super::{
    backup::{Copy, not_written},
    error::store_error,
    file::{beside, lock, resolve},
    migrations, parts, tokens, wal,
};
use crate::{
    domain::{access::ApiToken, clock::Time, id::LogId},
    store::{
        StoreError,
        copies::{Restored, RevokeTokens},
    },
};

/// Puts a copy in the place of a file that nobody has open. At no moment is there a file without its log, or none: killed at any,
/// either the one or the other is in place.
pub(in crate::store) async fn restore(
    path: &Path,
    from: &Path,
    revoke: RevokeTokens,
    now: Time,
    progress: impl FnMut(u64, u64),
) -> Result<Restored, StoreError> {
    let (path, from) = (&resolve(path)?, &find(from)?);
    if path == from {
        return Err(StoreError::Unusable(format!("{} is the database itself", from.display())));
    }
    let _held = lock(path).await?;
    let mut source = migrations::earlier(from).await?;
    let failed = |error: io::Error| not_written(path, &error);
    let present = Present::look(path).await.map_err(failed)?;
    let copy = Copy::make(&mut source, path, ".restoring", progress).await?;
    source.close().await.map_err(store_error)?;
    let log_id = LogId(Uuid::new_v4());
    let mut connection = copy.adopt(log_id).await?;
    let revoked = match revoke {
        RevokeTokens::All => Some(tokens::revoke_all(&mut connection, now).await?),
        RevokeTokens::RevokedSince => match &present {
            Present::Ledger(known) => Some(revoke_again(&mut connection, known).await?),
            Present::Nothing | Present::Torn | Present::Unreadable => None,
        },
    };
    connection.close().await.map_err(store_error)?;
    let is_there = !matches!(present, Present::Nothing);
    copy.finish(Some(path.as_path()).filter(|_| is_there && path.exists())).map_err(failed)?;
    let aside = beside(path, &format!(".replaced-{}", now.format("%Y%m%dT%H%M%SZ")));
    if let Present::Ledger(_) = present {
        close_log(path).await?;
    }
    let put_in_place = || {
        let (log, memory) = (wal::path_of(path), beside(path, "-shm"));
        if !parts::is_empty(&log) {
            // Beside a file that isn't its own it would be written into it.
            let is_own = !matches!(present, Present::Torn);
            fs::rename(&log, if is_own { wal::path_of(&aside) } else { beside(&aside, ".others-wal") })?;
        }
        if path.exists() {
            fs::hard_link(path, &aside)?;
        }
        for left in [log, memory] {
            match fs::remove_file(left) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&copy.path, path)?;
        copy.folder.sync_all()
    };
    put_in_place().map_err(failed)?;
    Ok(Restored { log_id, replaced: Some(aside).filter(|_| is_there), revoked })
}

/// The copy, which is there.
fn find(from: &Path) -> Result<PathBuf, StoreError> {
    from.canonicalize().map_err(|error| StoreError::Unusable(format!("can't read {}: {error}", from.display())))
}

/// What is there before.
enum Present {
    Nothing,
    /// With these API tokens.
    Ledger(Vec<ApiToken>),
    /// A file with another's log.
    Torn,
    /// Something that can't be opened.
    Unreadable,
}

impl Present {
    async fn look(path: &Path) -> io::Result<Self> {
        let is_empty = |path: &Path| fs::metadata(path).map_or(true, |file| file.len() == 0);
        if is_empty(path) && parts::is_empty(&wal::path_of(path)) {
            return Ok(if path.try_exists()? { Self::Unreadable } else { Self::Nothing });
        }
        if parts::check(path).await.is_err() {
            return Ok(Self::Torn);
        }
        Ok(match tokens::list(path).await {
            Ok(tokens) => Self::Ledger(tokens),
            Err(error) => {
                tracing::debug!(%error, "what is there can't be read");
                Self::Unreadable
            }
        })
    }
}

/// Revokes those in the copy that are revoked in what it replaces. How many.
async fn revoke_again(copy: &mut SqliteConnection, known: &[ApiToken]) -> Result<usize, StoreError> {
    let mut revoked = 0;
    for token in known {
        if let Some(at) = token.revoked_at {
            revoked += tokens::revoke_in(copy, token.id, at).await?;
        }
    }
    Ok(revoked)
}

/// Brings all of a file's log into it, and leaves it without one, which takes that nobody else has it open.
async fn close_log(path: &Path) -> Result<(), StoreError> {
    let mut connection = migrations::beside(path).await?;
    let mode = sqlx::query_scalar("PRAGMA journal_mode = DELETE").fetch_one(&mut connection).await;
    let _ = connection.close().await;
    match mode {
        Ok(mode) if String::eq(&mode, "delete") => Ok(()),
        other => Err(StoreError::Unusable(format!(
            "somebody else has {} open: {}",
            path.display(),
            other.map_or_else(|error| error.to_string(), |mode| format!("it stays in mode {mode}"))
        ))),
    }
}
