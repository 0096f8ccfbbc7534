//! Migrates a database to this server's schema, and back.

use std::sync::LazyLock;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{
    MONTHS_AHEAD, assert_usable, connect, connect_options,
    error::{commit, store_error},
};
use crate::{
    domain::id::LogId,
    store::{
        StoreError,
        migrations::{self, MigrationStatus, Migrations},
    },
};

static MIGRATIONS: LazyLock<Migrations> =
    LazyLock::new(|| Migrations::new(migrations::POSTGRES, "jobledger.migration"));

/// Applies the missing steps, or refuses a database that lacks some. Servers that start at once take turns.
pub(super) async fn prepare(connection: &mut PgConnection, may_migrate: bool) -> Result<(), StoreError> {
    let missing = migrations::missing(read_status(connection).await?)?;
    match missing.as_slice() {
        [] => Ok(()),
        missing if !may_migrate => Err(migrations::refuse(missing)),
        _ => apply(connection).await.map(|_| ()),
    }
}

/// Applies the missing steps under an advisory lock.
async fn apply(connection: &mut PgConnection) -> Result<Vec<MigrationStatus>, StoreError> {
    lock(connection).await?;
    // Another process may have applied them meanwhile.
    let missing = migrations::missing(read_status(connection).await?)?;
    if !missing.is_empty() {
        // Not left to the migrator, which would need the right to create schemas even if the schema exists.
        run(connection, "/* apply */ CREATE SCHEMA IF NOT EXISTS jobledger").await?;
        // Functions return rows of the tables, so they are dropped before the tables change.
        drop_functions(connection, "AND NOT p.prosecdef").await?;
        MIGRATIONS.up(connection).await?;
        create_functions(connection).await?;
    }
    unlock(connection).await?;
    Ok(missing)
}

async fn read_status(connection: &mut PgConnection) -> Result<Vec<MigrationStatus>, StoreError> {
    let sql = "/* read_status */ SELECT to_regclass('jobledger.migration') IS NOT NULL,
            EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('jobledger.ledger') AND attname = 'functions')";
    let (is_there, has_version): (bool, bool) =
        sqlx::query_as(sql).fetch_one(&mut *connection).await.map_err(store_error)?;
    let mut status = if is_there { MIGRATIONS.status(connection).await? } else { MIGRATIONS.compare(&[]) };
    let mut found = (0, None);
    if has_version {
        let sql = "/* read_status */ SELECT functions, functions_digest FROM jobledger.ledger";
        found = sqlx::query_as(sql).fetch_one(connection).await.map_err(store_error)?;
    }
    let (version, digest): (i32, Option<Vec<u8>>) = found;
    status.push(migrations::FUNCTIONS.compare(version, digest.as_deref()));
    Ok(status)
}

