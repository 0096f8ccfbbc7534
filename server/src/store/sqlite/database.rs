//! An SQLite file as its owner sees it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use uuid::Uuid;

use super::{SqliteStore, backup::backup, file, migrations, restore::restore, tokens};
use crate::{
    domain::{access::ApiToken, clock::Time, id::LogId},
    store::{
        CopyProgress, Database, MigratingDown, OpenOptions, Restored, RevokeTokens, Store, StoreError,
        migrations::MigrationStatus,
    },
};

/// The file at a path, which need not exist yet.
pub(in crate::store) struct SqliteFile(PathBuf);

impl SqliteFile {
    pub(in crate::store) fn new(path: &str) -> Self {
        Self(path.into())
    }
}

#[async_trait]
impl Database for SqliteFile {
    async fn open(&self, options: OpenOptions) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(SqliteStore::open(&self.0, options).await?))
    }

    async fn exists(&self) -> Result<bool, StoreError> {
        Ok(self.0.exists())
    }

    fn is_served(&self) -> Result<bool, StoreError> {
        file::is_served(&self.0)
    }

    async fn schema(&self) -> Result<Vec<MigrationStatus>, StoreError> {
        migrations::status(&self.0).await
    }

    async fn migrate_up(&self) -> Result<Vec<MigrationStatus>, StoreError> {
        migrations::up(&self.0).await
    }

    fn migrate_down(&self, target: i64) -> MigratingDown<'_> {
        Box::pin(migrations::down(&self.0, target))
    }

    async fn grant(&self, _role: &str) -> Result<(), StoreError> {
        Err(StoreError::Unusable("SQLite has no roles: there is nothing to grant".to_owned()))
    }

    async fn add_token(&self, token: &ApiToken) -> Result<(), StoreError> {
        tokens::make(&self.0, token).await
    }

    async fn tokens(&self) -> Result<Vec<ApiToken>, StoreError> {
        tokens::list(&self.0).await
    }

    async fn revoke_token(&self, id: Uuid, at: Time) -> Result<bool, StoreError> {
        tokens::revoke(&self.0, id, at).await
    }

    async fn set_log_id(&self, log_id: LogId) -> Result<(), StoreError> {
        migrations::renew_log_id(&self.0, log_id).await
    }

    async fn back_up(&self, to: &Path, progress: CopyProgress<'_>) -> Result<LogId, StoreError> {
        backup(&self.0, to, progress).await
    }

    async fn restore(
        &self,
        copy: &Path,
        tokens: RevokeTokens,
        at: Time,
        progress: CopyProgress<'_>,
    ) -> Result<Restored, StoreError> {
        restore(&self.0, copy, tokens, at, progress).await
    }
}
