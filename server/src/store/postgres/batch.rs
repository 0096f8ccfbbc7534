//! A write transaction on the log of one org or of several. Plain creates take three round trips, and four if rows have to be
//! loaded first, however many commands there are.
//!
//! 1. BEGIN, with `jobledger.begin_batch`: names the orgs, locks their heads, then reads the ends of the logs and the clock;
//! 2. [`load`](PostgresBatch::load): loads jobs by ids and keys, and types. Skipped if all of them are cached;
//! 3. [`write`](PostgresBatch::write): one statement, and more only for retention;
//! 4. COMMIT.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, PgConnection};

use super::{
    bulk,
    cache::{Cache, End},
    columns::Columns,
    connections::{Connection, arguments},
    erasure,
    error::{commit, commit_error, store_error},
    expired, import,
    load::{
        Behind, Names, Of, load_all_held, load_due, load_jobs, load_misdated, load_populations, load_ready, load_rows,
        load_unfolded,
    },
    settings::{load_outdated, load_ready_types, load_settings},
    write::{self, OrgWrite},
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
    },
    store::{
        Batch, Changes, FoundReady, HeldBy, Loaded, Needs, RecordId, StoreError,
        expired::{may_go, told_by_series},
        rows::Columns as _,
        state::{MOST_HELD, OrgState},
        states::Left,
        window::Short,
    },
};

pub(super) struct PostgresBatch {
    connection: Connection,
    now: Time,
    memory: Arc<Cache>,
    /// The orgs whose heads the transaction has locked.
    held: Vec<OrgId>,
    /// The ends of their logs, as [`begin`](super::begin::begin) found them.
    found: HashMap<OrgId, End>,
    /// For each org that the batch writes: the new end of its log, and the state to cache after the commit.
    ends: Vec<(OrgId, End, Left)>,
    /// Types that the batch creates, to be cached after the commit.
    new_types: HashMap<OrgId, Vec<Arc<str>>>,
    /// The states of the orgs, as of the ends in `found`.
    state: HashMap<OrgId, OrgState>,
}

#[derive(Default)]
struct FoundIds {
    expired: Vec<JobId>,
    next_expiry: Option<Time>,
    due: Vec<JobId>,
    next_due: Option<Time>,
    misdated: Vec<JobId>,
    types: Vec<String>,
    /// Types that are not cached, so the database has to be asked for them.
    unknown: Vec<Arc<str>>,
    jobs: Vec<Job>,
    ready: FoundReady,
    is_there: HashSet<JobId>,
}

impl FoundIds {
    fn add(&mut self, job: Job) {
        if self.is_there.insert(job.id) {
            self.jobs.push(job);
        }
    }
}

#[async_trait]
impl Batch for PostgresBatch {
    fn now(&self) -> Time {
        self.now
    }

