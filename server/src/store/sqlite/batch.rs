//! A transaction of the writer. It loads and writes with few statements, however many commands it carries.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use sqlx::SqliteConnection;
use tokio::sync::OwnedMutexGuard;

use super::{
    bulk,
    checkpoints::Checkpoints,
    erasure,
    error::store_error,
    expired,
    heads::{self, Written},
    import::load_marks,
    load::{
        End, Wanted, load_all_held, load_due, load_ends, load_held, load_jobs, load_misdated, load_outdated,
        load_populations, load_ready, load_ready_types, load_rows, load_settings, load_unfolded,
    },
    series, write,
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
        row_writes::RowWrites,
        state::{MOST_HELD, OrgState},
        states::{Left, States},
    },
};

/// An open write transaction.
pub(super) struct SqliteBatch {
    slot: OwnedMutexGuard<Option<SqliteConnection>>,
    connection: SqliteConnection,
    now: Time,
    states: Arc<States>,
    checkpoints: Arc<Checkpoints>,
    orgs: Vec<OrgId>,
    /// The ends of the logs, as found by this transaction.
    ends: HashMap<OrgId, End>,
    /// The transaction erases jobs.
    has_erased: bool,
    /// The states of the written orgs, to be cached once the transaction is committed.
    left: Vec<Left>,
}

impl SqliteBatch {
    /// `connection` has just begun a transaction. It returns to its slot only by a commit.
    pub(super) fn new(
        slot: OwnedMutexGuard<Option<SqliteConnection>>,
        connection: SqliteConnection,
        now: Time,
        (states, checkpoints): (Arc<States>, Arc<Checkpoints>),
        orgs: &[OrgId],
    ) -> Self {
        let (orgs, ends, left) = (orgs.to_vec(), HashMap::new(), Vec::new());
        Self { slot, connection, now, states, checkpoints, orgs, ends, has_erased: false, left }
    }

    /// The end of an org's log, loaded at most once.
    async fn end(&mut self, org: OrgId) -> Result<&End, StoreError> {
        if !self.ends.contains_key(&org) {
            let mut found = load_ends(&mut self.connection, [(org, &[][..])]).await?;
            self.ends.insert(org, found.remove(&org).unwrap_or_default());
        }
        Ok(&self.ends[&org])
    }
}

#[async_trait]
impl Batch for SqliteBatch {
    fn now(&self) -> Time {
        self.now
    }

