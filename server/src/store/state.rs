//! What a server knows of an org's jobs as of a record of its log: those that run, whether their rows are behind the log or not, and the
//! first of those that may be claimed ([`Windows`]).
//!
//! Nothing rests on it alone: whoever decides by it makes sure, in the same transaction or statement, that the record is still the log's last,
//! or catches up from it. What was lost is loaded: of rows that are behind the events since then, each with its image, tell what the jobs are.
//!
//! A batch writes the rows of the jobs that it creates and of those that don't run after it. What a running job does is in the log alone
//! until it stops, or until it is **folded**: a batch of its org writes its row once that has been behind for some seconds.
//!
//! What a heartbeat without news changes is in the record of its batch alone ([`Extension`](super::extension::Extension)): such a job is kept
//! here, too, and folded once its last heartbeat is a minute old, so that records may go.

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
    Changed, Changes, ClaimOrder, Differs, HeldBy, Ready, ReadyJob, extension, image,
    row_writes::{Base, Events, RowWrites},
    window::{ALL_TYPES, Short, Windows},
};
use crate::domain::{
    clock::Time,
    id::JobId,
    job::Job,
    lease::LeaseSecret,
    status::JobStatus,
    transition::{Command, Tick},
};

/// Jobs of an org that run, whose rows are not behind, and that are known all the same.
const MOST_CLEAN: usize = 8_192;
/// Jobs of an org that claims hold which may come again, where all of them are to be known.
pub(super) const MOST_HELD: usize = 4_096;
/// See the module.
#[derive(Debug, Default)]
pub(super) struct OrgState {
    jobs: HashMap<JobId, Running>,
    /// The same by the first event that each row lacks.
    since: BTreeMap<i64, JobId>,
    /// What all of them take, those whose rows lack events, and those whose rows lack an extension alone, in bytes.
    bytes: usize,
    since_bytes: usize,
    extended_bytes: usize,
    /// Those of them whose rows say that they are queued.
    queued: BTreeMap<i64, JobId>,
    /// The jobs whose rows lack an extension, by the number of the record that has the last of each.
    extended: BTreeSet<(i64, JobId)>,
    /// The jobs whose rows lack nothing, by their last events.
    clean: BTreeSet<(i64, JobId)>,
    /// Those that claims hold which may come again, by their `request_id` and their worker.
    requests: BTreeSet<(Arc<str>, Arc<str>, JobId)>,
    /// Whether all jobs are known that claims hold which may come again; and if not, whether they are too many.
    knows_held: bool,
    are_many_held: bool,
    /// Jobs that may be claimed.
    pub(super) windows: Windows,
    /// What the last batch has changed, as it was before: the first time first; and `head` before it.
    before: Vec<(JobId, Option<Running>)>,
    head_before: i64,
    /// Until then a server looks at the org that finds it in the database.
    noted_until: Option<Time>,
    /// The `seq` at which the log ended.
    pub(super) head: i64,
    /// How many batches had removed jobs; of a log that several servers write.
    pub(super) removals: i64,
}

/// A job that runs, and what its row lacks.
#[derive(Debug, Clone)]
struct Running {
    job: Job,
    /// Events.
    lacks: Option<Lacks>,
    /// An extension of its lease, since the last event.
    extended: Option<Extended>,
    /// In what it differs from its row beside.
    differs: Differs,
}

/// Where an extension is that a row lacks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extended {
    /// The number of the record.
    pub(super) n: i64,
    /// When that was written, by the clock.
    pub(super) at: Time,
}

/// The first event that a row lacks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lacks {
    pub(super) seq: i64,
    pub(super) recorded_at: Time,
    /// The row says that its job is queued, and may stand among those that are ready.
    pub(super) is_queued: bool,
}

impl Running {
    fn clean(job: &Job) -> Self {
        Self { job: job.clone(), lacks: None, extended: None, differs: Differs::Nowhere }
    }

