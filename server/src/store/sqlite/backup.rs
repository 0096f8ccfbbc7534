//! `backup`: copies a database file while its server runs.

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
use crate::{
    domain::id::LogId,
    files,
    store::{CopyProgress, StoreError},
};

/// How often progress is reported.
const SAY: Duration = Duration::from_millis(200);

/// Copies the committed data to a new file. The copy has another name until it is complete and synced to the disk.
pub(super) async fn backup(path: &Path, to: &Path, progress: CopyProgress<'_>) -> Result<LogId, StoreError> {
    let failed = |error: std::io::Error| not_written(to, &error);
    if to.try_exists().map_err(failed)? {
        return Err(StoreError::Unusable(format!("{} already exists", to.display())));
    }
    let mut source = migrations::beside(path).await?;
    let copy = Copy::make(&mut source, to, ".partial", progress).await?;
    source.close().await.map_err(store_error)?;
    let log_id = LogId(Uuid::new_v4());
    copy.adopt(log_id).await?.close().await.map_err(store_error)?;
    // The copy gets the permissions of the original: whoever may not read the one may not read the other.
    copy.finish(Some(path)).map_err(failed)?;
    // A hard link never replaces an existing file; a rename would.
    std::fs::hard_link(&copy.path, to).map_err(failed)?;
    copy.folder.sync_all().map_err(failed)?;
    Ok(log_id)
}

pub(super) fn not_written(file: &Path, error: &std::io::Error) -> StoreError {
    StoreError::Unusable(format!("can't write {}: {error}", file.display()))
}

/// A copy that may be incomplete. Dropping the value removes the file, unless that was renamed.
pub(super) struct Copy {
    pub(super) path: PathBuf,
    /// The folder of the copy, which is synced after the copy gets its final name.
    pub(super) folder: File,
}

impl Copy {
    /// Copies the committed data to a file beside `beside_of`. `progress` gets the bytes written and an estimate of all.
    pub(super) async fn make(
        source: &mut SqliteConnection,
        beside_of: &Path,
        suffix: &str,
        progress: CopyProgress<'_>,
    ) -> Result<Self, StoreError> {
        let failed = |error: std::io::Error| not_written(beside_of, &error);
        let folder = beside_of.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = File::open(folder).map_err(failed)?;
        if beside_of.file_name().is_none() {
            return Err(failed(std::io::ErrorKind::InvalidFilename.into()));
        }
        let copy = Self { path: beside(beside_of, suffix), folder };
        // A killed process may have left a copy.
        files::remove_earlier(&copy.path).map_err(failed)?;
        // `VACUUM INTO` accepts an existing file if it is empty.
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

    /// Gives the copy this schema, the log id and a mark of its own ([`migrations::adopt`]).
    pub(super) async fn adopt(&self, log_id: LogId) -> Result<SqliteConnection, StoreError> {
        migrations::adopt(&self.path, log_id).await
    }

    /// Syncs the copy to the disk. It gets the owner and permissions of `like`; without `like`, only its owner may read it.
    pub(super) fn finish(&self, like: Option<&Path>) -> std::io::Result<()> {
        let file = File::open(&self.path)?;
        if let Some(like) = like {
            let like = std::fs::metadata(like)?;
            file.set_permissions(like.permissions())?;
            // Only root may change the owner. For others the file already has the right owner, or keeps its own.
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