    fn orgs(&self) -> &[OrgId] {
        &self.orgs
    }

    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError> {
        let named = needs.iter().map(|(org, needs)| (*org, &needs.types[..]));
        let mut ends = load_ends(&mut self.connection, named).await?;
        let (mut looked, mut ids, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for (org, needs) in needs {
            let mut end = ends.remove(org).unwrap_or_default();
            find_states(&mut self.connection, &self.states, *org, &mut end).await?;
            let (of_org, unknown) = self.look(*org, &mut end, needs).await?;
            looked.push(of_org);
            self.ends.insert(*org, end);
            if !unknown.is_empty() {
                ids.push((*org, unknown));
            }
            if !needs.keys.is_empty() {
                keys.push((*org, &needs.keys[..]));
            }
        }
        self.fill_windows(needs).await?;
        let mut jobs: HashMap<_, Vec<_>> = HashMap::new();
        if !ids.is_empty() || !keys.is_empty() {
            for job in load_jobs(&mut self.connection, &ids, &keys).await? {
                jobs.entry(job.org_id).or_default().push(job);
            }
        }
        let mut loaded = Vec::with_capacity(needs.len());
        for ((org, needs), looked) in needs.iter().zip(looked) {
            let mut jobs = jobs.remove(org).unwrap_or_default();
            let mut ready = FoundReady::default();
            if let Some(state) = self.ends.get(org).and_then(|end| end.state.as_ref()) {
                ready = state.ready(&needs.ready);
                // A key may name a job whose row is behind: the state has the current job.
                jobs.iter_mut().for_each(|job| {
                    if let Some(running) = state.get(job.id) {
                        *job = running.clone();
                    }
                });
            }
            loaded.push(self.put_together(*org, needs, looked, jobs, ready).await?);
        }
        Ok(loaded)
    }

    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError> {
        let (mut jobs, mut by_org) = (Vec::with_capacity(ids.len()), BTreeMap::<OrgId, Vec<JobId>>::new());
        for (org, id) in ids {
            match self.ends.get(org).and_then(|end| end.state.as_ref()?.windows.get(*id)) {
                Some(job) => jobs.push(job.clone()),
                None => by_org.entry(*org).or_default().push(*id),
            }
        }
        if !by_org.is_empty() {
            jobs.extend(load_rows(&mut self.connection, &Vec::from_iter(by_org)).await?);
        }
        Ok(jobs)
    }

    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError> {
        let (mut records, mut written) = (Vec::with_capacity(changes.len()), Vec::with_capacity(changes.len()));
        let (mut rows, mut due) = (Vec::new(), Vec::with_capacity(changes.len()));
        for (org, changes) in changes {
            self.end(*org).await?;
            let mut end = self.ends.remove(org).unwrap_or_default();
            find_states(&mut self.connection, &self.states, *org, &mut end).await?;
            let (before, mut state) = (end.record, end.state.take().unwrap_or_default());
            let record = changes.is_recorded().then(|| before.follow());
            let head = changes.head.unwrap_or(end.head);
            let n = record.unwrap_or(before).n;
            let fold_after = self.states.fold_after(&state);
            let RowWrites { rows: of_org, images, base, extensions, is_fold, .. } =
                state.follow(changes, (head.seq, n), self.now, fold_after);
            due.push((*org, state.next_due(changes.next_due, self.now, fold_after)));
            if record.is_none() && is_fold {
                heads::write_base(&mut self.connection, *org, base).await?;
            }
            self.left.push(Left { org: *org, before, after: record.unwrap_or(before), state });
            self.ends.insert(*org, end);
            rows.extend(of_org);
            let org = *org;
            written.extend(record.map(|record| Written {
                org,
                changes,
                head,
                before,
                record,
                base,
                images,
                extensions,
            }));
            records.push(record);
        }
        self.has_erased |= changes.iter().any(|(_, changes)| changes.erases());
        let connection = &mut self.connection;
        // Removals come first: a new job may use the idempotency key of a removed one.
        for (org, changes) in changes {
            expired::remove(connection, *org, changes).await?;
            write::edited(connection, *org, changes).await?;
            erasure::write(connection, *org, changes).await?;
        }
        write::created(connection, &written).await?;
        let edited =
            changes.iter().flat_map(|(org, changes)| changes.edited.iter().map(move |of| ((*org, of.job), of)));
        let edited: HashMap<_, _> = edited.collect();
        write::changed(connection, &rows.iter().map(Cow::as_ref).collect::<Vec<_>>(), &edited).await?;
        write::events(connection, &written).await?;
        write::org_events(connection, changes).await?;
        bulk::write(connection, changes).await?;
        series::write(connection, &written, self.now).await?;
        heads::write(connection, &written, self.now).await?;
        heads::write_retention(connection, changes, self.now).await?;
        heads::write_due(connection, &due).await?;
        Ok(records)
    }

    async fn has(&mut self, org: OrgId, record: RecordId) -> Result<bool, StoreError> {
        if record.n > self.end(org).await?.record.n {
            return Ok(false);
        }
        let query = sqlx::query_scalar::<_, i64>("/* has */ SELECT id FROM org_record WHERE org_id = $1 AND n = $2");
        match query.bind(org.0).bind(record.n).fetch_optional(&mut self.connection).await.map_err(store_error)? {
            Some(id) => Ok(id == record.id),
            None => Err(StoreError::OutcomeUnknown("its batch record was already removed".to_owned())),
        }
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { mut slot, mut connection, states, checkpoints, ends, has_erased, left, .. } = *self;
        if has_erased {
            // Before it is known: it may have happened even if it seems to fail.
            checkpoints.has_erased();
        }
        match sqlx::query("COMMIT").execute(&mut connection).await {
            Ok(_) => {
                *slot = Some(connection);
                checkpoints.committed();
                left.into_iter().for_each(|left| left.committed(&states));
                // Orgs that the transaction only read.
                for (org, end) in ends {
                    if let Some(state) = end.state {
                        states.put(org, end.record, state);
                    }
                }
                Ok(())
            }
            Err(error) => Err(match store_error(error) {
                // The pages did not fit. SQLite has rolled back, and a truncated frame fails its checksum.
                StoreError::Full(reason) => StoreError::Full(reason),
                // Other errors don't tell whether the commit happened. Only the batch record does.
                other => StoreError::OutcomeUnknown(other.to_string()),
            }),
        }
    }
}

/// Sets the org's state at `end`, unless it is set: the cached one if it is current, else a loaded one.
async fn find_states(
    connection: &mut SqliteConnection,
    states: &States,
    org: OrgId,
    end: &mut End,
) -> Result<(), StoreError> {
    if end.state.is_some() {
        return Ok(());
    }
    let state = match states.take(org) {
        Some((as_of, known)) if as_of == end.record => known,
        // No current state is cached: another process has written to the log, or this one has not yet. Some rows may be behind.
        _ if end.base.seq < end.head.seq || end.base.n < end.record.n => {
            load_unfolded(connection, org, end.base).await?
        }
        _ => OrgState::of(end.head.seq, 0),
    };
    let state = end.state.insert(state);
    if state.settings().as_of != end.head.org_seq {
        state.set_settings(load_settings(connection, org, end.head.org_seq).await?);
    }
    Ok(())
}

/// What [`SqliteBatch::look`] finds of one org before the jobs are loaded.
struct Looked {
    /// Jobs that the state has.
    known: Vec<Job>,
    expired: Vec<JobId>,
    next_expiry: Option<Time>,
    due: Vec<JobId>,
    next_due: Option<Time>,
    misdated: Vec<JobId>,
}

impl SqliteBatch {
    /// Finds the ids of the jobs that `needs` asks for. Returns the jobs that the state has, and the ids of those to be loaded.
    async fn look(&mut self, org: OrgId, end: &mut End, needs: &Needs) -> Result<(Looked, Vec<JobId>), StoreError> {
        let connection = &mut self.connection;
        let state = end.state.get_or_insert_default();
        let knows_held = needs.held.is_empty() || state.knows_held().is_ok();
        if !knows_held && state.knows_held() == Err(true) {
            let found = load_all_held(connection, org, MOST_HELD + 1).await?;
            let are_all = found.len() <= MOST_HELD;
            let unknown: Vec<_> = found.into_iter().filter(|id| are_all && !state.runs(*id)).collect();
            let jobs =
                if unknown.is_empty() { Vec::new() } else { load_jobs(connection, &[(org, unknown)], &[]).await? };
            state.set_held(jobs, are_all);
        }
        let knows_held = knows_held || state.knows_held().is_ok();
        let state = &*state;
        let (expired, next_expiry) = match &needs.expired {
            Some(wanted) => expired::load_expired(connection, org, wanted, &end.head, self.now).await?,
            None => (Vec::new(), None),
        };
        let (due, next_due) = match needs.due {
            Some(limit) => load_due(connection, org, limit, self.now, state).await?,
            None => (Vec::new(), None),
        };
        let misdated = match needs.misdated {
            Some((limit, by)) => {
                let of_rows = load_misdated(connection, org, limit + state.len(), by, self.now).await?;
                let of_rows = of_rows.into_iter().filter(|id| !state.runs(*id));
                state.misdated(by, self.now).chain(of_rows).take(limit).collect()
            }
            None => Vec::new(),
        };
        let mut held = Vec::new();
        for wanted in needs.held.iter().filter(|_| !knows_held) {
            let wanted = HeldBy { limit: wanted.limit + state.len(), ..wanted.clone() };
            let of_rows = load_held(connection, org, &wanted).await?;
            held.extend(of_rows.into_iter().filter(|id| !state.runs(*id)));
        }
        held.extend(state.held(&needs.held));
        // The state is current here: whoever else writes (an import beside this server) leaves a record, which was compared.
        let ids = needs.jobs.iter().chain(&expired).chain(&due).chain(&misdated).chain(&held);
        let ids: Vec<_> = ids.copied().collect::<BTreeSet<_>>().into_iter().collect();
        let known: Vec<_> = ids.iter().filter_map(|id| state.get(*id).cloned()).collect();
        let is_known: HashSet<_> = known.iter().map(|job| job.id).collect();
        let unknown = ids.into_iter().filter(|id| !is_known.contains(id)).collect();
        Ok((Looked { known, expired, next_expiry, due, next_due, misdated }, unknown))
    }

