//! The running jobs of an org whose rows are behind the log: the events since then, each with its image, tell what they are.
//!
//! A batch writes the rows of the jobs that it creates and of those that don't run after it. What a running job does is in the log alone
//! until it stops, or until it is **folded**: a batch of its org writes its row once that has been behind for some seconds.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;

use super::{Changed, Changes, ClaimOrder, HeldBy, NextDue, Parts, image};
use crate::domain::{
    clock::Time,
    event::{EventKind, JobEvent},
    id::JobId,
    job::Job,
    status::JobStatus,
    transition::{Command, Tick},
};

/// So much later than it should have been folded any server looks at an org: whoever has left rows behind folds them before, if it is there.
const NOTED_LATER: TimeDelta = TimeDelta::seconds(2);
/// The row of a running job says that it is queued for so long at most: whoever looks for what is ready passes over it.
const QUEUED_FOR: TimeDelta = TimeDelta::seconds(3);
/// Nor may the log be so many events beyond the first one that a row lacks: whoever does not know which rows are behind looks through them.
const FAR: i64 = 16_384;
/// Rows of an org that may be behind.
const MOST: usize = 8_192;
/// Rows that one batch folds, at most: its callers wait for them.
const FOLDED_AT_ONCE: usize = 64;
/// The same of a batch that has fewer changes of its own than that.
const FOLDED_ALONE: usize = 512;

/// The running jobs of one org, as of one record of its log, whose rows lack events.
#[derive(Debug, Default)]
pub(super) struct Unfolded {
    jobs: HashMap<JobId, Behind>,
    /// The same by the first event that each row lacks.
    since: BTreeMap<i64, JobId>,
    /// Those of them whose rows say that they are queued.
    queued: BTreeMap<i64, JobId>,
    /// Until then a server looks at the org that finds it in the database.
    noted_until: Option<Time>,
    /// The `seq` at which the log ended.
    pub(super) head: i64,
    /// How many batches had removed jobs; of a log that several servers write.
    pub(super) removals: i64,
}

/// A job whose row is behind.
#[derive(Debug)]
struct Behind {
    job: Job,
    lacks: Lacks,
}

/// The first event that a row lacks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lacks {
    pub(super) seq: i64,
    pub(super) recorded_at: Time,
    /// The row says that its job is queued, and may stand among those that are ready.
    pub(super) is_queued: bool,
    /// Since then the job has changed in nothing but what events say.
    pub(super) is_as_row: bool,
}

impl Unfolded {
    /// There are none as of this place of a log, and so many batches that removed jobs.
    pub(super) fn of(head: i64, removals: i64) -> Self {
        Self { head, removals, ..Self::default() }
    }

    /// A job is so as of the log's end: its row lacks events from the one given on, or none.
    pub(super) fn set(&mut self, job: Job, lacks: Option<Lacks>) {
        self.remove(job.id);
        if let Some(lacks) = lacks {
            self.since.insert(lacks.seq, job.id);
            if lacks.is_queued {
                self.queued.insert(lacks.seq, job.id);
            }
            self.jobs.insert(job.id, Behind { job, lacks });
        }
    }

    /// Another server has written all rows up to a place, and those of some jobs.
    pub(super) fn forget(&mut self, base_seq: i64, written: &[JobId]) {
        let later = self.since.split_off(&(base_seq + 1));
        for id in std::mem::replace(&mut self.since, later).into_values() {
            self.jobs.remove(&id);
        }
        self.queued = self.queued.split_off(&(base_seq + 1));
        written.iter().for_each(|id| _ = self.remove(*id));
    }

    /// When jobs of the org are to be looked at, as far as it became known to a batch that has found so much of it: at some time while rows
    /// are behind, by any server, should this one be gone then.
    pub(super) fn next_due(&mut self, found: Option<NextDue>, now: Time, fold_after: TimeDelta) -> Option<NextDue> {
        let note = now + fold_after + NOTED_LATER;
        if self.jobs.is_empty() {
            self.noted_until = None;
            return found;
        }
        let noted = self.noted_until.filter(|noted| now < *noted && *noted <= note);
        let noted = match (found, noted) {
            (None | Some(NextDue::By(_)), Some(_)) => return found,
            _ => note,
        };
        self.noted_until = Some(noted);
        Some(match found {
            Some(NextDue::At(due)) => NextDue::At(Some(due.map_or(noted, |due| due.min(noted)))),
            Some(NextDue::By(due)) => NextDue::By(due.min(noted)),
            None => NextDue::By(noted),
        })
    }

