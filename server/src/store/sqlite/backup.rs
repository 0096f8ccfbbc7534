//! A copy of a file beside its server.

use std::{
    fs::File,
    os::unix::fs::{MetadataExt as _, fchown},
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{Connection as _, SqliteConnection};
use tokio::time::{MissedTickBehavior, interval};
use uuid::Uuid;

use super::{error::store_error, file::beside, migrations};
use crate::{domain::id::LogId, files, store::StoreError};

/// How often it is said how far it is.
const SAY: Duration = Duration::from_millis(200);

/// Copies what is committed now to a file that is not there yet. Until it is whole and on the disk it has another name.
pub(in crate::store) async fn backup(
    path: &Path,
    to: &Path,
    progress: impl FnMut(u64, u64),
) -> Result<LogId, StoreError> {
    let failed = |error: std::io::Error| not_written(to, &error);
    if to.try_exists().map_err(failed)? {
        return Err(StoreError::Unusable(format!("{} is there already", to.display())));
    }
    let mut source = migrations::beside(path).await?;
    let copy = Copy::make(&mut source, to, ".partial", progress).await?;
    source.close().await.map_err(store_error)?;
    let log_id = LogId(Uuid::new_v4());
    copy.adopt(log_id).await?.close().await.map_err(store_error)?;
    // Whoever may not read the one may not read the other.
    copy.finish(Some(path)).map_err(failed)?;
    // Unlike a rename, it replaces nothing.
    std::fs::hard_link(&copy.path, to).map_err(failed)?;
    copy.folder.sync_all().map_err(failed)?;
    Ok(log_id)
}

/// A file can't be written.
pub(super) fn not_written(file: &Path, error: &std::io::Error) -> StoreError {
    StoreError::Unusable(format!("can't write {}: {error}", file.display()))
}

/// A copy that may not be whole. Removed in the end, however that comes, unless it has got another name.
pub(super) struct Copy {
    pub(super) path: PathBuf,
    /// Where it is.
    pub(super) folder: File,
}

impl Copy {
    /// Copies what is committed now, to a name beside another. `progress` is told how much of about how much is written.
    pub(super) async fn make(
        source: &mut SqliteConnection,
        beside_of: &Path,
        suffix: &str,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self, StoreError> {
        let failed = |error: std::io::Error| not_written(beside_of, &error);
        let folder = beside_of.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = File::open(folder).map_err(failed)?;
        if beside_of.file_name().is_none() {
            return Err(failed(std::io::ErrorKind::InvalidFilename.into()));
        }
        let copy = Self { path: beside(beside_of, suffix), folder };
        // Left by one that was killed.
        files::remove_earlier(&copy.path).map_err(failed)?;
        // SQLite writes to a file that is empty.
        files::create_new(&copy.path).map_err(failed)?;
        let pages = "/* pages */ SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()";
        let bytes: i64 = sqlx::query_scalar(pages).fetch_one(&mut *source).await.map_err(store_error)?;
        let target = copy.path.to_str().ok_or_else(|| failed(std::io::ErrorKind::InvalidFilename.into()))?.to_owned();
        let mut said = interval(SAY);
        said.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut copied = Box::pin(sqlx::query("/* backup */ VACUUM INTO $1").bind(target).execute(source));
        loop {
            tokio::select! {
                done = &mut copied => {
                    done.map_err(store_error)?;
                    break;
                }
                _ = said.tick() => progress(std::fs::metadata(&copy.path).map_or(0, |file| file.len()), bytes as u64),
            }
        }
        drop(copied);
        Ok(copy)
    }

    /// Makes it a ledger of its own.
    pub(super) async fn adopt(&self, log_id: LogId) -> Result<SqliteConnection, StoreError> {
        migrations::adopt(&self.path, log_id).await
    }

    /// Brings it to the disk, for those who may read `like`; without that, for its owner alone.
    pub(super) fn finish(&self, like: Option<&Path>) -> std::io::Result<()> {
        let file = File::open(&self.path)?;
        if let Some(like) = like {
            let like = std::fs::metadata(like)?;
            file.set_permissions(like.permissions())?;
            // Only root may; for others it is theirs in any case, or stays so.
            let _ = fchown(&file, Some(like.uid()), Some(like.gid()));
        }
        file.sync_all()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
