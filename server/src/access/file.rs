//! Reading of configured files, which are read again when they change.

use std::{io, path::Path, time::Duration};

/// How often files are checked for changes.
pub(crate) const LOOK: Duration = Duration::from_secs(5);
/// The largest file, in bytes.
const MAX_BYTES: u64 = 4 << 20;

/// Reads a small file.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// As [`read`], on a blocking thread.
pub(crate) async fn read_aside(path: &Path) -> io::Result<Vec<u8>> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || read(&path)).await.unwrap_or_else(|ended| Err(io::Error::other(ended)))
}
