//! A batch that begins from memory, where this server's last batches left the logs of some orgs. It takes one round trip, which
//! locks the heads, checks that the last records are still the same, writes, and commits. It needs nothing but cached running
//! jobs and ready jobs. Keys of new jobs are assumed to be new: if one is not, the unique index refuses it, and the batch is
//! run again with look-ups.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, postgres::PgArguments};

use super::{
    cache::{Cache, End},
    columns::Columns,
    connections::Connections,
    error::{commit, commit_error},
    write::{self, OrgWrite},
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
    },
    store::{
        Batch, BulkNeeds, Changes, ErasureNeeds, FoundReady, HeldBy, Loaded, Needs, Ready, RecordId, StoreError,
        rows::Columns as _, state::OrgState, states::Left,
    },
};

/// The SQLSTATE of `jobledger.resume_batch` if a log has moved on.
const MOVED_ON: &str = "JL001";

/// The unique index over idempotency keys.
const KEYS: &str = "uq_job_org_idempotency";

pub(super) struct CachedBatch {
    writers: Arc<Connections>,
    memory: Arc<Cache>,
    orgs: Vec<OrgId>,
    recalled: HashMap<OrgId, CachedOrg>,
    now: Time,
    statement: Option<Resuming>,
}

/// What the commit runs, and the log ends and states that it leaves.
struct Resuming {
    sql: String,
    arguments: PgArguments,
    left: Vec<(OrgId, End, Left)>,
}

/// What is cached of an org. It meets all needs of the org's commands.
struct CachedOrg {
    end: End,
    types: Vec<String>,
    jobs: Vec<Job>,
    ready: FoundReady,
    /// The answers depend on the log, so the commit has to check it even if nothing is written.
    is_looking: bool,
    state: OrgState,
}

/// Begins a batch from memory. `None` if the cache does not meet the needs of all orgs. Each comes with its number of commands.
pub(super) fn begin_cached(
    writers: &Arc<Connections>,
    memory: &Arc<Cache>,
    needs: &[(OrgId, Needs, usize)],
) -> Option<CachedBatch> {
    let (mut recalled, mut now) = (HashMap::with_capacity(needs.len()), None);
    for (org, needs, commands) in needs {
        let Some((found, time)) = recall_one(memory, *org, needs, *commands) else {
            give_back(memory, recalled);
            return None;
        };
        recalled.insert(*org, found);
        now = now.max(Some(time));
    }
    let orgs = needs.iter().map(|(org, ..)| *org).collect();
    let (writers, memory) = (Arc::clone(writers), Arc::clone(memory));
    Some(CachedBatch { writers, memory, orgs, recalled, now: now?, statement: None })
}

fn recall_one(memory: &Cache, org: OrgId, needs: &Needs, commands: usize) -> Option<(CachedOrg, Time)> {
    let Needs { jobs, types, keys, held, ready, expired, due, misdated, imports, populations, bulk, erasures } = needs;
    let needs_more = !imports.is_empty()
        || !populations.is_empty()
        || *bulk != BulkNeeds::default()
        || *erasures != ErasureNeeds::default()
        || expired.is_some()
        || due.is_some()
        || misdated.is_some();
    if needs_more
        || !keys.is_empty() && memory.has_keys_again(org)
        || types.is_empty() && jobs.is_empty() && ready.is_empty()
    {
        return None;
    }
    let (types, unknown) = memory.part(org, types);
    let (end, now) = memory.begin_cached(org).filter(|_| unknown.is_empty())?;
    if write::is_time_to_fold(&end, now, commands) {
        return None;
    }
    let (as_of, state) = memory.take_state(org)?;
    if as_of == end.record
        && state.settings().as_of == end.head.org_seq
        && let Some((found, ready)) = find(&state, jobs, held, ready)
    {
        // A create can be refused because of what the org has, so that has to be current too.
        let is_looking = !found.is_empty() || !needs.ready.is_empty() || !needs.types.is_empty();
        return Some((CachedOrg { end, types, jobs: found, ready, is_looking, state }, now));
    }
    memory.put_state(org, as_of, state);
    None
}

/// The jobs that claims and other commands need. `None` if the state does not have all of them.
fn find(state: &OrgState, jobs: &[JobId], held: &[HeldBy], ready: &Ready) -> Option<(Vec<Job>, FoundReady)> {
    if !held.is_empty() && state.knows_held().is_err() || !state.has(ready) {
        return None;
    }
    let ready = state.ready(ready);
    if ready.jobs.iter().any(|job| state.windows.get(job.id).is_none()) {
        return None;
    }
    let named: BTreeSet<_> = jobs.iter().copied().chain(state.held(held)).collect();
    let found = named.into_iter().map(|id| state.get(id).cloned()).collect::<Option<_>>()?;
    Some((found, ready))
}

