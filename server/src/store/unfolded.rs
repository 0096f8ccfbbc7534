//! The running jobs of an org whose rows are behind the log: the events since then, each with its image, tell what they are.
//!
//! A batch writes the rows of the jobs that it creates and of those that don't run after it. What a running job does is in the log alone
//! until it stops, or until it is **folded**: a batch of its org writes its row once that has been behind for some seconds.
//!
//! What a heartbeat without news changes is in the record of its batch alone ([`Extension`](super::extension::Extension)): such a job is kept
//! here, too, and folded once its last heartbeat is a minute old, so that records may go.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;

use super::{Changed, Changes, ClaimOrder, HeldBy, NextDue, Parts, extension, image};
use crate::domain::{
    clock::Time,
    event::{EventKind, JobEvent},
    id::JobId,
    job::Job,
    lease::Lease,
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
/// Rows of an org that may lack an extension of their leases.
const MOST_EXTENDED: usize = 16_384;
/// An extension is folded so many times later than events: heartbeats come more often than that, and each makes the one before needless.
const EXTENDED_FOR: i32 = 6;
/// And no later than this.
const LONGEST_EXTENDED: TimeDelta = TimeDelta::minutes(1);
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
    /// The jobs whose rows lack an extension, by the number of the record that has the last of each.
    extended: BTreeSet<(i64, JobId)>,
    /// What the last batch has changed, as it was before: the first time first; and `head` before it.
    before: Vec<(JobId, Option<Behind>)>,
    head_before: i64,
    /// Until then a server looks at the org that finds it in the database.
    noted_until: Option<Time>,
    /// The `seq` at which the log ended.
    pub(super) head: i64,
    /// How many batches had removed jobs; of a log that several servers write.
    pub(super) removals: i64,
}

/// A job whose row is behind: it lacks one or the other.
#[derive(Debug, Clone)]
struct Behind {
    job: Job,
    /// Events.
    lacks: Option<Lacks>,
    /// An extension of its lease, since the last event.
    extended: Option<Extended>,
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
    /// Since then the job has changed in nothing but what events say.
    pub(super) is_as_row: bool,
}

impl Extended {
    /// `None` where there is no time: none counts.
    pub(super) fn of(n: Option<i64>, at: Option<Time>) -> Option<Self> {
        Some(Self { n: n?, at: at? })
    }
}

impl Lacks {
    /// `None` where there is no event.
    pub(super) fn of(
        seq: Option<i64>,
        recorded_at: Option<Time>,
        is_queued: Option<bool>,
        is_as_row: Option<bool>,
    ) -> Option<Self> {
        let (is_queued, is_as_row) = (is_queued.unwrap_or_default(), is_as_row.unwrap_or_default());
        Some(Self { seq: seq?, recorded_at: recorded_at?, is_queued, is_as_row })
    }
}

impl Unfolded {
    /// There are none as of this place of a log, and so many batches that removed jobs.
    pub(super) fn of(head: i64, removals: i64) -> Self {
        Self { head, removals, ..Self::default() }
    }

    /// A job is so as of the log's end: its row lacks events from the one given on, or none, and the extension given, or none.
    pub(super) fn set(&mut self, job: Job, lacks: Option<Lacks>, extended: Option<Extended>) {
        let is_behind = lacks.is_some() || extended.is_some();
        self.put(job.id, is_behind.then_some(Behind { job, lacks, extended }));
    }

    /// Puts this in the place of what there is of a job, which it brings.
    fn put(&mut self, id: JobId, behind: Option<Behind>) -> Option<Behind> {
        let before = self.jobs.remove(&id);
        if let Some(lacks) = before.as_ref().and_then(|before| before.lacks) {
            self.since.remove(&lacks.seq);
            self.queued.remove(&lacks.seq);
        }
        if let Some(extended) = before.as_ref().and_then(|before| before.extended) {
            self.extended.remove(&(extended.n, id));
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
            self.jobs.insert(id, behind);
        }
        before
    }

    /// The last batch has come to nothing: all is as it was before.
    pub(super) fn revert(&mut self) {
        while let Some((id, before)) = self.before.pop() {
            self.put(id, before);
        }
        self.head = self.head_before;
        // What the database says was not written either.
        self.noted_until = None;
    }

    /// Puts this in the place of what there is of a job, until the batch is known to have come to nothing.
    fn change(&mut self, id: JobId, behind: Option<Behind>) {
        let before = self.put(id, behind);
        self.before.push((id, before));
    }

    /// Another server has written all rows up to a place, and those of some jobs.
    pub(super) fn forget(&mut self, base: Base, written: &[JobId]) {
        let up_to = self.since.range(..=base.seq).map(|(_, id)| *id);
        let up_to = up_to.chain(self.extended.iter().take_while(|(n, _)| *n <= base.n).map(|(_, id)| *id));
        for id in up_to.collect::<Vec<_>>() {
            let Some(Behind { job, lacks, extended }) = self.put(id, None) else { continue };
            self.set(job, lacks.filter(|lacks| lacks.seq > base.seq), extended.filter(|extended| extended.n > base.n));
        }
        written.iter().for_each(|id| _ = self.put(*id, None));
        self.before.clear();
        // Whoever has written them may have looked for what is due, too.
        self.noted_until = None;
    }

