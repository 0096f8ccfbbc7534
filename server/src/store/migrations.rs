//! Migrates a database to this server's schema, and back.

use std::{borrow::Cow, cmp::Ordering, fmt};

use sha2::{Digest as _, Sha256};
use sqlx::{
    SqlSafeStr,
    migrate::{AppliedMigration, Migrate, MigrateError, Migration, MigrationType, Migrator},
};

use super::StoreError;

/// A migration, up and down.
#[derive(Clone, Copy)]
pub(super) struct Script {
    version: i64,
    name: &'static str,
    up: &'static str,
    down: &'static str,
}

/// All databases have the same migrations by number and name, each in a folder of its own.
macro_rules! scripts {
    ($folder:literal) => {
        scripts!(
            $folder,
            (1, "ledger", "0001_ledger"),
            (2, "small_payloads", "0002_small_payloads"),
            (3, "running_in_log", "0003_running_in_log"),
            (4, "quotas", "0004_quotas"),
            (5, "token_use", "0005_token_use"),
            (6, "org_events", "0006_org_events"),
            (7, "bulk_operations", "0007_bulk_operations"),
            (8, "workers", "0008_workers"),
            (9, "revoked_tokens", "0009_revoked_tokens"),
            (10, "edits", "0010_edits"),
            (11, "erasures", "0011_erasures")
        )
    };
    ($folder:literal, $(($version:literal, $name:literal, $file:literal)),*) => {
        &[$($crate::store::migrations::Script::new(
            $version,
            $name,
            include_str!(concat!("../../migrations/", $folder, "/", $file, ".up.sql")),
            include_str!(concat!("../../migrations/", $folder, "/", $file, ".down.sql")),
        )),*]
    };
}

/// The migrations of SQLite.
pub(super) const SQLITE: &[Script] = scripts!("sqlite");
/// The migrations of PostgreSQL.
pub(super) const POSTGRES: &[Script] = scripts!("postgres");

/// PostgreSQL's functions, all in one file. They are applied after the migrations, and again whenever the file has changed.
pub(super) const FUNCTIONS: Functions =
    Functions { version: 14, sql: include_str!("../../migrations/postgres/functions.sql") };

/// The functions of one version.
pub(super) struct Functions {
    /// Raised with every change, so that an older program does not replace a newer program's functions.
    pub(super) version: i32,
    pub(super) sql: &'static str,
}

impl Functions {
    pub(super) fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.sql).into()
    }

    /// Compares the functions with those of a database, which have this version and digest.
    pub(super) fn compare(&self, found: i32, digest: Option<&[u8]>) -> MigrationStatus {
        let state = match found.cmp(&self.version) {
            Ordering::Less => MigrationState::Missing,
            Ordering::Greater => MigrationState::Newer,
            Ordering::Equal if digest == Some(&self.digest()) => MigrationState::Applied,
            Ordering::Equal => MigrationState::Different,
        };
        MigrationStatus {
            kind: StepKind::Functions,
            version: found.max(self.version).into(),
            name: "functions".to_owned(),
            state,
            loses: String::new(),
        }
    }
}

impl Script {
    const fn new(version: i64, name: &'static str, up: &'static str, down: &'static str) -> Self {
        Self { version, name, up, down }
    }

    fn migration(&self, kind: MigrationType) -> Migration {
        let sql = if kind.is_down_migration() { self.down } else { self.up };
        Migration::new(self.version, Cow::Borrowed(self.name), kind, SqlSafeStr::into_sql_str(sql), false)
    }
}

/// Kinds of steps of the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// A migration, which can be undone.
    Migration,
    /// PostgreSQL's functions, which are replaced as a whole.
    Functions,
}

/// The state of one step of the schema in a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationStatus {
    /// The kind of the step.
    pub kind: StepKind,
    /// The number of the migration, by which migrations are ordered, or the version of the functions.
    pub version: i64,
    /// The name of the step. Empty if this program doesn't know it.
    pub name: String,
    /// What the database has of the step.
    pub state: MigrationState,
    /// What undoing the step loses, in words for people.
    pub loses: String,
}

/// What a database has of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationState {
    /// The step is applied.
    Applied,
    /// The step is not applied.
    Missing,
    /// The step is applied, with other contents than this program has under its number.
    Different,
    /// The step is applied, and this program doesn't know it: a newer one applied it.
    Newer,
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Applied => "applied",
            Self::Missing => "missing",
            Self::Different => "applied, but changed since",
            Self::Newer => "applied by a newer jobledger",
        })
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            // This program doesn't know the name of a newer program's migration.
            StepKind::Migration if self.name.is_empty() => write!(f, "{:04}", self.version),
            StepKind::Migration => write!(f, "{:04} {}", self.version, self.name),
            StepKind::Functions => write!(f, "{} {}", self.name, self.version),
        }
    }
}

/// The version, if it is above all that this program knows.
pub(super) fn newer(version: i64) -> Option<i64> {
    let known = SQLITE.iter().map(|script| script.version).max();
    Some(version).filter(|version| Some(*version) > known)
}

/// The migrations of one kind of database. The caller holds a lock against other migrations of the same database.
pub(super) struct Migrations {
    scripts: &'static [Script],
    migrator: Migrator,
}

