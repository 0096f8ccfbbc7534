//! The database's file, and the lock that keeps a second server off it: a file beside it, which the kernel lets go of however its holder
//! ends.

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

/// How often who needs the file's lock looks for it, and how long it waits in between: in all for a second.
const LOOKS: u32 = 40;
const LOOK_PAUSE: Duration = Duration::from_millis(25);

/// The file itself, whatever links lead to it: the lock is on a name beside it.
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

/// The file, which is there.
pub(super) fn find(path: &Path) -> Result<PathBuf, StoreError> {
    if path.try_exists().is_ok_and(|is_there| !is_there) {
        return Err(StoreError::Unusable(format!(
            "there is no ledger at {}: --database-url or JOBLEDGER_DATABASE_URL names another, `jobledger serve` makes one",
            std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display()
        )));
    }
    resolve(path)
}

/// Takes the lock that keeps a second server off the file.
pub(super) async fn lock(path: &Path) -> Result<File, StoreError> {
    // Who only looks whether somebody has it, has it for a moment.
    for _ in 0..LOOKS {
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        sleep(LOOK_PAUSE).await;
    }
    Err(StoreError::Unusable(format!("{} is in use by another jobledger server", path.display())))
}

/// Takes the same lock, to create and migrate the file; `None` where whoever has it has done that, or takes too long.
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

/// Creates the file where there is none, for its owner alone: payloads are in it. What SQLite puts beside it is for the same.
pub(super) fn create(path: &Path) -> Result<(), StoreError> {
    match files::create_new(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(StoreError::Unusable(format!("can't create {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

/// True of a file that others than its owner may read or write.
pub(super) fn is_open_to_others(file: &Metadata) -> bool {
    file.permissions().mode() & 0o077 != 0
}

/// True if a server has the file.
pub(in crate::store) fn is_served(path: &Path) -> Result<bool, StoreError> {
    Ok(path.exists() && try_lock(&resolve(path)?)?.is_none())
}

/// The name of the lock, in which what the file is marked with is noted, too.
pub(super) fn lock_of(path: &Path) -> PathBuf {
    beside(path, "-lock")
}

/// A name beside the database's.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Takes the same lock, if it is free; `None` where a server has it. The kernel drops it with the process,
/// however that ends.
pub(super) fn try_lock(path: &Path) -> Result<Option<File>, StoreError> {
    let lock_path = lock_of(path);
    let fail = |error: std::io::Error| StoreError::Unusable(format!("can't lock {}: {error}", lock_path.display()));
    // Whoever can open it can hold the lock.
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
        tracing::warn!(file = %lock_path.display(), "others may open the lock, and hold it: chmod 600");
    }
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(fail(error)),
    }
}