/// Drops the functions that `which` selects, and the view whose rows they return. The same transaction resets their version,
/// which says that they exist.
async fn drop_functions(connection: &mut PgConnection, which: &str) -> Result<(), StoreError> {
    let sql = format!(
        "/* drop_functions */ DO $$
        DECLARE
            routine TEXT;
        BEGIN
            FOREACH routine IN ARRAY (
                SELECT coalesce(array_agg(p.oid::regprocedure::text), '{{}}') FROM pg_proc p
                WHERE p.pronamespace = 'jobledger'::regnamespace {which}) LOOP
                EXECUTE 'DROP ROUTINE IF EXISTS ' || routine || ' CASCADE';
            END LOOP;
            DROP VIEW IF EXISTS jobledger.found_job;
            IF to_regclass('jobledger.ledger') IS NOT NULL THEN
                UPDATE jobledger.ledger SET functions = 0, functions_digest = NULL;
            END IF;
        END $$"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map_err(store_error)?;
    Ok(())
}

/// Creates this program's functions. Older ones must be gone, except those that are only ever replaced.
async fn create_functions(connection: &mut PgConnection) -> Result<(), StoreError> {
    let functions = migrations::FUNCTIONS;
    let mut transaction = connection.begin().await.map_err(store_error)?;
    sqlx::raw_sql(functions.sql).execute(&mut *transaction).await.map_err(store_error)?;
    let query = sqlx::query("/* create_functions */ SELECT jobledger.make_partitions($1)").bind(MONTHS_AHEAD);
    query.execute(&mut *transaction).await.map_err(store_error)?;
    let sql = "/* create_functions */ UPDATE jobledger.ledger SET functions = $1, functions_digest = $2";
    let query = sqlx::query(sql).bind(functions.version).bind(&functions.digest()[..]);
    query.execute(&mut *transaction).await.map_err(store_error)?;
    transaction.commit().await.map_err(store_error)
}

async fn lock(connection: &mut PgConnection) -> Result<(), StoreError> {
    run(connection, "/* lock */ SELECT pg_advisory_lock(hashtext('jobledger migrate'))").await
}

async fn unlock(connection: &mut PgConnection) -> Result<(), StoreError> {
    run(connection, "/* unlock */ SELECT pg_advisory_unlock(hashtext('jobledger migrate'))").await
}

async fn run(connection: &mut PgConnection, sql: &'static str) -> Result<(), StoreError> {
    sqlx::query(sql).execute(connection).await.map_err(store_error)?;
    Ok(())
}

async fn connect_to(url: &str) -> Result<PgConnection, StoreError> {
    let mut connection = connect(&connect_options(url)?.application_name("jobledger-migrate")).await?;
    assert_usable(&mut connection).await?;
    Ok(connection)
}

/// A connection to a database that lacks no step.
async fn open(url: &str) -> Result<PgConnection, StoreError> {
    let mut connection = connect_to(url).await?;
    prepare(&mut connection, false).await?;
    Ok(connection)
}

pub(super) async fn status(url: &str) -> Result<Vec<MigrationStatus>, StoreError> {
    read_status(&mut connect_to(url).await?).await
}

pub(super) async fn up(url: &str) -> Result<Vec<MigrationStatus>, StoreError> {
    let mut connection = connect_to(url).await?;
    let applied = apply(&mut connection).await?;
    // Ends the session, and so releases its locks.
    let _ = connection.close().await;
    Ok(applied)
}

pub(super) async fn down(url: &str, target: i64) -> Result<(), StoreError> {
    let mut connection = connect_to(url).await?;
    lock(&mut connection).await?;
    migrations::missing(read_status(&mut connection).await?)?;
    // The next `migrate up` creates the functions of its own program.
    drop_functions(&mut connection, if target == 0 { "" } else { "AND NOT p.prosecdef" }).await?;
    MIGRATIONS.down(&mut connection, target).await?;
    let _ = connection.close().await;
    Ok(())
}

/// Connects to a database that lacks no step, as the owner of its tables. Row-level security hides rows from other roles.
pub(super) async fn open_as_owner(url: &str) -> Result<PgConnection, StoreError> {
    let mut connection = open(url).await?;
    let sql = "/* owner */ SELECT pg_has_role(relowner, 'MEMBER'), current_user::text, pg_get_userbyid(relowner)::text
        FROM pg_class WHERE oid = 'jobledger.ledger'::regclass";
    let (owns, user, owner): (bool, String, String) =
        sqlx::query_as(sql).fetch_one(&mut connection).await.map_err(store_error)?;
    if !owns {
        return Err(StoreError::Unusable(format!(
            "this requires the owner of the tables, {owner}: {user} is not a member of it"
        )));
    }
    // Warnings have to arrive, whatever the database's default is: see `warnings.rs`.
    let sql = "/* open_as_owner */ SET client_min_messages = 'warning'";
    sqlx::query(sql).execute(&mut connection).await.map_err(store_error)?;
    Ok(connection)
}

/// Gives the database's log another id.
pub(super) async fn renew_log_id(url: &str, log_id: LogId) -> Result<(), StoreError> {
    let mut connection = open_as_owner(url).await?;
    let query = sqlx::query("/* renew_log_id */ UPDATE jobledger.ledger SET log_id = $1").bind(log_id.0);
    commit(query.execute(&mut connection)).await.map_err(store_error)?;
    let _ = connection.close().await;
    Ok(())
}
