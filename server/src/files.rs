//! Files with data of callers. Only their owner may read them, and they are never opened through a link that somebody has
//! put there.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Creates a file for its owner alone.
///
/// # Errors
///
/// If anything exists at the path, even a dangling link, or the file can't be created.
pub fn create_new(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes the file of an earlier run, if there is one.
///
/// # Errors
///
/// If the path is not a plain file, or it can't be removed.
pub fn remove_earlier(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(ErrorKind::AlreadyExists, "the path exists and is not a regular file")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