    fn orgs(&self) -> &[OrgId] {
        &self.held
    }

    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError> {
        self.find_states(needs.iter().map(|(org, _)| *org)).await?;
        let mut all = self.find(needs).await?;
        let mut loaded = Vec::with_capacity(needs.len());
        for (org, needs) in needs {
            let found = all.remove(org).unwrap_or_default();
            let FoundIds { expired, next_expiry, due, next_due, misdated, types, unknown, jobs, ready, .. } = found;
            // The batch may create the types that don't exist.
            let is_new = |name: &Arc<str>| types.iter().all(|found| **found != **name);
            self.new_types.insert(*org, unknown.into_iter().filter(is_new).collect());
            let head = self.end(*org)?.head;
            let connection = &mut *self.connection;
            let may_go = needs.expired.as_ref().map_or_else(Vec::new, |wanted| may_go(&jobs, &expired, wanted));
            let told = told_by_series(&head, &may_go);
            let histories = expired::load_histories(connection, *org, &jobs, &told).await?;
            let (mut sizes, mut slice, mut outdated) = (HashMap::new(), None, None);
            let mut named: BTreeSet<_> = needs.populations.iter().cloned().collect();
            if let Some(wanted) = &needs.expired {
                named.extend(jobs.iter().map(|job| Arc::clone(&job.spec.job_type)));
                outdated = load_outdated(connection, *org, &head).await?;
                sizes = expired::load_sizes(connection, *org, &may_go, wanted.most).await?;
                slice = expired::load_slice(connection, *org, wanted.most).await?;
            }
            let populations = load_populations(connection, *org, &named).await?;
            let (found_bulk, of_step) = bulk::load(connection, &self.held, *org, &needs.bulk).await?;
            let is_loaded: HashSet<_> = jobs.iter().map(|job| job.id).collect();
            let of_step = of_step.into_iter().filter(|job| !is_loaded.contains(&job.id));
            let jobs: Vec<_> = jobs.into_iter().chain(of_step).collect();
            let settings = self.state.get(org).map_or_else(Arc::default, |state| Arc::clone(state.settings()));
            let imported: Vec<_> = needs.imports.iter().map(|(id, _)| *id).collect();
            let cleared = expired::clear(connection, *org, &imported).await?;
            let marks = import::load_marks(&mut self.connection, *org, &jobs, &needs.imports).await?;
            let to_erase = jobs.iter().filter(|job| needs.erasures.jobs.contains(&job.id) || found_bulk.erases(job.id));
            let erasures = erasure::load(&mut self.connection, *org, &needs.erasures, to_erase.collect()).await?;
            loaded.push(Loaded {
                head,
                settings,
                outdated,
                bulk: found_bulk,
                erasures,
                jobs,
                ready,
                types,
                expired,
                sizes,
                slice,
                histories,
                populations,
                next_expiry,
                due,
                next_due,
                misdated,
                marks,
                cleared,
                assumes_new_keys: false,
            });
        }
        Ok(loaded)
    }

    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError> {
        let known = |(org, id): &(OrgId, JobId)| self.state.get(org)?.windows.get(*id).cloned();
        let mut jobs: Vec<_> = ids.iter().filter_map(known).collect();
        let unknown: Vec<_> = ids.iter().filter(|name| known(name).is_none()).copied().collect();
        jobs.extend(load_rows(&mut self.connection, &unknown).await?);
        Ok(jobs)
    }

    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError> {
        self.find_states(changes.iter().map(|(org, _)| *org)).await?;
        let mut logs = Vec::with_capacity(changes.len());
        for (org, changes) in changes {
            if let Some(types) = self.new_types.get_mut(org) {
                types.retain(|name| changes.tallies.contains_key(name));
            }
            let (end, mut state) = (self.end(*org)?, self.state.remove(org).unwrap_or_default());
            let fold_after = self.memory.fold_after(&state);
            let log = OrgWrite::new(*org, end, changes, self.now, &mut state, fold_after);
            if changes.is_empty() && log.record().is_none() {
                self.state.insert(*org, state);
            } else {
                self.ends.push((*org, log.end(changes), log.leaving(changes, state)));
            }
            logs.push(log);
        }
        let records = logs.iter().map(OrgWrite::record).collect();
        let writes: Vec<_> = logs.iter().zip(changes.iter().map(|(_, changes)| *changes)).collect();
        for (sql, arguments) in write::statements(&writes)? {
            sqlx::query_with(AssertSqlSafe(sql), arguments)
                .execute(&mut *self.connection)
                .await
                .map_err(|error| self.memory.failed(error, store_error))?;
        }
        Ok(records)
    }

    async fn has(&mut self, org: OrgId, record: RecordId) -> Result<bool, StoreError> {
        if record.n > self.end(org)?.record.n {
            return Ok(false);
        }
        let sql = "/* has */ SELECT id FROM jobledger.org_record WHERE org_id = $1 AND n = $2";
        let query = sqlx::query_with(sql, arguments![org.0, record.n]);
        let found = query.fetch_optional(&mut *self.connection).await.map_err(store_error)?;
        match found {
            Some(row) => Ok(Columns::of(&row).long()? == record.id),
            None => Err(StoreError::OutcomeUnknown("its batch record was already removed".to_owned())),
        }
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { mut connection, found, ends, memory, mut new_types, state, .. } = *self;
        // A batch that writes nothing still answers from the logs as it found them, and a synchronous standby may lack their
        // last commits (see `Writer::resolve`). So it commits too, unless those commits are known to be confirmed. The rollback
        // also removes the head row that `begin` has created for an org without a log.
        let is_confirmed = |(org, end): (&OrgId, &End)| end.head.seq == 0 || memory.is_confirmed(*org, end.record);
        let has_nothing = ends.is_empty() && found.iter().all(is_confirmed);
        // No time-out in the database for the commit: the writer gives up by itself, and then looks for the batch record.
        let sql =
            if has_nothing { "/* commit */ ROLLBACK" } else { "/* commit */ SET LOCAL statement_timeout = 0; COMMIT" };
        ends.iter().for_each(|(org, ..)| memory.committing(*org));
        connection.commits();
        commit(sqlx::raw_sql(sql).execute(&mut *connection)).await.map_err(commit_error)?;
        connection.give_back();
        let mut unwritten = found;
        for (org, end, left) in ends {
            unwritten.remove(&org);
            memory.left(org, end, left, None);
            memory.add_types(org, new_types.remove(&org).unwrap_or_default().into_iter());
        }
        for (org, state) in state {
            if let Some(end) = unwritten.get(&org) {
                memory.put_state(org, end.record, state);
            }
        }
        unwritten.into_iter().for_each(|(org, end)| memory.confirmed(org, end.record));
        Ok(())
    }
}

