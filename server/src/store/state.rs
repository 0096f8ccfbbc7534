//! The state of an org: what a server caches of the org's jobs as of a record of its log. It has the running jobs, whether
//! their rows are behind or not, and the first of the ready jobs ([`Windows`]).
//!
//! A state is only a hint. A batch that uses it checks in the same transaction or statement that its record is still the log's
//! last, or catches up from there. A lost state is loaded again: the images of the events after the base lead to all jobs whose
//! rows are behind.
//!
//! A batch writes the rows of the jobs that it creates, and of changed jobs that don't run after it. A running job changes in
//! the log alone until it stops, or until its row is **folded**: a batch of its org writes a row that has been behind for some
//! seconds.
//!
//! A heartbeat without news changes only the record of its batch ([`Extension`](super::extension::Extension)). The state keeps
//! such a job too. Its row is folded once the last extension is a minute old, so that old records can be removed.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;
use uuid::Uuid;

use self::fold::Added;
use super::{
    Changed, Changes, Differs, HeldBy, extension, image,
    row_writes::{Base, Events, RowWrites},
    window::Windows,
};
use crate::domain::{
    clock::Time,
    id::JobId,
    job::Job,
    job_type::OrgSettings,
    lease::LeaseSecret,
    status::JobStatus,
    transition::{Command, Tick},
};

/// Running jobs of an org that are cached although their rows are not behind.
const MOST_CLEAN: usize = 8_192;
/// Jobs of an org that claims with a `request_id` hold. Up to this many, the state has all of them.
pub(super) const MOST_HELD: usize = 4_096;

#[derive(Debug, Default)]
pub(super) struct OrgState {
    jobs: HashMap<JobId, Running>,
    /// Jobs whose rows lack events, by the `seq` of the first event that the row lacks.
    since: BTreeMap<i64, JobId>,
    /// Memory of all jobs, of those whose rows lack events, and of those whose rows lack only a lease extension, in bytes.
    bytes: usize,
    since_bytes: usize,
    extended_bytes: usize,
    /// The jobs in `since` whose rows say that they are queued.
    queued: BTreeMap<i64, JobId>,
    /// Jobs whose rows lack a lease extension, by the number of the record with their last one.
    extended: BTreeSet<(i64, JobId)>,
    /// Jobs whose rows lack nothing, by the `seq` of their last events.
    clean: BTreeSet<(i64, JobId)>,
    /// Jobs that claims with a `request_id` hold, by that and the worker.
    requests: BTreeSet<(Arc<str>, Arc<str>, JobId)>,
    /// Whether `requests` has all such jobs of the org; if not, whether they are too many for it.
    knows_held: bool,
    are_many_held: bool,
    /// The first ready jobs.
    pub(super) windows: Windows,
    /// Undo log of the last batch: the jobs that it changed as they were before, in order, and `head` as it was before.
    before: Vec<(JobId, Option<Running>)>,
    head_before: i64,
    /// The time at which `org_due` has the org swept so that its rows are folded, if this server has written one.
    noted_until: Option<Time>,
    /// The `seq` of the log's last event.
    pub(super) head: i64,
    /// How many batches have removed jobs. PostgreSQL only.
    pub(super) removals: i64,
    /// The settings of the org's types. They are current if they were read at the head's `org_seq`.
    settings: Arc<OrgSettings>,
    /// The settings before the last batch, if it has changed them.
    settings_before: Option<Arc<OrgSettings>>,
}

/// A running job, and what its row lacks.
#[derive(Debug, Clone)]
struct Running {
    job: Job,
    /// The events that the row lacks.
    lacks: Option<Lacks>,
    /// The lease extension that the row lacks, if no event came after it.
    extended: Option<Extended>,
    /// How the job differs from its row, in what its events don't say.
    differs: Differs,
}

/// The last lease extension that a row lacks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extended {
    /// The number of its record.
    pub(super) n: i64,
    /// When the record was written, by the clock.
    pub(super) at: Time,
}

/// The first event that a row lacks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lacks {
    pub(super) seq: i64,
    pub(super) recorded_at: Time,
    /// The row says that the job is queued, so that the job may look ready.
    pub(super) is_queued: bool,
}

impl Running {
    fn clean(job: &Job) -> Self {
        Self { job: job.clone(), lacks: None, extended: None, differs: Differs::Nowhere }
    }