    /// A job as the log has it, if its row is behind.
    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id).map(|behind| &behind.job)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// How many of a type, or of all, may stand among those that are ready, from a place on.
    pub(super) fn count_ready(&self, job_type: Option<&Arc<str>>, from: Option<ClaimOrder>) -> usize {
        let stands_there = |behind: &&Behind| {
            let is_of_type = job_type.is_none_or(|wanted| behind.job.spec.job_type == *wanted);
            is_of_type && from.is_none_or(|from| ClaimOrder::of(&behind.job) >= from)
        };
        self.queued.values().filter_map(|id| self.jobs.get(id)).filter(stands_there).count()
    }

    /// Those that a claim holds which came before.
    pub(super) fn held(&self, wanted: &HeldBy) -> impl Iterator<Item = JobId> {
        let is_held = |job: &&Job| {
            let lease = job.lease.as_ref();
            lease.is_some_and(|lease| lease.worker == wanted.worker && lease.request.as_ref() == Some(&wanted.request))
        };
        self.jobs().filter(is_held).map(|job| job.id)
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
        let of_rows = of_rows.into_iter().filter(|(_, id)| self.get(*id).is_none());
        let running = self.jobs().filter_map(|job| Some((job.due_at?, job.id)));
        let (running, later): (Vec<_>, Vec<_>) = running.partition(|(at, _)| *at <= now);
        let mut due: Vec<_> = of_rows.chain(running).collect();
        due.sort_unstable();
        let next = next.into_iter().chain(later.into_iter().map(|(at, _)| at)).min();
        (due.into_iter().map(|(_, id)| id).take(limit).collect(), next)
    }

    /// Those that a clock which was ahead by so much at most has put off.
    pub(super) fn misdated(&self, by: Duration, now: Time) -> impl Iterator<Item = JobId> {
        let tick = Tick { now, recorded_at: now, next_seq: 0 };
        let is_misdated =
            move |job: &&Job| job.apply(&Command::Redate(by), tick).is_ok_and(|redated| redated.is_changed);
        self.jobs().filter(is_misdated).map(|job| job.id)
    }

    /// True if some are to be folded now.
    pub(super) fn is_stale(&self, now: Time, fold_after: TimeDelta) -> bool {
        self.next_stale(now, fold_after).next().is_some()
    }

    /// Takes note of what a batch changes in a log that ends at `head` then, and says what that is to the rows of its jobs.
    pub(super) fn follow<'a>(
        &mut self,
        changes: &'a Changes,
        head: i64,
        now: Time,
        fold_after: TimeDelta,
    ) -> RowWrites<'a> {
        self.head = head;
        let events = Events::of(changes);
        let mut written = RowWrites { base_seq: head, ..RowWrites::default() };
        for Changed { job, parts } in &changes.changed {
            if let Some(first) = events.left_to_log(job) {
                let is_as_row =
                    *parts == Parts::LOG && self.jobs.get(&job.id).is_none_or(|behind| behind.lacks.is_as_row);
                let image = if is_as_row { image::AS_THE_ROW.to_owned() } else { image::write(job) };
                written.images.insert(job.last_seq, image);
                match self.jobs.get_mut(&job.id) {
                    Some(behind) => (behind.job, behind.lacks.is_as_row) = (job.clone(), is_as_row),
                    None => {
                        let is_queued = first.prev_status == Some(JobStatus::Queued);
                        let lacks = Lacks { seq: first.seq, recorded_at: first.recorded_at, is_queued, is_as_row };
                        self.set(job.clone(), Some(lacks));
                    }
                }
                continue;
            }
            // All of a row that is behind.
            let parts = if self.remove(job.id).is_some() { Parts::ALL } else { *parts };
            written.rows.push(RowWrite { job: Cow::Borrowed(job), parts });
            if !events.0.contains_key(&job.id) {
                written.quiet.push(job.id);
            }
        }
        changes.removed.iter().for_each(|removed| _ = self.remove(removed.id));
        for id in self.stale(changes, now, fold_after) {
            let folded = self.remove(id).map(|behind| RowWrite { job: Cow::Owned(behind.job), parts: Parts::ALL });
            written.rows.extend(folded);
            written.is_fold = true;
        }
        if let Some((first, _)) = self.since.first_key_value() {
            written.base_seq = first - 1;
        }
        written
    }

    /// Jobs that are to be folded by a batch that changes these others.
    fn stale(&self, changes: &Changes, now: Time, fold_after: TimeDelta) -> Vec<JobId> {
        let most =
            if changes.events.len() + changes.changed.len() < FOLDED_AT_ONCE { FOLDED_ALONE } else { FOLDED_AT_ONCE };
        let changed: HashSet<_> = changes.changed.iter().map(|changed| changed.job.id).collect();
        self.next_stale(now, fold_after).filter(|id| !changed.contains(id)).take(most).collect()
    }

    /// Jobs whose rows have been behind for long, or far, or are beyond as many as may be, those first that have been for longest.
    fn next_stale(&self, now: Time, fold_after: TimeDelta) -> impl Iterator<Item = JobId> {
        // A clock that was set back says nothing of how long it is.
        let is_old = move |lacks: Lacks, after| lacks.recorded_at + after <= now || lacks.recorded_at > now;
        let looks_queued = move |behind: &&Behind| is_old(behind.lacks, fold_after.min(QUEUED_FOR));
        let queued = self.queued.values().filter_map(|id| self.jobs.get(id)).take_while(looks_queued);
        let beyond = self.since.len().saturating_sub(MOST);
        let behind = self.since.values().filter_map(|id| self.jobs.get(id)).enumerate();
        let is_stale = move |(n, Behind { lacks, .. }): &(usize, &Behind)| {
            is_old(*lacks, fold_after) || self.head - lacks.seq >= FAR || *n < beyond
        };
        let others = behind.take_while(is_stale).map(|(_, behind)| behind);
        let others = others.filter(move |behind| !(behind.lacks.is_queued && looks_queued(behind)));
        queued.chain(others).map(|behind| behind.job.id)
    }

    fn remove(&mut self, id: JobId) -> Option<Behind> {
        let behind = self.jobs.remove(&id)?;
        self.since.remove(&behind.lacks.seq);
        self.queued.remove(&behind.lacks.seq);
        Some(behind)
    }
}

