//! Files that hold what callers gave: for their owner alone, and never through a link that somebody else has put there.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Creates a file that is not there yet.
///
/// # Errors
///
/// If anything is there, a link that leads nowhere included, or it can't be created.
pub fn create_new(path: &Path) -> io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes what an earlier run has written there, if it did.
///
/// # Errors
///
/// If something else is there than a plain file, or it can't be removed.
pub fn remove_earlier(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(ErrorKind::AlreadyExists, "there is something else than a plain file")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
