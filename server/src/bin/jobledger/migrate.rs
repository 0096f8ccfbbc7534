//! `jobledger migrate`.

use std::{
    error::Error,
    io::{self, Write as _},
};

use jobledger_server::store::{
    DatabaseUrl,
    migrations::{MigrationState, MigrationStatus, StepKind},
    postgres::role_sql,
};

use crate::cli::Migrate;

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn run(command: Migrate) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut out = io::stdout().lock();
    match command {
        Migrate::Up { database, grant } => {
            let database = database.database_url.database()?;
            let applied = database.migrate_up().await?;
            for migration in &applied {
                writeln!(out, "applied {migration}")?;
            }
            if applied.is_empty() {
                writeln!(out, "nothing to do: the database is up to date")?;
            }
            if let Some(role) = grant {
                database.grant(&role).await?;
                writeln!(out, "granted {role} the rights that serving needs")?;
            }
        }
        Migrate::Status(database) => {
            for migration in database.database_url.database()?.schema().await? {
                writeln!(out, "{migration}: {}", migration.state)?;
            }
        }
        Migrate::Down { database, to, yes } => down(&mut out, &database.database_url, to, yes).await?,
        Migrate::RoleSql { role } => write!(out, "{}", role_sql(&role))?,
    }
    Ok(())
}

async fn down(
    out: &mut impl io::Write,
    url: &DatabaseUrl,
    to: Option<i64>,
    yes: bool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let database = url.database()?;
    let all = database.schema().await?;
    let is_applied =
        |step: &&MigrationStatus| step.kind == StepKind::Migration && step.state == MigrationState::Applied;
    let last = all.iter().filter(is_applied).map(|migration| migration.version).max().unwrap_or(0);
    let target = to.unwrap_or(last - 1).max(0);
    let undone: Vec<_> = all.iter().filter(is_applied).filter(|migration| migration.version > target).rev().collect();
    if undone.is_empty() {
        writeln!(out, "nothing to do: no migration above {target} is applied")?;
        return Ok(());
    }
    for migration in &undone {
        let loses = if migration.loses.is_empty() { "nothing" } else { &migration.loses };
        writeln!(out, "undoing {migration} loses {loses}")?;
    }
    if !yes {
        return Err("nothing was changed: add --yes to undo these migrations".into());
    }
    database.migrate_down(target).await?;
    for migration in undone {
        writeln!(out, "undone {migration}")?;
    }
    Ok(())
}