impl PostgresBatch {
    /// A transaction that has locked the heads of the orgs in `held`, and found their logs to end there.
    pub(super) fn new(
        connection: Connection,
        now: Time,
        memory: Arc<Cache>,
        held: Vec<OrgId>,
        found: HashMap<OrgId, End>,
    ) -> Self {
        let (ends, new_types, state) = (Vec::new(), HashMap::new(), HashMap::new());
        Self { connection, now, memory, held, found, ends, new_types, state }
    }

    fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// The end of an org's log, as [`begin`] found it.
    fn end(&self, org: OrgId) -> Result<End, StoreError> {
        self.found.get(&org).copied().ok_or_else(|| StoreError::Unusable(format!("the head of org {org} is not held")))
    }

    /// Loads the states of orgs for which no current state is cached.
    async fn find_states(&mut self, orgs: impl Iterator<Item = OrgId> + Send) -> Result<(), StoreError> {
        let mut behind = Vec::new();
        for org in orgs {
            if self.state.contains_key(&org) {
                continue;
            }
            let End { record, head, removals, base, .. } = self.end(org)?;
            match self.memory.take_state(org) {
                Some((as_of, known)) if as_of == record => _ = self.state.insert(org, known),
                _ if base.seq >= head.seq && base.n >= record.n => {
                    _ = self.state.insert(org, OrgState::of(head.seq, removals))
                }
                // A state from before a removal can't catch up: the log has no events of removed jobs.
                other => {
                    let known = other.filter(|(_, known)| known.removals == removals);
                    behind.push(Behind { org, base, known });
                }
            }
        }
        for (org, mut state) in load_unfolded(self.connection(), behind).await? {
            let End { head, removals, .. } = self.end(org)?;
            (state.head, state.removals) = (head.seq, removals);
            self.state.insert(org, state);
        }
        let found = self.found.iter().map(|(org, end)| (*org, end.head.org_seq));
        let is_outdated =
            |(org, as_of): &(OrgId, i64)| self.state.get(org).is_some_and(|state| state.settings().as_of != *as_of);
        let outdated: Vec<_> = found.filter(is_outdated).collect();
        if !outdated.is_empty() {
            for (org, settings) in load_settings(&mut self.connection, &outdated).await? {
                self.state.entry(org).or_default().set_settings(settings);
            }
        }
        Ok(())
    }

    /// Loads what the commands name and the states lack. Only retention and misdated jobs take a statement for each org.
    async fn find(&mut self, needs: &[(OrgId, Needs)]) -> Result<HashMap<OrgId, FoundIds>, StoreError> {
        let now = self.now;
        let mut all: HashMap<OrgId, FoundIds> = HashMap::with_capacity(needs.len());
        // Rows that are behind may look due although their jobs are not. The limit grows by the number of jobs in the state.
        let behind = |org: &OrgId| self.state.get(org).map_or(0, OrgState::len);
        let looks: Vec<Of<usize>> =
            needs.iter().filter_map(|(org, needs)| Some((*org, needs.due? + behind(org)))).collect();
        let mut due = load_due(self.connection(), &looks, now).await?;
        self.find_held(needs).await?;
        let mut names = Names::default();
        for (org, needs) in needs {
            let org = *org;
            let mut found = FoundIds::default();
            if let Some(limit) = needs.due {
                let (of_rows, next) = due.remove(&org).unwrap_or_default();
                let state = self.state.entry(org).or_default();
                (found.due, found.next_due) = state.due(of_rows, next, limit, now);
            }
            if let Some(wanted) = &needs.expired {
                let head = self.end(org)?.head;
                (found.expired, found.next_expiry) =
                    expired::load_expired(self.connection(), org, wanted, &head, now).await?;
            }
            if let Some((limit, by)) = needs.misdated {
                let behind = self.state.get(&org).map_or(0, OrgState::len);
                let of_rows = load_misdated(self.connection(), org, (limit + behind, by), now).await?;
                let state = self.state.entry(org).or_default();
                let of_rows = of_rows.into_iter().filter(|id| !state.runs(*id));
                found.misdated = state.misdated(by, now).chain(of_rows).take(limit).collect();
            }
            let state = self.state.entry(org).or_default();
            let (held, behind) = (state.held(&needs.held), state.len());
            let knows_held = state.knows_held().is_ok();
            let ids = needs.jobs.iter().chain(&found.expired).chain(&found.due).chain(&found.misdated).copied();
            let ids: Vec<_> = ids.chain(held).collect();
            ids.iter().filter_map(|id| state.get(*id)).for_each(|job| found.add(job.clone()));
            (found.types, found.unknown) = self.memory.part(org, &needs.types);
            names.jobs.extend(ids.into_iter().filter(|id| !found.is_there.contains(id)).map(|id| (org, id)));
            names.keys.extend(needs.keys.iter().map(|key| (org, Arc::clone(key))));
            if !knows_held {
                let held = needs.held.iter().map(|held| HeldBy { limit: held.limit + behind, ..held.clone() });
                names.held.extend(held.map(|held| (org, held)));
            }
            names.types.extend(found.unknown.iter().map(|name| (org, Arc::clone(name))));
            all.insert(org, found);
        }
        let (jobs, types) = load_jobs(self.connection(), &names).await?;
        for (org, name) in types {
            self.memory.add_types(org, std::iter::once(Arc::clone(&name)));
            if let Some(found) = all.get_mut(&org) {
                found.types.push(name.to_string());
            }
        }
        for job in jobs {
            // A key or a claim may lead to a job whose row is behind. The state has the job as the log has it.
            let as_it_is = self.state.get(&job.org_id).and_then(|state| state.get(job.id)).cloned();
            if let Some(found) = all.get_mut(&job.org_id) {
                found.add(as_it_is.unwrap_or(job));
            }
        }
        self.fill_windows(needs).await?;
        for (org, needs) in needs {
            if let Some((found, state)) = all.get_mut(org).zip(self.state.get(org)) {
                found.ready = state.ready(&needs.ready);
            }
        }
        Ok(all)
    }

