//! Finds files and computes their digests.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use jobledger_client::worker::{Context, Error};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::display::Display;

pub(super) const JOB_TYPE: &str = "digest_file";
const CHUNK: usize = 1 << 20;

/// A job's payload.
#[derive(Serialize, Deserialize)]
pub(super) struct Task {
    path: String,
    size: u64,
}

/// A job's result.
#[derive(Serialize)]
pub(super) struct Digest {
    sha256: String,
    bytes: u64,
}

/// A regular file.
pub(super) struct FoundFiles {
    pub(super) task: Task,
    modified: SystemTime,
}

/// Finds the regular files under a path. Returns the paths that were skipped, each with the reason.
pub(super) fn walk(
    root: &Path,
    database: Option<&str>,
    takes_all: bool,
    files: &mpsc::Sender<FoundFiles>,
    display: &Display,
) -> Vec<(PathBuf, String)> {
    let mut skipped = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        // Closing a database file would release SQLite's locks on it, which belong to the process.
        if database.is_some_and(|database| path.to_str().is_some_and(|path| path.starts_with(database))) {
            continue;
        }
        let step = (|| -> io::Result<()> {
            // Links are not followed: a link to a file is not a regular file, and one to a directory may form a cycle.
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() && path != root && !takes_all && is_left_out(&path) {
                skipped.push((path.clone(), "hidden, or marked as a cache: --all includes it".to_owned()));
            } else if metadata.is_dir() {
                let entries = fs::read_dir(&path)?.map(|entry| entry.map(|entry| entry.path()));
                pending.extend(entries.collect::<io::Result<Vec<_>>>()?);
            } else if metadata.is_file() {
                let text = path.to_str().ok_or_else(|| io::Error::other("its name is not UTF-8"))?;
                let task = Task { path: text.to_owned(), size: metadata.len() };
                display.found();
                if files.blocking_send(FoundFiles { task, modified: metadata.modified()? }).is_err() {
                    // The receiver is gone: the demo is over.
                    pending.clear();
                }
            }
            Ok(())
        })();
        if let Err(error) = step {
            skipped.push((path, error.to_string()));
        }
    }
    skipped
}

/// True of hidden directories and of caches (<https://bford.info/cachedir/>).
fn is_left_out(directory: &Path) -> bool {
    let is_hidden = directory.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    is_hidden || directory.join("CACHEDIR.TAG").is_file()
}

/// An idempotency key of bounded length that changes with the file's path, modification time and size.
pub(super) fn key(file: &FoundFiles) -> String {
    let modified = file.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut hasher = Sha256::new();
    hasher.update(&file.task.path);
    hasher.update(modified.as_nanos().to_le_bytes());
    hasher.update(file.task.size.to_le_bytes());
    format!("{JOB_TYPE}:{}", hex::encode(hasher.finalize()))
}

/// The handler: digests a file chunk by chunk and reports the progress.
pub(super) async fn digest(context: Context, task: Task) -> Result<Digest, Error> {
    let path = task.path.clone();
    // Reading blocks, so it has a thread of its own, which checks for cancellation itself.
    let digested = spawn_blocking(move || -> io::Result<Digest> {
        let name = Path::new(&task.path).file_name().unwrap_or_default();
        context.stage(name.to_string_lossy());
        let mut file = File::open(&task.path)?;
        let (mut hasher, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; CHUNK]);
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                return Ok(Digest { sha256: hex::encode(hasher.finalize()), bytes });
            }
            if context.is_canceled() {
                return Err(io::Error::other("interrupted"));
            }
            hasher.update(&buffer[..n]);
            bytes += n as u64;
            context.progress((bytes * 100).checked_div(task.size).unwrap_or(100).min(100) as u8);
        }
    });
    digested.await?.map_err(|error| Error::permanent(format_args!("{path}: {error}")).code(code(&error)))
}

fn code(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "FILE_VANISHED",
        io::ErrorKind::PermissionDenied => "PERMISSION_DENIED",
        _ => "UNREADABLE",
    }
}
