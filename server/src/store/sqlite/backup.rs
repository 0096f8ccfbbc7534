//! A copy of a file beside its server.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::Connection as _;
use tokio::time::{MissedTickBehavior, interval};
use uuid::Uuid;

use super::{error::store_error, migrations};
use crate::{domain::id::LogId, files, store::StoreError};

/// How often it is said how far it is.
const SAY: Duration = Duration::from_millis(200);

/// Copies what is committed now to a file that is not there yet. Until it is whole and on the disk it has another name.
pub(in crate::store) async fn backup(
    path: &Path,
    to: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<LogId, StoreError> {
    let failed = |error: std::io::Error| StoreError::Unusable(format!("can't write {}: {error}", to.display()));
    let exists = || StoreError::Unusable(format!("{} is there already", to.display()));
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder).map_err(failed)?;
    let name = to.file_name().ok_or_else(|| failed(std::io::ErrorKind::InvalidFilename.into()))?;
    if to.try_exists().map_err(failed)? {
        return Err(exists());
    }
    let mut partial = name.to_owned();
    partial.push(".partial");
    let partial = Partial(to.with_file_name(partial));
    // Left by one that was killed.
    files::remove_earlier(&partial.0).map_err(failed)?;
    // SQLite writes to a file that is empty.
    files::create_new(&partial.0).map_err(failed)?;
    let mut connection = migrations::beside(path).await?;
    let pages = "/* pages */ SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()";
    let bytes: i64 = sqlx::query_scalar(pages).fetch_one(&mut connection).await.map_err(store_error)?;
    let target = partial.0.to_str().ok_or_else(|| failed(std::io::ErrorKind::InvalidFilename.into()))?.to_owned();
    let mut said = interval(SAY);
    said.set_missed_tick_behavior(MissedTickBehavior::Delay);
    {
        let mut copied = Box::pin(sqlx::query("/* backup */ VACUUM INTO $1").bind(target).execute(&mut connection));
        loop {
            tokio::select! {
                done = &mut copied => break done.map(|_| ()),
                _ = said.tick() => progress(std::fs::metadata(&partial.0).map_or(0, |file| file.len()), bytes as u64),
            }
        }
    }
    .map_err(store_error)?;
    connection.close().await.map_err(store_error)?;
    let log_id = LogId(Uuid::new_v4());
    migrations::rename_log(&partial.0, log_id).await?;
    let file = File::open(&partial.0).map_err(failed)?;
    // Whoever may not read the one may not read the other.
    let permissions = std::fs::metadata(path).and_then(|of| file.set_permissions(of.permissions()));
    permissions.and_then(|()| file.sync_all()).map_err(failed)?;
    // Unlike a rename, it replaces nothing.
    std::fs::hard_link(&partial.0, to).map_err(failed)?;
    folder.sync_all().map_err(failed)?;
    Ok(log_id)
}

/// A copy that may not be whole. Removed in the end, however that comes.
struct Partial(PathBuf);

impl Partial {
    fn remove(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.remove();
    }
}