    /// Loads the ready jobs that the windows lack.
    async fn fill_windows(&mut self, needs: &[(OrgId, Needs)]) -> Result<(), StoreError> {
        let (mut wanted, mut unknown): (Vec<Of<Short>>, Vec<_>) = (Vec::new(), Vec::new());
        for (org, needs) in needs.iter().filter(|(_, needs)| !needs.ready.is_empty()) {
            let state = self.state.entry(*org).or_default();
            for short in state.short(&needs.ready) {
                if short.is_of_all() && state.settings().has_pause() {
                    let types = load_ready_types(&mut self.connection, *org).await?;
                    let of_types = short.by_type(types, state.settings());
                    let of_types: Vec<_> = of_types.into_iter().map(|short| (*org, short)).collect();
                    let found = short.merge(load_ready(&mut self.connection, &of_types).await?);
                    unknown.extend(state.fill(&short, found).into_iter().map(|id| (*org, id)));
                } else {
                    wanted.push((*org, short));
                }
            }
        }
        let found = load_ready(self.connection(), &wanted).await?;
        for ((org, short), jobs) in wanted.iter().zip(found) {
            let ids = self.state.entry(*org).or_default().fill(short, jobs);
            unknown.extend(ids.into_iter().map(|id| (*org, id)));
        }
        for job in load_rows(self.connection(), &unknown).await? {
            self.state.entry(job.org_id).or_default().windows.know(&job);
        }
        Ok(())
    }

    /// Loads the jobs leased to claims that have a `request_id`, which a client may send again. Only for orgs whose commands
    /// need these jobs and whose states lack them.
    async fn find_held(&mut self, needs: &[(OrgId, Needs)]) -> Result<(), StoreError> {
        let is_unknown = |org: &OrgId| self.state.get(org).is_none_or(|state| state.knows_held() == Err(true));
        let asked = needs.iter().filter(|(org, needs)| !needs.held.is_empty() && is_unknown(org));
        let orgs: Vec<_> = asked.map(|(org, _)| *org).collect();
        if orgs.is_empty() {
            return Ok(());
        }
        let mut held: HashMap<OrgId, Vec<JobId>> = HashMap::new();
        for (org, id) in load_all_held(self.connection(), &orgs, MOST_HELD + 1).await? {
            held.entry(org).or_default().push(id);
        }
        let are_all = |org: &OrgId| held.get(org).is_none_or(|held| held.len() <= MOST_HELD);
        let mut names = Names::default();
        for (org, ids) in held.iter().filter(|(org, _)| are_all(org)) {
            let state = self.state.get(org);
            let is_unknown = |id: &&JobId| state.is_none_or(|state| !state.runs(**id));
            names.jobs.extend(ids.iter().filter(is_unknown).map(|id| (*org, *id)));
        }
        let (jobs, _) = load_jobs(self.connection(), &names).await?;
        let mut of_orgs: HashMap<OrgId, Vec<Job>> = HashMap::new();
        jobs.into_iter().for_each(|job| of_orgs.entry(job.org_id).or_default().push(job));
        for org in orgs {
            let jobs = of_orgs.remove(&org).unwrap_or_default();
            self.state.entry(org).or_default().set_held(jobs, are_all(&org));
        }
        Ok(())
    }
}
