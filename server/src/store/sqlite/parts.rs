//! Whether the log that SQLite has beside a database (`-wal`) is that database's.
//!
//! SQLite applies whatever log it finds there. Where a copy is put in the place of a database whose server was killed, it would write the
//! one's log into the other. So a file gets a mark whenever a server takes it (its `user_version`, which nothing else uses): that is in
//! the file itself before anything else goes to its log, and is noted in the lock file. A log beside a file with another mark is another's.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Duration};

use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::time::sleep;
use uuid::Uuid;

use super::{error::store_error, file::lock_of, wal};
use crate::store::StoreError;

/// A server that starts meanwhile changes file and note one after the other.
const LOOKS: u32 = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// What a file is marked with.
type Mark = u32;

/// Which marks a file may have: that of before and the present one, which differ while a server takes it.
#[derive(Clone, Copy)]
struct Noted([Mark; 2]);

impl Noted {
    fn read(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(lock_of(path)).ok()?;
        let mut marks = text.split_whitespace().map(|mark| Mark::from_str_radix(mark, 16).ok());
        Some(Self([marks.next()??, marks.next()??]))
    }

    /// The same length each time, so that there is no moment in which it is half of one.
    fn write(self, lock: &File) -> Result<(), StoreError> {
        let Self([before, now]) = self;
        let text = format!("{before:08x} {now:08x}\n");
        let written = lock.write_all_at(text.as_bytes(), 0).and_then(|()| lock.sync_all());
        written.map_err(|error| StoreError::Unavailable(format!("can't write the lock file: {error}")))
    }
}

/// Refuses a database with a log that is not its own.
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
        "{} is not the log of {}, which was put beside it: `jobledger restore COPY` puts a copy in place; or move the log away if the \
         database is as you want it",
        log.display(),
        path.display()
    )))
}

/// True of a log that is not there, too.
pub(super) fn is_empty(log: &Path) -> bool {
    std::fs::metadata(log).map_or(true, |log| log.len() == 0)
}

/// What is in the file itself, whatever its log says. By SQLite, since a file that this process opens and closes loses SQLite's locks.
async fn read_mark(path: &Path) -> Option<Mark> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(true);
    let mut connection = options.connect().await.ok()?;
    let mark = sqlx::query_scalar::<_, i32>("PRAGMA user_version").fetch_one(&mut connection).await.ok();
    let _ = connection.close().await;
    mark.map(i32::cast_unsigned)
}

/// Marks a file that a server has just taken. One that somebody reads keeps the mark that it has.
pub(super) async fn mark(connection: &mut SqliteConnection, lock: &File) -> Result<(), StoreError> {
    if !empty_log(connection).await? {
        return Ok(());
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

/// Marks a copy that nobody else knows of, so that it is told from what it is a copy of.
pub(super) async fn mark_copy(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    set_mark(connection, new_mark()).await
}

fn new_mark() -> Mark {
    Uuid::new_v4().as_fields().0
}

async fn set_mark(connection: &mut SqliteConnection, mark: Mark) -> Result<(), StoreError> {
    let sql = format!("PRAGMA user_version = {}", mark.cast_signed());
    sqlx::query(AssertSqlSafe(sql)).execute(connection).await.map_err(store_error)?;
    Ok(())
}

/// Brings what is in the log into the file. False if somebody reads.
async fn empty_log(connection: &mut SqliteConnection) -> Result<bool, StoreError> {
    let sql = "PRAGMA wal_checkpoint(TRUNCATE)";
    let (busy, _, _): (i64, i64, i64) = sqlx::query_as(sql).fetch_one(connection).await.map_err(store_error)?;
    Ok(busy == 0)
}