    /// By what the claim is known that holds it.
    fn claim(&self) -> Option<(Arc<str>, Arc<str>)> {
        let lease = self.job.lease.as_ref()?;
        Some((lease.request.clone()?, Arc::clone(&lease.worker)))
    }
}

impl Extended {
    /// `None` where there is no time: none counts.
    pub(super) fn of(n: Option<i64>, at: Option<Time>) -> Option<Self> {
        Some(Self { n: n?, at: at? })
    }
}

impl Lacks {
    /// `None` where there is no event.
    pub(super) fn of(seq: Option<i64>, recorded_at: Option<Time>, is_queued: Option<bool>) -> Option<Self> {
        Some(Self { seq: seq?, recorded_at: recorded_at?, is_queued: is_queued.unwrap_or_default() })
    }
}

impl OrgState {
    /// No row is behind as of this place of a log, and so many batches that removed jobs.
    pub(super) fn of(head: i64, removals: i64) -> Self {
        Self { head, removals, knows_held: head == 0, ..Self::default() }
    }

    /// A job is so as of the log's end: its row lacks events from the one given on, or none, and the extension given, or none; and its last
    /// image says in what it differs from the row.
    pub(super) fn set(&mut self, job: Job, lacks: Option<Lacks>, extended: Option<Extended>, differs: Differs) {
        self.windows.follow(&job);
        let is_running = job.status == JobStatus::Running;
        let of_extension = if extended.is_some() { Differs::InLease } else { Differs::Nowhere };
        let of_image = if lacks.is_some() { differs } else { Differs::Nowhere };
        let differs = of_extension.max(of_image);
        self.put(job.id, is_running.then_some(Running { job, lacks, extended, differs }));
    }

    /// Whether all jobs are known that claims hold which may come again. If not, whether to load them.
    pub(super) fn knows_held(&self) -> Result<(), bool> {
        if self.knows_held { Ok(()) } else { Err(!self.are_many_held) }
    }

    /// These are all jobs by their rows that claims hold which may come again, or the first of them.
    pub(super) fn set_held(&mut self, jobs: Vec<Job>, are_all: bool) {
        (self.knows_held, self.are_many_held) = (are_all, !are_all);
        for job in jobs.into_iter().filter(|_| are_all) {
            if !self.runs(job.id) {
                self.set(job, None, None, Differs::Nowhere);
            }
        }
    }

    /// The last batch was committed: it won't come to nothing.
    pub(super) fn settle(&mut self) {
        self.before = Vec::new();
        self.windows.begin();
    }

    /// Forgets all that the database has as well.
    pub(super) fn shrink(&mut self) {
        for id in self.clean.iter().map(|(_, id)| *id).collect::<Vec<_>>() {
            self.put(id, None);
        }
        (self.knows_held, self.are_many_held, self.before) = (false, false, Vec::new());
        self.windows.clear();
    }

    /// Puts this in the place of what there is of a job, which it brings.
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

    /// The last batch has come to nothing: all is as it was before.
    pub(super) fn revert(&mut self) {
        while let Some((id, before)) = self.before.pop() {
            self.put(id, before);
        }
        self.windows.revert();
        self.head = self.head_before;
        // What the database says was not written either.
        self.noted_until = None;
    }

    /// Puts this in the place of what there is of a job, until the batch is known to have come to nothing.
    fn change(&mut self, id: JobId, behind: Option<Running>) {
        let before = self.put(id, behind);
        self.before.push((id, before));
    }

