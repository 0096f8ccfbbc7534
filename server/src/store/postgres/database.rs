//! A PostgreSQL database as its owner sees it.

use std::{path::Path, sync::Arc};

use async_trait::async_trait;
use uuid::Uuid;

use super::{PostgresStore, migrations, roles, tokens};
use crate::{
    domain::{access::ApiToken, clock::Time, id::LogId},
    store::{
        CopyProgress, Database, MigratingDown, OpenOptions, Restored, RevokeTokens, Store, StoreError,
        migrations::{MigrationState, MigrationStatus},
    },
};

/// The database at a URL.
pub(in crate::store) struct PostgresDatabase(String);

impl PostgresDatabase {
    pub(in crate::store) fn new(url: &str) -> Self {
        Self(url.to_owned())
    }
}

#[async_trait]
impl Database for PostgresDatabase {
    async fn open(&self, options: OpenOptions) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(PostgresStore::open(&self.0, options).await?))
    }

    async fn exists(&self) -> Result<bool, StoreError> {
        Ok(self.schema().await?.iter().any(|step| step.state == MigrationState::Applied))
    }

    fn is_served(&self) -> Result<bool, StoreError> {
        Ok(false)
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

    async fn grant(&self, role: &str) -> Result<(), StoreError> {
        roles::grant(&self.0, role).await
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

    async fn back_up(&self, _to: &Path, _progress: CopyProgress<'_>) -> Result<LogId, StoreError> {
        let reason =
            "backup is for SQLite only: use PostgreSQL's tools, such as pg_dump or pg_basebackup: docs/postgresql.md";
        Err(StoreError::Unusable(reason.to_owned()))
    }

    async fn restore(
        &self,
        _copy: &Path,
        _tokens: RevokeTokens,
        _at: Time,
        _progress: CopyProgress<'_>,
    ) -> Result<Restored, StoreError> {
        let reason = "restore is for SQLite only: use PostgreSQL's tools, such as pg_restore, then `jobledger renew-log-id`: \
                      docs/postgresql.md";
        Err(StoreError::Unusable(reason.to_owned()))
    }
}
