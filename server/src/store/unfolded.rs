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

use super::{Changed, Changes, HeldBy};
use crate::domain::{
    clock::Time,
    id::JobId,
    job::Job,
    transition::{Command, Tick},
};

/// How long the row of a running job may be behind, about.
pub(super) const FOLD_AFTER: TimeDelta = TimeDelta::seconds(3);
/// Rows that one batch folds, at most: its callers wait for them. And one that has few changes of its own.
const FOLDED_AT_ONCE: usize = 64;
const FOLDED_ALONE: usize = 512;

/// See the module.
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

    /// How many there are of a type, or of all.
    pub(super) fn count(&self, job_type: Option<&Arc<str>>) -> usize {
        let is_wanted = |behind: &&Behind| job_type.is_none_or(|wanted| behind.job.spec.job_type == *wanted);
        self.jobs.values().filter(is_wanted).count()
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

    /// When the next of them is to be folded.
    pub(super) fn fold_at(&self) -> Option<Time> {
        let (_, first) = self.since.first_key_value()?;
        Some(self.jobs.get(first)?.recorded_at + FOLD_AFTER)
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
        let stale = stale.take_while(|behind| behind.recorded_at + FOLD_AFTER <= now || behind.recorded_at > now);
        let stale = stale.filter(|behind| !changed.contains(&behind.job.id)).take(most);
        stale.map(|behind| Changed::from(behind.job.clone())).collect()
    }

    /// Takes note of what a batch has changed, and of the rows that it has folded. True if rows are behind that were not.
    pub(super) fn follow(&mut self, changes: &Changes, folded: &[Changed]) -> bool {
        let left = changes.left_to_log();
        let mut is_new = false;
        for Changed { job, .. } in &changes.changed {
            match left.get(&job.id) {
                None => self.remove(job.id),
                Some(first) => match self.jobs.get_mut(&job.id) {
                    Some(behind) => behind.job = job.clone(),
                    None => {
                        self.add(job.clone(), first.seq, first.recorded_at);
                        is_new = true;
                    }
                },
            }
        }
        folded.iter().for_each(|folded| self.remove(folded.job.id));
        changes.removed.iter().for_each(|removed| self.remove(removed.id));
        is_new
    }

    fn remove(&mut self, id: JobId) {
        if let Some(behind) = self.jobs.remove(&id) {
            self.since.remove(&behind.seq);
        }
    }
}
