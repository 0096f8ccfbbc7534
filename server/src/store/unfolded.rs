//! The running jobs of an org whose rows are behind the log: the events since then, each with its image, tell what they are.
//!
//! A batch writes the rows of the jobs that it creates and of those that don't run after it. What a running job does is in the log alone
//! until it stops, or until it is **folded**: a batch of its org writes its row once that has been behind for some seconds.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::TimeDelta;

use super::{Changed, Changes, ClaimOrder, HeldBy};
use crate::domain::{
    clock::Time,
    id::JobId,
    job::Job,
    transition::{Command, Tick},
};

/// How long the row of a running job may be behind, about.
pub(super) const FOLD_AFTER: TimeDelta = TimeDelta::seconds(3);
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
}

/// A job whose row is behind.
#[derive(Debug)]
struct Behind {
    job: Job,
    /// The first event that its row lacks, and when that was recorded.
    seq: i64,
    recorded_at: Time,
}

impl Behind {
    fn is_stale(&self, now: Time) -> bool {
        // A clock that was set back says nothing of how long that is.
        self.recorded_at + FOLD_AFTER <= now || self.recorded_at > now
    }
}

impl Unfolded {
    /// A job's row lacks this event, the first one of those that it lacks.
    pub(super) fn add(&mut self, job: Job, seq: i64, recorded_at: Time) {
        self.since.insert(seq, job.id);
        self.jobs.insert(job.id, Behind { job, seq, recorded_at });
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
        let is_of_type = |job: &&Job| job_type.is_none_or(|wanted| job.spec.job_type == *wanted);
        let stands_there = |job: &&Job| from.is_none_or(|from| ClaimOrder::of(job) >= from);
        self.jobs().filter(is_of_type).filter(stands_there).count()
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

    /// Up to where no row lacks an event, in a log that ends here.
    pub(super) fn base_seq(&self, head: i64) -> i64 {
        self.since.first_key_value().map_or(head, |(seq, _)| seq - 1)
    }

    /// Those that a clock which was ahead by so much at most has put off.
    pub(super) fn misdated(&self, by: Duration, now: Time) -> impl Iterator<Item = JobId> {
        let tick = Tick { now, recorded_at: now, next_seq: 0 };
        let is_misdated =
            move |job: &&Job| job.apply(&Command::Redate(by), tick).is_ok_and(|redated| redated.is_changed);
        self.jobs().filter(is_misdated).map(|job| job.id)
    }

    /// True if some are to be folded now.
    pub(super) fn is_stale(&self, now: Time) -> bool {
        let first = self.since.first_key_value().and_then(|(_, id)| self.jobs.get(id));
        first.is_some_and(|behind| behind.is_stale(now))
    }

    /// The rows that a batch writes of the jobs that it changes: all of a row that is behind.
    pub(super) fn rows(&self, changes: &Changes) -> Vec<Changed> {
        let left = changes.left_to_log();
        let written = changes.changed.iter().filter(|changed| !left.contains_key(&changed.job.id));
        let row = |changed: &Changed| match self.jobs.contains_key(&changed.job.id) {
            true => Changed::from(changed.job.clone()),
            false => changed.clone(),
        };
        written.map(row).collect()
    }

    /// Jobs that are to be folded by a batch that changes these others.
    pub(super) fn stale(&self, changes: &Changes, now: Time) -> Vec<Changed> {
        let most =
            if changes.events.len() + changes.changed.len() < FOLDED_AT_ONCE { FOLDED_ALONE } else { FOLDED_AT_ONCE };
        let changed: HashSet<_> = changes.changed.iter().map(|changed| changed.job.id).collect();
        let stale = self.since.values().filter_map(|id| self.jobs.get(id));
        let stale = stale.take_while(|behind| behind.is_stale(now));
        let stale = stale.filter(|behind| !changed.contains(&behind.job.id)).take(most);
        stale.map(|behind| Changed::from(behind.job.clone())).collect()
    }

    /// Takes note of what a batch has changed, and of the rows that it has folded.
    pub(super) fn follow(&mut self, changes: &Changes, folded: &[Changed]) {
        let left = changes.left_to_log();
        for Changed { job, .. } in &changes.changed {
            match left.get(&job.id) {
                None => self.remove(job.id),
                Some(first) => match self.jobs.get_mut(&job.id) {
                    Some(behind) => behind.job = job.clone(),
                    None => self.add(job.clone(), first.seq, first.recorded_at),
                },
            }
        }
        folded.iter().for_each(|folded| self.remove(folded.job.id));
        changes.removed.iter().for_each(|removed| self.remove(removed.id));
    }

    fn remove(&mut self, id: JobId) {
        if let Some(behind) = self.jobs.remove(&id) {
            self.since.remove(&behind.seq);
        }
    }
}