    /// The `request_id` and the worker of the claim that holds the job.
    fn claim(&self) -> Option<(Arc<str>, Arc<str>)> {
        let lease = self.job.lease.as_ref()?;
        Some((lease.request.clone()?, Arc::clone(&lease.worker)))
    }
}

impl Extended {
    /// `None` without a time: the extension doesn't count then.
    pub(super) fn of(n: Option<i64>, at: Option<Time>) -> Option<Self> {
        Some(Self { n: n?, at: at? })
    }
}

impl Lacks {
    /// `None` without an event.
    pub(super) fn of(seq: Option<i64>, recorded_at: Option<Time>, is_queued: Option<bool>) -> Option<Self> {
        Some(Self { seq: seq?, recorded_at: recorded_at?, is_queued: is_queued.unwrap_or_default() })
    }
}

impl OrgState {
    /// A state at this `seq` in which no row is behind, of a log from which this many batches have removed jobs.
    pub(super) fn of(head: i64, removals: i64) -> Self {
        Self { head, removals, knows_held: head == 0, ..Self::default() }
    }

    /// Sets a job as of the log's end, or drops it if it does not run. `lacks` and `extended` say what its row lacks, and
    /// `differs` how its last image differs from the row.
    pub(super) fn set(&mut self, job: Job, lacks: Option<Lacks>, extended: Option<Extended>, differs: Differs) {
        self.windows.follow(&job);
        let is_running = job.status == JobStatus::Running;
        let of_extension = if extended.is_some() { Differs::InLease } else { Differs::Nowhere };
        let of_image = if lacks.is_some() { differs } else { Differs::Nowhere };
        let differs = of_extension.max(of_image);
        self.put(job.id, is_running.then_some(Running { job, lacks, extended, differs }));
    }

    /// Whether the state has all jobs that claims with a `request_id` hold. The error says whether to load them.
    pub(super) fn knows_held(&self) -> Result<(), bool> {
        if self.knows_held { Ok(()) } else { Err(!self.are_many_held) }
    }

    /// Takes the jobs that claims with a `request_id` hold by their rows. Without `are_all` there are too many to cache.
    pub(super) fn set_held(&mut self, jobs: Vec<Job>, are_all: bool) {
        (self.knows_held, self.are_many_held) = (are_all, !are_all);
        for job in jobs.into_iter().filter(|_| are_all) {
            if !self.runs(job.id) {
                self.set(job, None, None, Differs::Nowhere);
            }
        }
    }

    /// The last batch was committed: drops its undo log.
    pub(super) fn settle(&mut self) {
        self.before = Vec::new();
        self.settings_before = None;
        self.windows.begin();
    }

    /// Drops everything that the rows have as well.
    pub(super) fn shrink(&mut self) {
        for id in self.clean.iter().map(|(_, id)| *id).collect::<Vec<_>>() {
            self.put(id, None);
        }
        (self.knows_held, self.are_many_held, self.before) = (false, false, Vec::new());
        self.windows.clear();
    }

    /// Replaces what the state has of a job, and returns that.
    fn put(&mut self, id: JobId, behind: Option<Running>) -> Option<Running> {
        let before = self.jobs.remove(&id);
        if let Some((request, worker)) = before.as_ref().and_then(Running::claim) {
            self.requests.remove(&(request, worker, id));
        }
        if let Some(lacks) = before.as_ref().and_then(|before| before.lacks) {
            self.since.remove(&lacks.seq);
            self.queued.remove(&lacks.seq);
        }
        if let Some(extended) = before.as_ref().and_then(|before| before.extended) {
            self.extended.remove(&(extended.n, id));
        }
        if let Some(before) = &before {
            let bytes = before.job.bytes();
            self.bytes -= bytes;
            match (before.lacks, before.extended) {
                (Some(_), _) => self.since_bytes -= bytes,
                (None, Some(_)) => self.extended_bytes -= bytes,
                (None, None) => _ = self.clean.remove(&(before.job.last_seq, id)),
            }
        }
        if let Some(behind) = behind {
            if let Some(lacks) = behind.lacks {
                self.since.insert(lacks.seq, id);
                if lacks.is_queued {
                    self.queued.insert(lacks.seq, id);
                }
            }
            if let Some(extended) = behind.extended {
                self.extended.insert((extended.n, id));
            }
            self.requests.extend(behind.claim().map(|(request, worker)| (request, worker, id)));
            let bytes = behind.job.bytes();
            self.bytes += bytes;
            match (behind.lacks, behind.extended) {
                (Some(_), _) => self.since_bytes += bytes,
                (None, Some(_)) => self.extended_bytes += bytes,
                (None, None) => _ = self.clean.insert((behind.job.last_seq, id)),
            }
            self.jobs.insert(id, behind);
        }
        before
    }