/// What a batch does to the rows of an org's jobs that were there.
#[derive(Debug, Default)]
pub(super) struct RowWrites<'a> {
    /// The rows that it writes.
    pub(super) rows: Vec<RowWrite<'a>>,
    /// Images of the others that it changes, by `seq` of the events that they lie with.
    pub(super) images: HashMap<i64, String>,
    /// Up to here no row lacks an event then.
    pub(super) base_seq: i64,
    /// Jobs that it changes without an event.
    pub(super) quiet: Vec<JobId>,
    /// Some of the rows were behind, and nothing else is changed in them.
    pub(super) is_fold: bool,
}

/// A row that is written over.
#[derive(Debug)]
pub(super) struct RowWrite<'a> {
    pub(super) job: Cow<'a, Job>,
    /// In what it may differ from what is stored.
    pub(super) parts: Parts,
}

/// The first event that a batch writes of each of its jobs, and whether that job's row may be left to the log.
struct Events<'a>(HashMap<JobId, (&'a JobEvent, bool)>);

impl<'a> Events<'a> {
    fn of(changes: &'a Changes) -> Self {
        let mut first: HashMap<JobId, (&JobEvent, bool)> = HashMap::new();
        for event in &changes.events {
            // A row that says that its job has ended is in the lists of those.
            let has_ended = event.prev_status.is_some_and(JobStatus::is_terminal);
            let (_, may_be_left) = first.entry(event.job_id).or_insert((event, !has_ended));
            // Of what was brought in, events don't say when they changed the job.
            *may_be_left &= !event.is_past && event.kind != EventKind::Imported;
        }
        Self(first)
    }

    /// The first event of a job that was there, if its row is left to the log: it runs now, and events tell how that came.
    fn left_to_log(&self, job: &Job) -> Option<&'a JobEvent> {
        let (first, may_be_left) = self.0.get(&job.id)?;
        (*may_be_left && job.status == JobStatus::Running).then_some(*first)
    }
}