    /// When jobs of the org are to be looked at, as far as it became known to a batch that has found so much of it: at some time while rows
    /// are behind, by any server, should this one be gone then.
    pub(super) fn next_due(&mut self, found: Option<NextDue>, now: Time, fold_after: TimeDelta) -> Option<NextDue> {
        let note = now + fold_after + NOTED_LATER;
        // That a row lacks an extension is no reason to look: its lease ends no later than the log says, and then somebody does.
        if self.since.is_empty() {
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

    /// Those that claims hold which came before.
    pub(super) fn held(&self, wanted: &[HeldBy]) -> Vec<JobId> {
        let wanted: HashSet<_> = wanted.iter().map(|held| (&held.worker, &held.request)).collect();
        let is_held = |job: &&Job| {
            let request =
                |lease: &'_ Lease| lease.request.as_ref().is_some_and(|id| wanted.contains(&(&lease.worker, id)));
            job.lease.as_ref().is_some_and(request)
        };
        if wanted.is_empty() { Vec::new() } else { self.jobs().filter(is_held).map(|job| job.id).collect() }
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
        // Before any other server looks, this one does, and says when the next time is.
        let is_noted_soon = self.noted_until.is_some_and(|noted| noted <= now + NOTED_LATER / 2);
        is_noted_soon && !self.since.is_empty() || self.next_stale(now, fold_after).next().is_some()
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
        let mut added = 0;
        let events = Events::of(changes);
        let mut written = RowWrites { base: Base { seq: head, n }, ..RowWrites::default() };
        let mut extended = Vec::new();
        for Changed { job, parts } in &changes.changed {
            let behind = self.jobs.get(&job.id);
            let (lacks, was_extended) =
                behind.map_or((None, false), |behind| (behind.lacks, behind.extended.is_some()));
            if let Some(first) = events.left_to_log(job) {
                let is_as_row = *parts == Parts::LOG && !was_extended && lacks.is_none_or(|lacks| lacks.is_as_row);
                let image = if is_as_row { image::AS_THE_ROW.to_owned() } else { image::write(job) };
                written.images.insert(job.last_seq, image);
                let lacks = lacks.unwrap_or_else(|| {
                    added += 1;
                    let is_queued = first.prev_status == Some(JobStatus::Queued);
                    Lacks { seq: first.seq, recorded_at: first.recorded_at, is_queued, is_as_row }
                });
                let lacks = Some(Lacks { is_as_row, ..lacks });
                self.change(job.id, Some(Behind { job: job.clone(), lacks, extended: None }));
                continue;
            }
            let has_events = events.0.contains_key(&job.id);
            if !has_events && job.status == JobStatus::Running && job.lease.is_some() && *parts == Parts::LEASE {
                added += 1;
                extended.push(job);
                let lacks = lacks.map(|lacks| Lacks { is_as_row: false, ..lacks });
                let extended = Some(Extended { n, at: now });
                self.change(job.id, Some(Behind { job: job.clone(), lacks, extended }));
                continue;
            }
            // All of a row that is behind.
            let parts = if behind.is_some() { Parts::ALL } else { *parts };
            if behind.is_some() {
                self.change(job.id, None);
            }
            written.rows.push(RowWrite { job: Cow::Borrowed(job), parts });
            if !has_events {
                written.quiet.push(job.id);
                // What was there of it in an earlier record counts no more.
                extended.extend(was_extended.then_some(job));
            }
        }
        written.extensions = extension::write(extended.into_iter());
        changes.removed.iter().for_each(|removed| self.change(removed.id, None));
        for id in self.stale(changes, now, fold_after, added) {
            let folded = self.jobs.get(&id).map(|behind| behind.job.clone());
            written.rows.extend(folded.map(|job| RowWrite { job: Cow::Owned(job), parts: Parts::ALL }));
            written.is_fold = true;
            self.change(id, None);
        }
        if let Some((first, _)) = self.since.first_key_value() {
            written.base.seq = first - 1;
        }
        if let Some((first, _)) = self.extended.first() {
            written.base.n = first - 1;
        }
        written
    }

    /// Jobs that are to be folded by a batch that changes these others, and leaves so many more behind.
    fn stale(&self, changes: &Changes, now: Time, fold_after: TimeDelta, added: usize) -> Vec<JobId> {
        let has_little = changes.events.len() + changes.changed.len() < FOLDED_AT_ONCE;
        // As many as it leaves behind itself, so that there are never more and more.
        let most = if has_little { FOLDED_ALONE } else { FOLDED_AT_ONCE.max(added) };
        let mut seen: HashSet<_> = changes.changed.iter().map(|changed| changed.job.id).collect();
        self.next_stale(now, fold_after).filter(|id| seen.insert(*id)).take(most).collect()
    }

    /// Jobs whose rows have been behind for long, or far, or are beyond as many as may be, those first that have been for longest.
    fn next_stale(&self, now: Time, fold_after: TimeDelta) -> impl Iterator<Item = JobId> {
        // A clock that was set back says nothing of how long it is.
        let is_old = move |at: Time, after| at + after <= now || at > now;
        let looks_queued =
            move |lacks: &Lacks| lacks.is_queued && is_old(lacks.recorded_at, fold_after.min(QUEUED_FOR));
        let lacking = move |id: &JobId| Some((*id, self.jobs.get(id)?.lacks?));
        let queued = self.queued.values().filter_map(lacking).take_while(move |(_, lacks)| looks_queued(lacks));
        let beyond = self.since.len().saturating_sub(MOST);
        let is_stale = move |(n, (_, lacks)): &(usize, (JobId, Lacks))| {
            is_old(lacks.recorded_at, fold_after) || self.head - lacks.seq >= FAR || *n < beyond
        };
        let others = self.since.values().filter_map(lacking).enumerate().take_while(is_stale);
        let others = others.map(|(_, other)| other).filter(move |(_, lacks)| !looks_queued(lacks));
        let unheard_for =
            fold_after.checked_mul(EXTENDED_FOR).map_or(LONGEST_EXTENDED, |after| after.min(LONGEST_EXTENDED));
        let beyond = self.extended.len().saturating_sub(MOST_EXTENDED);
        let is_unheard = move |(place, (_, id)): &(usize, &(i64, JobId))| {
            let extended = self.jobs.get(id).and_then(|behind| behind.extended);
            *place < beyond || extended.is_some_and(|extended| is_old(extended.at, unheard_for))
        };
        let unheard = self.extended.iter().enumerate().take_while(is_unheard).map(|(_, (_, id))| *id);
        queued.chain(others).map(|(id, _)| id).chain(unheard)
    }
}

/// Up to where rows lack nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Base {
    /// No event up to here.
    pub(super) seq: i64,
    /// And no extension of a lease that is in a record up to this one.
    pub(super) n: i64,
}

/// What a batch does to the rows of an org's jobs that were there.
#[derive(Debug, Default)]
pub(super) struct RowWrites<'a> {
    /// The rows that it writes.
    pub(super) rows: Vec<RowWrite<'a>>,
    /// Images of the others that it changes, by `seq` of the events that they lie with.
    pub(super) images: HashMap<i64, String>,
    /// Up to where rows lack nothing then.
    pub(super) base: Base,
    /// Jobs whose rows it writes without an event of theirs.
    pub(super) quiet: Vec<JobId>,
    /// What its record has of jobs that it changes without an event, and whose rows it need not write.
    pub(super) extensions: Option<String>,
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

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::tests::{job_claimed, replay::any_history};