    /// The last batch was not committed: undoes its changes.
    pub(super) fn revert(&mut self) {
        while let Some((id, before)) = self.before.pop() {
            self.put(id, before);
        }
        self.windows.revert();
        if let Some(settings) = self.settings_before.take() {
            self.set_settings(settings);
        }
        self.head = self.head_before;
        // The time in `org_due` was not written either.
        self.noted_until = None;
    }

    /// Replaces what the state has of a job, and adds that to the undo log.
    fn change(&mut self, id: JobId, behind: Option<Running>) {
        let before = self.put(id, behind);
        self.before.push((id, before));
    }

    /// Another server has written all rows up to `base`, and the rows of these jobs.
    pub(super) fn forget(&mut self, base: Base, written: &[JobId]) {
        let up_to = self.since.range(..=base.seq).map(|(_, id)| *id);
        let up_to = up_to.chain(self.extended.iter().take_while(|(n, _)| *n <= base.n).map(|(_, id)| *id));
        for id in up_to.collect::<Vec<_>>() {
            let Some(Running { job, lacks, extended, differs }) = self.put(id, None) else { continue };
            self.set(
                job,
                lacks.filter(|lacks| lacks.seq > base.seq),
                extended.filter(|extended| extended.n > base.n),
                differs,
            );
        }
        written.iter().for_each(|id| _ = self.put(*id, None));
        if !written.is_empty() {
            // Such jobs may have left the queue, or a claim may hold them.
            (self.knows_held, self.are_many_held) = (false, false);
            self.windows.clear();
        }
        self.before.clear();
        // That server may have changed the time in `org_due`, too.
        self.noted_until = None;
    }