    /// Another server has written all rows up to a place, and those of some jobs.
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
            // Some may wait no longer, or be held.
            (self.knows_held, self.are_many_held) = (false, false);
            self.windows.clear();
        }
        self.before.clear();
        // Whoever has written them may have looked for what is due, too.
        self.noted_until = None;
    }

    /// A job as the log has it, if it is known to run. Those in windows lack their stages.
    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id).map(|running| &running.job)
    }

    /// True of a job that is known to run, whatever its row says.
    pub(super) fn runs(&self, id: JobId) -> bool {
        self.jobs.contains_key(&id)
    }

    /// How many are known to run.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// What it takes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + self.windows.bytes()
    }

    /// What the jobs take of that whose rows are behind, which the database has nowhere else than in the log.
    pub(super) fn behind_bytes(&self) -> usize {
        self.since_bytes + self.extended_bytes
    }

    /// Takes what was found of what a window lacked, and says which of these jobs are to be read.
    pub(super) fn fill(&mut self, short: &Short, found: Vec<ReadyJob>) -> Vec<JobId> {
        self.windows.fill(short, found, |id| self.jobs.contains_key(&id))
    }

    /// What windows lack of what is wanted. Rows that are behind look ready: as many more are looked at, and left out.
    pub(super) fn short(&mut self, wanted: &Ready) -> Vec<Short> {
        self.windows.make_room(wanted);
        let mut short = self.windows.short(wanted);
        if short.is_empty() {
            return short;
        }
        let mut by_name: HashMap<_, _> = short.iter_mut().map(|short| (Arc::clone(&short.name), short)).collect();
        for behind in self.queued.values().filter_map(|id| self.jobs.get(id)) {
            let order = ClaimOrder::of(&behind.job);
            for name in [&behind.job.spec.job_type, &*ALL_TYPES] {
                if let Some(short) = by_name.get_mut(name)
                    && short.from.is_none_or(|from| order >= from)
                {
                    short.limit += 1;
                }
            }
        }
        short
    }

    /// Those that claims hold which came before, of each no more than are wanted.
    pub(super) fn held(&self, wanted: &[HeldBy]) -> Vec<JobId> {
        let of_claim = |held: &HeldBy| {
            let first = (Arc::clone(&held.request), Arc::clone(&held.worker), JobId(Uuid::nil()));
            let found = self.requests.range(first..).take(held.limit);
            let of_claim = found.take_while(|(request, worker, _)| (request, worker) == (&held.request, &held.worker));
            of_claim.map(|(.., id)| *id).collect::<Vec<_>>()
        };
        wanted.iter().flat_map(of_claim).collect()
    }

    /// All of them.
    pub(super) fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().map(|behind| &behind.job)
    }

    /// What is due, and when the next of the others is: of all jobs, where this is so of the rows. No more than so many, those that were
    /// due first.
    pub(super) fn due(
        &self,
        of_rows: Vec<(Time, JobId)>,
        next: Option<Time>,
        limit: usize,
        now: Time,
    ) -> (Vec<JobId>, Option<Time>) {
        // What the row of one waits for may be over.
        let of_rows = of_rows.into_iter().filter(|(_, id)| !self.runs(*id));
        let running = self.jobs().filter_map(|job| Some((job.due_at?, job.id)));
        let (running, later): (Vec<_>, Vec<_>) = running.partition(|(at, _)| *at <= now);
        let mut due: Vec<_> = of_rows.chain(running).collect();
        due.sort_unstable();
        let next = next.into_iter().chain(later.into_iter().map(|(at, _)| at)).min();
        (due.into_iter().map(|(_, id)| id).take(limit).collect(), next)
    }

    /// Those that a clock which was ahead by so much at most has put off.
    pub(super) fn misdated(&self, by: Duration, now: Time) -> impl Iterator<Item = JobId> {
        // No lease is granted.
        let tick = Tick { now, recorded_at: now, next_seq: 0, secret: LeaseSecret([0; 16]) };
        let is_misdated =
            move |job: &&Job| job.apply(&Command::Redate(by), tick).is_ok_and(|redated| redated.is_changed);
        self.jobs().filter(is_misdated).map(|job| job.id)
    }

    /// Takes note of what a batch changes in a log that ends at `head` then, with the record of this number, and says what that is to the
    /// rows of its jobs.
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
                // What was there of it in an earlier record counts no more.
                extended.extend(was_extended.then_some(job));
            }
        }
        written.extensions = extension::write(extended.into_iter());
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
        written
    }
}

mod fold;
#[cfg(test)]
mod tests;
