//! Begins a write transaction: locks the heads, and reads where the logs end and the clock.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    sync::Arc,
};

use sqlx::AssertSqlSafe;
use uuid::Uuid;

use super::{
    batch::PostgresBatch,
    cache::{Cache, End},
    columns::Columns,
    connections::{Connection, Connections, arguments},
    error::{is_lost, store_error},
};
use crate::{
    domain::id::{LogId, OrgId},
    store::{
        Head, StoreError,
        row_writes::Base,
        rows::{self, Columns as _},
    },
};

/// Begins a transaction and locks the heads of these orgs. For one org it waits for the head, and creates the head row if there
/// is none. Of several orgs it locks the heads that exist and are free.
///
/// # Errors
///
/// [`StoreError::Conflict`] if the log of an org is not the one that this server has witnessed. The database's log id is
/// renewed then, and nothing else has happened.
pub(super) async fn begin(
    writers: &Arc<Connections>,
    orgs: &[OrgId],
    memory: Arc<Cache>,
) -> Result<PostgresBatch, StoreError> {
    let mut connection = writers.take().await?;
    // A message of several statements takes no parameters, so the text has the arguments; UUIDs need no quoting. Isolation is
    // not left to the database's default: each statement of the function must see what was committed before it.
    let mut sql =
        "BEGIN ISOLATION LEVEL READ COMMITTED; /* begin_batch */ SELECT * FROM jobledger.begin_batch(".to_owned();
    let log_id = memory.log_id();
    let witnessed: Vec<_> = orgs.iter().map(|org| memory.witnessed(*org)).collect();
    list(&mut sql, orgs.iter().map(|org| org.0));
    list(&mut sql, witnessed.iter().map(|record| OrNull(record.map(|record| record.n))));
    list(&mut sql, witnessed.iter().map(|record| OrNull(record.map(|record| record.id))));
    sql.push(')');
    let rows = loop {
        match sqlx::raw_sql(AssertSqlSafe(sql.as_str())).fetch_all(&mut *connection).await {
            Ok(rows) => break rows,
            // The transaction has not begun, so it can begin on another connection.
            Err(error) if connection.is_reused() && is_lost(&error) => connection.replace().await?,
            Err(error) => return Err(store_error(error)),
        }
    };
    let (mut held, mut found, mut now) = (Vec::with_capacity(rows.len()), HashMap::new(), None);
    for row in &rows {
        let mut columns = Columns::of(row);
        // If none of several heads is free, the only row has nothing but the clock.
        now = Some(columns.time()?);
        if columns.peek_is_null()? {
            break;
        }
        let (org, is_other) = (OrgId(columns.uuid()?), columns.optional_flag()?);
        let (head, record) = rows::head(&mut columns)?;
        let (folded_seq, folded_n, removals) = (columns.long()?, columns.long()?, columns.long()?);
        let base = Base { seq: columns.long()?, n: columns.long()? };
        let end = End { head, record, folded_seq, folded_n, removals, base };
        if is_other == Some(true)
            && let Some(was) = log_id
        {
            return Err(found_other(connection, &memory, (org, &head), was).await);
        }
        held.push(org);
        found.insert(org, end);
    }
    let now = now.ok_or_else(|| rows::damaged("head"))?;
    found.iter().for_each(|(org, end)| memory.found(*org, *end, now));
    Ok(PostgresBatch::new(connection, now, memory, held, found))
}

/// Appends an array to the arguments of a call.
fn list(sql: &mut String, values: impl Iterator<Item = impl fmt::Display>) {
    sql.push_str(if sql.ends_with('(') { "'{" } else { ", '{" });
    for (n, value) in values.enumerate() {
        write!(sql, "{}{value}", if n == 0 { "" } else { "," }).expect("writing to a string");
    }
    sql.push_str("}'");
}

struct OrNull(Option<i64>);

impl fmt::Display for OrNull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => number.fmt(f),
            None => f.write_str("NULL"),
        }
    }
}

/// Ends a transaction that found another history in an org's log: another record where this server has witnessed one, or an end
/// before it. Renews the database's log id, unless another server has already, and drops what this server has cached.
async fn found_other(
    mut connection: Connection,
    memory: &Cache,
    (org, head): (OrgId, &Head),
    was: LogId,
) -> StoreError {
    const SQL: &str = "/* renew_log_id */ SELECT jobledger.renew_log_id($1, $2)";
    const LOG_ID: &str = "/* renew_log_id */ SELECT log_id FROM jobledger.ledger";
    let renew = async {
        sqlx::raw_sql("/* renew_log_id */ ROLLBACK").execute(&mut *connection).await.map_err(store_error)?;
        let query = sqlx::query_with(SQL, arguments![was.0, Uuid::new_v4()]);
        let row = query.fetch_one(&mut *connection).await.map_err(store_error)?;
        let is_renewed = Columns::of(&row).flag()?;
        // A statement of its own: if another server has just renewed the id, the snapshot of the one before does not show it.
        let turn = memory.turn();
        let row = sqlx::query(LOG_ID).fetch_one(&mut *connection).await.map_err(store_error)?;
        Ok((is_renewed, turn, LogId(Columns::of(&row).uuid()?)))
    };
    match renew.await {
        Ok((is_renewed, turn, now)) => {
            connection.give_back();
            if is_renewed {
                tracing::error!(org_id = %org, seq = head.seq, log_id = %now, "a log differs from the one known: its database was replaced \
                    by one that lacks commits; renewed the log id, so subscribers get an error");
            }
            memory.has_log(turn, now);
            StoreError::Conflict("the database's log id changed".to_owned())
        }
        Err(error) => error,
    }
}
