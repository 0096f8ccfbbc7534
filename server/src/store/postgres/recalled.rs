//! A batch that begins where this server's last one on the org has left the log: one round trip, which locks the head, sees that
//! the log's last record is still that one's, writes, and commits. Only for batches that need nothing but jobs that
//! are remembered.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, postgres::PgArguments};

use super::{
    columns::Columns,
    connections::Connections,
    error::{commit, commit_error},
    memory::{End, Memory},
    write,
};
use crate::{
    domain::{clock::Time, id::OrgId, job::Job},
    store::{
        Batch, Changes, Loaded, Needs, RecordId, StoreError,
        recent::{Left, Recent},
        rows::Columns as _,
    },
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
    jobs: Vec<Job>,
    /// What the commit runs, and where it leaves the log and the jobs.
    statement: Option<(String, PgArguments, End, Left)>,
}

/// Begins such a batch, if these needs can be met from memory.
pub(super) fn recall(
    writers: &Arc<Connections>,
    memory: &Arc<Memory>,
    org: OrgId,
    needs: &Needs,
    commands: usize,
) -> Option<RecalledBatch> {
    let Needs { jobs, types, keys, requests, ready, expired, due, misdated, imports } = needs;
    let needs_more = !(keys.is_empty() && requests.is_empty() && ready.is_empty() && imports.is_empty())
        || expired.is_some()
        || due.is_some()
        || misdated.is_some();
    if needs_more || types.is_empty() && jobs.is_empty() {
        return None;
    }
    let (known, unknown) = memory.part(org, types);
    let (end, now) = memory.recall(org).filter(|_| unknown.is_empty())?;
    if write::is_time_to_fold(&end, now, commands) {
        return None;
    }
    let wanted = jobs.len();
    let jobs = memory.jobs(org, &end, jobs);
    if jobs.len() < wanted {
        return None;
    }
    let (writers, memory) = (Arc::clone(writers), Arc::clone(memory));
    Some(RecalledBatch { writers, memory, org, end, now, types: known, jobs, statement: None })
}

#[async_trait]
impl Batch for RecalledBatch {
    fn now(&self) -> Time {
        self.now
    }

    async fn load(&mut self, _org: OrgId, _needs: &Needs) -> Result<Loaded, StoreError> {
        Ok(Loaded { jobs: self.jobs.clone(), ..Loaded::end(self.end.head, std::mem::take(&mut self.types)) })
    }

    async fn write(&mut self, org: OrgId, changes: &Changes) -> Result<Option<RecordId>, StoreError> {
        // What is answered by how the jobs are rests on their being so.
        if changes.is_empty() && self.jobs.is_empty() {
            return Ok(None);
        }
        let log = write::Log::new(org, self.end, changes, self.now);
        let Some((sql, arguments)) = write::resuming(&log, changes)? else {
            return Err(StoreError::Conflict("what is written takes more than one statement".to_owned()));
        };
        let left = Recent::leaving(org, self.end.record, log.end(changes).record, changes);
        self.statement = Some((sql, arguments, log.end(changes), left));
        Ok(log.record())
    }

    async fn has(&mut self, _org: OrgId, _record: RecordId) -> Result<bool, StoreError> {
        Err(StoreError::Conflict("a batch that begins from memory holds no head yet".to_owned()))
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { writers, memory, org, statement, .. } = *self;
        let Some((sql, arguments, end, mut jobs)) = statement else { return Ok(()) };
        memory.committing(org, &mut jobs);
        let mut connection = writers.take().await?;
        connection.commits();
        match commit(sqlx::query_with(AssertSqlSafe(sql), arguments).fetch_one(&mut *connection)).await {
            Ok(row) => {
                connection.give_back();
                memory.left(org, end, jobs, Columns::of(&row).optional_time()?);
                Ok(())
            }
            Err(sqlx::Error::Database(said)) if said.code().as_deref() == Some(MOVED_ON) => {
                connection.give_back();
                memory.missed(org);
                Err(StoreError::Conflict(said.message().to_owned()))
            }
            Err(error) => Err(memory.failed(error, commit_error)),
        }
    }
}