/// Puts the states back, since nothing is written.
fn give_back(memory: &Cache, recalled: HashMap<OrgId, CachedOrg>) {
    for (org, CachedOrg { end, state, .. }) in recalled {
        memory.put_state(org, end.record, state);
    }
}

#[async_trait]
impl Batch for CachedBatch {
    fn now(&self) -> Time {
        self.now
    }

    fn orgs(&self) -> &[OrgId] {
        &self.orgs
    }

    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError> {
        let load = |(org, _): &(OrgId, Needs)| {
            let CachedOrg { end, types, jobs, ready, state, .. } = self.recalled.get(org).ok_or_else(not_recalled)?;
            let end = Loaded::end(end.head, Arc::clone(state.settings()), types.clone());
            Ok(Loaded { jobs: jobs.clone(), ready: ready.clone(), assumes_new_keys: true, ..end })
        };
        needs.iter().map(load).collect()
    }

    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError> {
        let job = |(org, id): &(OrgId, JobId)| self.recalled.get(org)?.state.windows.get(*id).cloned();
        ids.iter().map(job).collect::<Option<_>>().ok_or_else(not_recalled)
    }

    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError> {
        let mut writes = Vec::with_capacity(changes.len());
        for (org, changes) in changes {
            let CachedOrg { end, state, .. } = self.recalled.get_mut(org).ok_or_else(not_recalled)?;
            let fold_after = self.memory.fold_after(state);
            writes.push((OrgWrite::new(*org, *end, changes, self.now, state, fold_after), *changes));
        }
        let records = writes.iter().map(|(log, _)| log.record()).collect();
        let is_needless = |(log, changes): &(OrgWrite<'_>, &Changes)| {
            let is_looking = self.recalled.get(&log.org).is_some_and(|recalled| recalled.is_looking);
            changes.is_empty() && log.record().is_none() && !is_looking
        };
        if writes.iter().all(is_needless) {
            return Ok(records);
        }
        let of_all: Vec<_> = writes.iter().map(|(log, changes)| (log, *changes)).collect();
        let Some((sql, arguments)) = write::resuming(&of_all)? else {
            for (org, mut recalled) in self.recalled.drain() {
                recalled.state.revert();
                self.memory.put_state(org, recalled.end.record, recalled.state);
            }
            return Err(StoreError::Conflict("what is written takes more than one statement".to_owned()));
        };
        let mut left = Vec::with_capacity(writes.len());
        for (log, changes) in &writes {
            let recalled = self.recalled.remove(&log.org).ok_or_else(not_recalled)?;
            left.push((log.org, log.end(changes), log.leaving(changes, recalled.state)));
        }
        self.statement = Some(Resuming { sql, arguments, left });
        Ok(records)
    }

    fn doubt_keys(&mut self, orgs: &[OrgId]) {
        orgs.iter().for_each(|org| self.memory.keys_again(*org));
        give_back(&self.memory, std::mem::take(&mut self.recalled));
    }

    async fn has(&mut self, _org: OrgId, _record: RecordId) -> Result<bool, StoreError> {
        Err(not_recalled())
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { writers, memory, orgs, statement, recalled, .. } = *self;
        let Some(Resuming { sql, arguments, left }) = statement else {
            give_back(&memory, recalled);
            return Ok(());
        };
        left.iter().for_each(|(org, ..)| memory.committing(*org));
        let mut connection = match writers.take().await {
            Ok(connection) => connection,
            Err(error) => {
                left.into_iter().for_each(|(_, _, left)| memory.reverted(left));
                return Err(error);
            }
        };
        connection.commits();
        match commit(sqlx::query_with(AssertSqlSafe(sql), arguments).fetch_one(&mut *connection)).await {
            Ok(row) => {
                connection.give_back();
                let clock = Columns::of(&row).optional_time()?;
                left.into_iter().for_each(|(org, end, left)| memory.left(org, end, left, clock));
                Ok(())
            }
            Err(sqlx::Error::Database(said)) if said.constraint() == Some(KEYS) => {
                connection.give_back();
                // Under row-level security the error does not say whose key it was.
                orgs.iter().for_each(|org| memory.keys_again(*org));
                left.into_iter().for_each(|(_, _, left)| memory.reverted(left));
                Err(StoreError::Conflict(said.message().to_owned()))
            }
            Err(sqlx::Error::Database(said)) if said.code().as_deref() == Some(MOVED_ON) => {
                connection.give_back();
                // The message names the orgs whose logs have moved on.
                let moved_on = said.message();
                let is_named = |org: &&OrgId| moved_on.contains(&org.0.to_string());
                orgs.iter().filter(is_named).for_each(|org| memory.missed(*org));
                left.into_iter().for_each(|(_, _, left)| memory.reverted(left));
                Err(StoreError::Conflict(moved_on.to_owned()))
            }
            Err(error) => Err(memory.failed(error, commit_error)),
        }
    }
}

fn not_recalled() -> StoreError {
    StoreError::Conflict("a batch that begins from memory has nothing else".to_owned())
}