impl Migrations {
    pub(super) fn new(scripts: &'static [Script], table: &'static str) -> Self {
        let up = scripts.iter().map(|script| script.migration(MigrationType::ReversibleUp));
        let down = scripts.iter().map(|script| script.migration(MigrationType::ReversibleDown));
        let mut migrator = Migrator::with_migrations(up.chain(down).collect());
        migrator.dangerous_set_table_name(table);
        // The caller holds a lock already.
        migrator.set_locking(false);
        Self { scripts, migrator }
    }

    /// The state of each migration in a database that has these migrations applied.
    pub(super) fn compare(&self, applied: &[AppliedMigration]) -> Vec<MigrationStatus> {
        let known = self.scripts.iter().map(|script| {
            let found = applied.iter().find(|applied| applied.version == script.version);
            let state = match found {
                None => MigrationState::Missing,
                Some(found) if found.checksum == script.migration(MigrationType::ReversibleUp).checksum => {
                    MigrationState::Applied
                }
                Some(_) => MigrationState::Different,
            };
            let loses = script.down.lines().filter_map(|line| line.strip_prefix("-- loses: "));
            MigrationStatus {
                kind: StepKind::Migration,
                version: script.version,
                name: script.name.to_owned(),
                state,
                loses: loses.collect::<Vec<_>>().join(" "),
            }
        });
        let newer =
            applied.iter().filter(|applied| self.scripts.iter().all(|script| script.version != applied.version));
        let newer = newer.map(|applied| MigrationStatus {
            kind: StepKind::Migration,
            version: applied.version,
            name: String::new(),
            state: MigrationState::Newer,
            loses: String::new(),
        });
        known.chain(newer).collect()
    }

    /// The state of each migration in a database that has a table of migrations.
    pub(super) async fn status(&self, connection: &mut impl Migrate) -> Result<Vec<MigrationStatus>, StoreError> {
        let applied = connection.list_applied_migrations(&self.migrator.table_name).await.map_err(failed)?;
        Ok(self.compare(&applied))
    }

    /// Applies the missing migrations.
    pub(super) async fn up(&self, connection: &mut impl Migrate) -> Result<(), StoreError> {
        self.migrator.run_direct(None, connection, false).await.map_err(failed)
    }

    /// Undoes the migrations above `target`.
    pub(super) async fn down<C>(&self, connection: &mut C, target: i64) -> Result<(), StoreError>
    where
        for<'c> &'c mut C: sqlx::Acquire<'c, Connection = &'c mut C>,
        C: Migrate,
    {
        self.migrator.undo(connection, target).await.map_err(failed)
    }
}

fn failed(error: MigrateError) -> StoreError {
    StoreError::Unusable(format!("migration failed: {error}"))
}

/// The missing steps of a database that this program may use. An error if the database is newer, or has other contents.
pub(super) fn missing(all: Vec<MigrationStatus>) -> Result<Vec<MigrationStatus>, StoreError> {
    let is = |state| move |status: &&MigrationStatus| status.state == state;
    if let Some(newer) = all.iter().find(is(MigrationState::Newer)) {
        return Err(StoreError::Unusable(format!(
            "the database has {newer}, which this program doesn't know: it was migrated by a newer jobledger"
        )));
    }
    if let Some(different) = all.iter().find(is(MigrationState::Different)) {
        return Err(StoreError::Unusable(format!(
            "{different} in the database differs from this program's: a different build applied it"
        )));
    }
    Ok(all.into_iter().filter(|status| status.state == MigrationState::Missing).collect())
}

/// The error of a server that may not migrate a database in which these steps are missing.
pub(super) fn refuse(missing: &[MigrationStatus]) -> StoreError {
    let names: Vec<_> = missing.iter().map(ToString::to_string).collect();
    StoreError::Unusable(format!("the database lacks {}: run `jobledger migrate up` on it first", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change to the functions must raise their version and update the digest here. A database with other functions under the
    /// same version is refused.
    #[test]
    fn functions_that_have_changed_have_another_version() {
        let digest: String = hex::encode(FUNCTIONS.digest());
        assert_eq!(
            (FUNCTIONS.version, digest.as_str()),
            (14, "4b09fdab0a9400d84771ca85189fee431619488dae9135504034ba6168b9d85e")
        );
    }

    #[test]
    fn functions_of_another_version_or_build_are_told_apart() {
        let state = |version, digest: Option<&[u8]>| FUNCTIONS.compare(version, digest).state;
        let digest = FUNCTIONS.digest();
        assert_eq!(state(0, None), MigrationState::Missing);
        assert_eq!(state(FUNCTIONS.version, Some(&digest)), MigrationState::Applied);
        assert_eq!(state(FUNCTIONS.version, Some(&[0; 32])), MigrationState::Different);
        assert_eq!(state(FUNCTIONS.version + 1, Some(&digest)), MigrationState::Newer);
        let newer = missing(vec![FUNCTIONS.compare(FUNCTIONS.version + 1, None)]).unwrap_err().to_string();
        let expected = format!("the database has functions {}, which this program doesn't know", FUNCTIONS.version + 1);
        assert!(newer.starts_with(&expected), "{newer}");
    }
}