    /// All there is, in an order.
    fn all(unfolded: &Unfolded) -> impl Debug + PartialEq + use<> {
        let jobs: BTreeMap<_, _> = unfolded.jobs.iter().map(|(id, behind)| (*id, format!("{behind:?}"))).collect();
        (jobs, unfolded.since.clone(), unfolded.queued.clone(), unfolded.extended.clone(), unfolded.head)
    }

    proptest! {
        /// What a batch that came to nothing has changed is as it was, whatever it was.
        #[test]
        fn a_batch_that_came_to_nothing_leaves_no_trace(history in any_history(), seconds in 0i64..20) {
            let mut unfolded = Unfolded::default();
            for (job, events) in history.iter().skip(1).filter(|(_, events)| !events.is_empty()) {
                let changes = Changes {
                    changed: vec![job.clone().into()],
                    events: events.iter().cloned().map(Arc::new).collect(),
                    ..Changes::default()
                };
                let now = job.last_recorded_at + TimeDelta::seconds(seconds);
                let before = all(&unfolded);
                unfolded.follow(&changes, (job.last_seq, 1), now, TimeDelta::seconds(10));
                let after = all(&unfolded);
                unfolded.revert();
                prop_assert_eq!(all(&unfolded), before);
                unfolded.follow(&changes, (job.last_seq, 1), now, TimeDelta::seconds(10));
                prop_assert_eq!(all(&unfolded), after);
                prop_assert_eq!(unfolded.get(job.id).is_some(), unfolded.len() == 1);
            }
        }
    }

    /// However many jobs begin to run in each batch, the base follows the log.
    #[test]
    fn no_more_is_behind_than_may_be() {
        let (job, event) = job_claimed();
        for of_batch in [100, 500] {
            let (mut unfolded, mut seq) = (Unfolded::default(), 0);
            while seq < 2 * FAR {
                let mut changes = Changes::default();
                for _ in 0..of_batch {
                    seq += 1;
                    let job = Job { id: JobId(uuid::Uuid::now_v7()), last_seq: seq, ..job.clone() };
                    changes.events.push(Arc::new(JobEvent { seq, job_id: job.id, ..event.clone() }));
                    changes.changed.push(job.into());
                }
                let rows = unfolded.follow(&changes, (seq, seq), event.recorded_at, TimeDelta::hours(1));
                let (far, most) = (seq - rows.base.seq, unfolded.len());
                assert!(most <= MOST + of_batch && far <= FAR + of_batch as i64, "{most} are behind, by {far} events");
            }
        }
    }
}
