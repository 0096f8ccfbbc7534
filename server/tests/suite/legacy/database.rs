//! A database of the service that jobledger replaces.

use sqlx::{AssertSqlSafe, Executor as _, PgConnection};

use crate::{legacy::tables, support::harness::Database};

/// An old database.
pub(crate) struct LegacyDatabase {
    database: Database,
}

impl LegacyDatabase {
    /// The tables without rows, in the schema `public`.
    pub(crate) async fn empty() -> Self {
        let legacy = Self { database: Database::postgres().await };
        legacy.run(tables::TABLES).await;
        legacy
    }

    /// The tables with `n` rows each in `jobs` and `job`.
    pub(crate) async fn with_rows(n: usize) -> Self {
        let legacy = Self::empty().await;
        for sql in tables::rows(n) {
            legacy.run(&sql).await;
        }
        legacy
    }

    pub(crate) fn url(&self) -> String {
        self.database.url_as("postgres")
    }

    pub(crate) async fn connect(&self) -> PgConnection {
        self.database.connect_as("postgres").await
    }

    pub(crate) async fn run(&self, sql: &str) {
        self.connect().await.execute(AssertSqlSafe(sql.to_owned())).await.expect("the SQL runs");
    }
}