    /// Loads the ready jobs that the ready windows lack.
    async fn fill_windows(&mut self, needs: &[(OrgId, Needs)]) -> Result<(), StoreError> {
        let (mut wanted, mut unknown) = (Vec::new(), BTreeMap::<OrgId, Vec<JobId>>::new());
        for (org, needs) in needs.iter().filter(|(_, needs)| !needs.ready.is_empty()) {
            let Some(state) = self.ends.get_mut(org).and_then(|end| end.state.as_mut()) else { continue };
            for short in state.short(&needs.ready) {
                if short.is_of_all() && state.settings().has_pause() {
                    let types = load_ready_types(&mut self.connection, *org).await?;
                    let of_types = short.by_type(types, state.settings());
                    let of_types: Vec<_> = of_types.into_iter().map(|short| Wanted { org: *org, short }).collect();
                    let found = short.merge(load_ready(&mut self.connection, &of_types).await?);
                    unknown.entry(*org).or_default().extend(state.fill(&short, found));
                } else {
                    wanted.push(Wanted { org: *org, short });
                }
            }
        }
        let found = load_ready(&mut self.connection, &wanted).await?;
        for (Wanted { org, short }, jobs) in wanted.iter().zip(found) {
            let Some(state) = self.ends.get_mut(org).and_then(|end| end.state.as_mut()) else { continue };
            unknown.entry(*org).or_default().extend(state.fill(short, jobs));
        }
        unknown.retain(|_, ids| !ids.is_empty());
        if !unknown.is_empty() {
            for job in load_rows(&mut self.connection, &Vec::from_iter(unknown)).await? {
                if let Some(state) = self.ends.get_mut(&job.org_id).and_then(|end| end.state.as_mut()) {
                    state.windows.know(&job);
                }
            }
        }
        Ok(())
    }

