//! The database's file, and the lock file beside it that keeps a second server off. The kernel releases the lock
//! however the holder ends.

use std::{
    fs::{File, Metadata, Permissions, TryLockError},
    io::ErrorKind,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::OFlags;
use tokio::time::sleep;

use super::migrations;
use crate::{files, store::StoreError};

/// Attempts to take the lock, and the pause between them: one second in all.
const LOOKS: u32 = 40;
const LOOK_PAUSE: Duration = Duration::from_millis(25);

/// The canonical path of the file, with links resolved: the lock's name is derived from it.
pub(super) fn resolve(path: &Path) -> Result<PathBuf, StoreError> {
    let fail = |error: std::io::Error| StoreError::Unusable(format!("can't open {}: {error}", path.display()));
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(StoreError::Unusable(format!("{} is not the name of a file", path.display())));
    };
    if path.exists() {
        return path.canonicalize().map_err(fail);
    }
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    Ok(folder.canonicalize().map_err(fail)?.join(name))
}

/// The canonical path of an existing file.
pub(super) fn find(path: &Path) -> Result<PathBuf, StoreError> {
    if path.try_exists().is_ok_and(|is_there| !is_there) {
        return Err(StoreError::Unusable(format!(
            "no database at {}: set --database-url or JOBLEDGER_DATABASE_URL, or create one with `jobledger serve`",
            std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display()
        )));
    }
    resolve(path)
}

/// Takes the lock that keeps a second server off the file.
pub(super) async fn lock(path: &Path) -> Result<File, StoreError> {
    // [`is_served`] takes the lock for a moment, so a lock that is taken is tried again.
    for _ in 0..LOOKS {
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        sleep(LOOK_PAUSE).await;
    }
    Err(StoreError::Unusable(format!("{} is in use by another jobledger server", path.display())))
}

/// Takes the lock to create and migrate the file. `None` if its holder has done that, or keeps it for over a second.
pub(super) async fn prepare(path: &Path) -> Result<Option<File>, StoreError> {
    for _ in 0..LOOKS {
        let lock = try_lock(path)?;
        if lock.is_some() || migrations::is_current(path).await {
            return Ok(lock);
        }
        sleep(LOOK_PAUSE).await;
    }
    Ok(None)
}

/// Creates the file if there is none, readable by its owner only. SQLite gives the files beside it the same permissions.
pub(super) fn create(path: &Path) -> Result<(), StoreError> {
    match files::create_new(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(StoreError::Unusable(format!("can't create {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

/// True if others than the owner have any permission on the file.
pub(super) fn is_open_to_others(file: &Metadata) -> bool {
    file.permissions().mode() & 0o077 != 0
}

/// True if a server has the file's lock.
pub(super) fn is_served(path: &Path) -> Result<bool, StoreError> {
    Ok(path.exists() && try_lock(&resolve(path)?)?.is_none())
}

/// The path of the lock file, which also has the noted marks (`own_log.rs`).
pub(super) fn lock_of(path: &Path) -> PathBuf {
    beside(path, "-lock")
}

/// The database's path with a suffix.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Takes the lock if it is free; `None` if another process has it. The kernel releases it when the process ends,
/// however that happens.
pub(super) fn try_lock(path: &Path) -> Result<Option<File>, StoreError> {
    let lock_path = lock_of(path);
    let fail = |error: std::io::Error| StoreError::Unusable(format!("can't lock {}: {error}", lock_path.display()));
    // Whoever can open the lock file can take the lock, so only the owner may open it.
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&lock_path)
        .map_err(fail)?;
    if is_open_to_others(&file.metadata().map_err(fail)?)
        && file.set_permissions(Permissions::from_mode(0o600)).is_err()
    {
        tracing::warn!(file = %lock_path.display(), "other users can take the database's lock and block the server: chmod 600");
    }
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(fail(error)),
    }
}