    /// A job as of the log's end, if the state has it as running.
    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id).map(|running| &running.job)
    }

    /// True if the state has this job as running, whatever its row says.
    pub(super) fn runs(&self, id: JobId) -> bool {
        self.jobs.contains_key(&id)
    }

    /// How many running jobs the state has.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// About how many bytes the state takes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + self.windows.bytes()
    }

    /// Memory of the jobs whose rows are behind: only the log has these as they are.
    pub(super) fn behind_bytes(&self) -> usize {
        self.since_bytes + self.extended_bytes
    }

    /// The jobs that the earlier claims hold, of each claim at most as many as it asks for.
    pub(super) fn held(&self, wanted: &[HeldBy]) -> Vec<JobId> {
        let of_claim = |held: &HeldBy| {
            let first = (Arc::clone(&held.request), Arc::clone(&held.worker), JobId(Uuid::nil()));
            let found = self.requests.range(first..).take(held.limit);
            let of_claim = found.take_while(|(request, worker, _)| (request, worker) == (&held.request, &held.worker));
            of_claim.map(|(.., id)| *id).collect::<Vec<_>>()
        };
        wanted.iter().flat_map(of_claim).collect()
    }

    pub(super) fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().map(|behind| &behind.job)
    }

    /// The jobs that are due, and when the next one is, given the same of rows. Returns at most `limit` jobs, those first that
    /// were due first.
    pub(super) fn due(
        &self,
        of_rows: Vec<(Time, JobId)>,
        next: Option<Time>,
        limit: usize,
        now: Time,
    ) -> (Vec<JobId>, Option<Time>) {
        // A row that is behind may have an outdated due time.
        let of_rows = of_rows.into_iter().filter(|(_, id)| !self.runs(*id));
        let running = self.jobs().filter_map(|job| Some((job.due_at?, job.id)));
        let (running, later): (Vec<_>, Vec<_>) = running.partition(|(at, _)| *at <= now);
        let mut due: Vec<_> = of_rows.chain(running).collect();
        due.sort_unstable();
        let next = next.into_iter().chain(later.into_iter().map(|(at, _)| at)).min();
        (due.into_iter().map(|(_, id)| id).take(limit).collect(), next)
    }

    /// The running jobs that were dated by a clock that was ahead, by at most `by`.
    pub(super) fn misdated(&self, by: Duration, now: Time) -> impl Iterator<Item = JobId> {
        // Redating grants no lease, so it needs no secret.
        let tick = Tick { now, recorded_at: now, next_seq: 0, secret: LeaseSecret([0; 16]) };
        let is_misdated =
            move |job: &&Job| job.apply(&Command::Redate(by), tick).is_ok_and(|redated| redated.is_changed);
        self.jobs().filter(is_misdated).map(|job| job.id)
    }

    /// Applies the changes of a batch with record `n`, after which the log ends at `head`. Returns what the batch writes of its
    /// existing jobs.
    pub(super) fn follow<'a>(
        &mut self,
        changes: &'a Changes,
        (head, n): (i64, i64),
        now: Time,
        fold_after: TimeDelta,
    ) -> RowWrites<'a> {
        self.head_before = std::mem::replace(&mut self.head, head);
        self.before.clear();
        self.windows.begin();
        self.settings_before = None;
        if let Some(last) = changes.org_events.last() {
            let before = Arc::clone(&self.settings);
            let mut settings = OrgSettings { as_of: last.seq, ..OrgSettings::clone(&before) };
            changes.settings.iter().for_each(|(name, of_type)| settings.set(Arc::clone(name), of_type.clone()));
            self.set_settings(Arc::new(settings));
            self.settings_before = Some(before);
        }
        for job in changes.created.iter().chain(changes.changed.iter().map(|changed| &changed.job)) {
            self.windows.follow(job);
        }
        let mut added = Added::default();
        let events = Events::of(changes);
        let mut written = RowWrites { base: Base { seq: head, n }, ..RowWrites::default() };
        let mut extended = Vec::new();
        for Changed { job, differs } in &changes.changed {
            let behind = self.jobs.get(&job.id);
            let (lacks, was_extended) =
                behind.map_or((None, false), |behind| (behind.lacks, behind.extended.is_some()));
            let differed = behind.map_or(Differs::Nowhere, |behind| behind.differs);
            if let Some(first) = events.left_to_log(job) {
                let differs = differed.max(*differs);
                written.images.insert(job.last_seq, image::write(job, differs));
                let lacks = lacks.unwrap_or_else(|| {
                    added.count(job);
                    let is_queued = first.prev_status == Some(JobStatus::Queued);
                    Lacks { seq: first.seq, recorded_at: first.recorded_at, is_queued }
                });
                let running = Running { job: job.clone(), lacks: Some(lacks), extended: None, differs };
                self.change(job.id, Some(running));
                continue;
            }
            let has_events = events.have(job.id);
            if !has_events && job.status == JobStatus::Running && *differs == Differs::InLease {
                added.count(job);
                extended.push(job);
                let differs = differed.max(Differs::InLease);
                let extended = Some(Extended { n, at: now });
                self.change(job.id, Some(Running { job: job.clone(), lacks, extended, differs }));
                continue;
            }
            let is_running = job.status == JobStatus::Running;
            if is_running || behind.is_some() {
                self.change(job.id, is_running.then(|| Running::clean(job)));
            }
            written.rows.push(Cow::Borrowed(job));
            if !has_events {
                written.quiet.push(job.id);
                // Readers would still apply the extension in the earlier record, so this record replaces it.
                extended.extend(was_extended.then_some(job));
            }
        }
        written.extensions = extension::write(extended.into_iter());
        self.fold_and_forget(changes, now, fold_after, added, &mut written);
        written
    }

    /// Forgets removed jobs, folds stale rows, and sets the base that is left.
    fn fold_and_forget(
        &mut self,
        changes: &Changes,
        now: Time,
        fold_after: TimeDelta,
        added: Added,
        written: &mut RowWrites<'_>,
    ) {
        changes.removed.iter().for_each(|removed| self.change(removed.id, None));
        for job in changes.created.iter().filter(|job| job.status == JobStatus::Running) {
            self.change(job.id, Some(Running::clean(job)));
        }
        for id in self.stale(changes, now, fold_after, added) {
            let Some(job) = self.jobs.get(&id).map(|behind| behind.job.clone()) else { continue };
            self.change(id, Some(Running::clean(&job)));
            written.rows.push(Cow::Owned(job));
            written.is_fold = true;
        }
        while let Some((_, id)) = self.clean.first().copied().filter(|_| self.clean.len() > MOST_CLEAN) {
            self.change(id, None);
            (self.knows_held, self.are_many_held) = (false, true);
        }
        if let Some((first, _)) = self.since.first_key_value() {
            written.base.seq = first - 1;
        }
        if let Some((first, _)) = self.extended.first() {
            written.base.n = first - 1;
        }
    }
}

mod fold;
mod ready;
#[cfg(test)]
mod tests;