    /// Adds what can be loaded only once the jobs are known: histories, sizes, populations and import marks.
    async fn put_together(
        &mut self,
        org: OrgId,
        needs: &Needs,
        looked: Looked,
        mut jobs: Vec<Job>,
        ready: FoundReady,
    ) -> Result<Loaded, StoreError> {
        let Looked { known, expired, next_expiry, due, next_due, misdated } = looked;
        let is_known: HashSet<_> = known.iter().map(|job| job.id).collect();
        // A key and an id may name the same job.
        jobs.retain(|job| !is_known.contains(&job.id));
        jobs.extend(known);
        let End { head, types, state, .. } = self.end(org).await?;
        let settings = state.as_ref().map_or_else(Arc::default, |state| Arc::clone(state.settings()));
        let (head, types) = (*head, types.clone());
        let connection = &mut self.connection;
        let may_go = needs.expired.as_ref().map_or_else(Vec::new, |wanted| may_go(&jobs, &expired, wanted));
        let histories = expired::load_histories(connection, org, &told_by_series(&head, &may_go)).await?;
        let (mut sizes, mut slice, mut outdated) = (HashMap::new(), None, None);
        let mut named: BTreeSet<_> = needs.populations.iter().cloned().collect();
        if let Some(wanted) = &needs.expired {
            named.extend(jobs.iter().map(|job| Arc::clone(&job.spec.job_type)));
            outdated = load_outdated(connection, org, &head).await?;
            sizes = expired::load_sizes(connection, org, &may_go, wanted.most).await?;
            slice = expired::load_slice(connection, org, wanted.most).await?;
        }
        let populations = load_populations(connection, org, &named).await?;
        let (found_bulk, of_step) = bulk::load(connection, org, &needs.bulk).await?;
        let is_loaded: HashSet<_> = jobs.iter().map(|job| job.id).collect();
        jobs.extend(of_step.into_iter().filter(|job| !is_loaded.contains(&job.id)));
        let imported: Vec<_> = needs.imports.iter().map(|(id, _)| *id).collect();
        let cleared = expired::clear(connection, org, &imported).await?;
        let marks = load_marks(connection, org, &jobs, &needs.imports).await?;
        let to_erase = jobs.iter().filter(|job| needs.erasures.jobs.contains(&job.id) || found_bulk.erases(job.id));
        let erasures = erasure::load(connection, org, &needs.erasures, to_erase.collect()).await?;
        Ok(Loaded {
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
        })
    }
}
