//! A batch that begins where this server's last one on the org has left the log: one round trip, which locks the head, sees that
//! the log is still there, writes, and commits. Only for batches that add rows and need none.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, postgres::PgArguments};

use super::{
    columns::Columns,
    connections::Connections,
    error::commit_error,
    memory::{End, Memory},
    write,
};
use crate::{
    domain::{clock::Time, id::OrgId},
    store::{Batch, Changes, Loaded, Needs, StoreError, rows::Columns as _},
};

/// The code of `jobledger.resume_batch` where the log has moved on.
const MOVED_ON: &str = "JL001";

/// See the module.
pub(super) struct RecalledBatch {
    writers: Arc<Connections>,
    memory: Arc<Memory>,
    org: OrgId,
    end: End,
    now: Time,
    types: Vec<String>,
    /// What the commit runs, and where it leaves the log.
    statement: Option<(String, PgArguments, End)>,
}

/// Begins such a batch, if these needs can be met from memory.
pub(super) fn recall(
    writers: &Arc<Connections>,
    memory: &Arc<Memory>,
    org: OrgId,
    needs: &Needs,
    commands: usize,
) -> Option<RecalledBatch> {
    let Needs { jobs, types, keys, requests, ready, expired, due, imports } = needs;
    let needs_rows =
        !(jobs.is_empty() && keys.is_empty() && requests.is_empty() && ready.is_empty() && imports.is_empty())
            || expired.is_some()
            || due.is_some();
    if needs_rows || types.is_empty() {
        return None;
    }
    let (known, unknown) = memory.part(org, types);
    let (end, now) = memory.recall(org).filter(|_| unknown.is_empty())?;
    if write::is_time_to_fold(&end, now, commands) {
        return None;
    }
    let (writers, memory) = (Arc::clone(writers), Arc::clone(memory));
    Some(RecalledBatch { writers, memory, org, end, now, types: known, statement: None })
}

#[async_trait]
impl Batch for RecalledBatch {
    fn now(&self) -> Time {
        self.now
    }

    async fn load(&mut self, _org: OrgId, _needs: &Needs) -> Result<Loaded, StoreError> {
        Ok(Loaded::end(self.end.head, std::mem::take(&mut self.types)))
    }

    async fn write(&mut self, org: OrgId, changes: &Changes) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        let End { head, folded } = self.end;
        let log = write::Log { org, before: head, folded, after: changes.head, now: self.now };
        let written = write::resuming(&log, changes)?;
        let Some((after, (sql, arguments))) = changes.head.zip(written) else {
            return Err(StoreError::Conflict("what is written takes more than adding rows".to_owned()));
        };
        self.statement = Some((sql, arguments, End { head: after, folded }));
        Ok(())
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { writers, memory, org, statement, .. } = *self;
        let Some((sql, arguments, end)) = statement else { return Ok(()) };
        // Until it is known how it went.
        memory.forget(org);
        let mut connection = writers.take().await?;
        let query = sqlx::query_with(AssertSqlSafe(sql), arguments);
        match query.fetch_one(&mut *connection).await {
            Ok(row) => {
                connection.give_back();
                memory.left(org, end, Columns::of(&row).optional_time()?);
                Ok(())
            }
            Err(sqlx::Error::Database(said)) if said.code().as_deref() == Some(MOVED_ON) => {
                connection.give_back();
                memory.missed(org);
                Err(StoreError::Conflict(said.message().to_owned()))
            }
            Err(error) => Err(commit_error(error)),
        }
    }
}
