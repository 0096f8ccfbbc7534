//! Refuses a database that lies beside the WAL of another.
//!
//! SQLite applies whatever WAL it finds beside a file. If a copy replaces the database of a server that was killed,
//! SQLite writes the old database's WAL into the copy. So a server marks its file at each start: it sets
//! `user_version`, which nothing else uses, to a random number, checkpoints, and notes the number in the lock file. If
//! the WAL is not empty and the file's mark is not the noted one, the WAL belongs to another file. This detects every
//! copy that `jobledger backup` made (each has its own mark), and every other copy made before the server's last start.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Duration};

use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::time::sleep;
use uuid::Uuid;

use super::{error::store_error, file::lock_of, wal};
use crate::store::StoreError;

/// A server that starts at the same time changes the file and the note one after the other, so a mismatch is checked again.
const LOOKS: u32 = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// The file's `user_version`.
type Mark = u32;

/// The marks that the file may have: the previous and the current one. They differ only while a server marks the file.
#[derive(Clone, Copy)]
struct Noted([Mark; 2]);

impl Noted {
    fn read(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(lock_of(path)).ok()?;
        let mut marks = text.split_whitespace().map(|mark| Mark::from_str_radix(mark, 16).ok());
        Some(Self([marks.next()??, marks.next()??]))
    }

    /// The text always has the same length, so overwriting it never leaves a partial one.
    fn write(self, lock: &File) -> Result<(), StoreError> {
        let Self([before, now]) = self;
        let text = format!("{before:08x} {now:08x}\n");
        let written = lock.write_all_at(text.as_bytes(), 0).and_then(|()| lock.sync_all());
        written.map_err(|error| StoreError::Unavailable(format!("can't write the lock file: {error}")))
    }
}

/// Refuses a database whose WAL belongs to another file.
pub(super) async fn check(path: &Path) -> Result<(), StoreError> {
    let log = wal::path_of(path);
    if is_empty(&log) {
        return Ok(());
    }
    for look in 0..LOOKS {
        if look > 0 {
            sleep(LOOK_PAUSE).await;
        }
        let (Some(Noted(marks)), Some(mark)) = (Noted::read(path), read_mark(path).await) else { return Ok(()) };
        if marks.contains(&mark) {
            return Ok(());
        }
    }
    Err(StoreError::Unusable(format!(
        "the WAL {} does not belong to {}: use `jobledger restore COPY` to install a copy. If both files are from \
         one snapshot of the disk, remove {}",
        log.display(),
        path.display(),
        lock_of(path).display()
    )))
}

/// True for a missing or empty file.
pub(super) fn is_empty(log: &Path) -> bool {
    std::fs::metadata(log).map_or(true, |log| log.len() == 0)
}

/// The mark in the file itself, without its WAL. SQLite reads it: if this process opened and closed the file,
/// SQLite's locks on it would be lost.
pub(super) async fn read_mark(path: &Path) -> Option<Mark> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(true);
    let mut connection = options.connect().await.ok()?;
    let mark = sqlx::query_scalar::<_, i32>("PRAGMA user_version").fetch_one(&mut connection).await.ok();
    let _ = connection.close().await;
    mark.map(i32::cast_unsigned)
}

/// Marks a file whose lock was just taken. If another process is reading the file, the file keeps its mark.
pub(super) async fn mark(path: &Path, connection: &mut SqliteConnection, lock: &File) -> Result<(), StoreError> {
    if !empty_log(connection).await? {
        return match read_mark(path).await {
            Some(mark) => Noted([mark, mark]).write(lock),
            None => Ok(()),
        };
    }
    let before: i32 =
        sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *connection).await.map_err(store_error)?;
    let now = new_mark();
    Noted([before.cast_unsigned(), now]).write(lock)?;
    set_mark(connection, now).await?;
    if empty_log(connection).await? {
        Noted([now, now]).write(lock)?;
    }
    Ok(())
}

/// Gives a copy that no other process uses its own mark.
pub(super) async fn mark_copy(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    set_mark(connection, new_mark()).await
}

/// Notes the marks of two files, either of which may be in place from here on.
pub(super) async fn note_both(lock: &File, present: &Path, copy: &Path) -> Result<(), StoreError> {
    let (present, copy) = (read_mark(present).await, read_mark(copy).await);
    match present.or(copy).zip(copy) {
        Some((present, copy)) => Noted([present, copy]).write(lock),
        None => Ok(()),
    }
}

fn new_mark() -> Mark {
    Uuid::new_v4().as_fields().0
}

async fn set_mark(connection: &mut SqliteConnection, mark: Mark) -> Result<(), StoreError> {
    let sql = format!("PRAGMA user_version = {}", mark.cast_signed());
    sqlx::query(AssertSqlSafe(sql)).execute(connection).await.map_err(store_error)?;
    Ok(())
}

/// Checkpoints the whole WAL and truncates it. Returns false if another process is reading.
async fn empty_log(connection: &mut SqliteConnection) -> Result<bool, StoreError> {
    let sql = "PRAGMA wal_checkpoint(TRUNCATE)";
    let (busy, _, _): (i64, i64, i64) = sqlx::query_as(sql).fetch_one(connection).await.map_err(store_error)?;
    Ok(busy == 0)
}
