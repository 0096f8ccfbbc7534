//! Which rows are folded, and when.

use std::collections::HashSet;

use chrono::TimeDelta;

use super::{Lacks, OrgState};
use crate::{
    domain::{clock::Time, id::JobId, job::Job},
    store::{Changes, NextDue},
};

/// How long after its fold time any server sweeps an org. The server that left the rows behind folds them before, if it is up.
const NOTED_LATER: TimeDelta = TimeDelta::seconds(2);
/// How long the row of a running job may say that it is queued: every search for ready jobs has to skip such a row.
const QUEUED_FOR: TimeDelta = TimeDelta::seconds(3);
/// How many events of the log may follow the first one that a row lacks: a server without a cached state reads them all.
pub(super) const FAR: i64 = 16_384;
/// Rows of an org that may lack events.
pub(super) const MOST: usize = 8_192;
/// Memory of the jobs with such rows, in bytes.
pub(super) const MOST_BYTES: usize = 16 << 20;
/// Memory of the jobs whose rows lack only a lease extension, in bytes.
pub(super) const MOST_EXTENDED_BYTES: usize = 32 << 20;
/// Rows of an org that may lack a lease extension.
const MOST_EXTENDED: usize = 16_384;
/// Extensions are folded so many times later than events: heartbeats come more often, and each replaces the last one.
const EXTENDED_FOR: i32 = 6;
/// Extensions are folded no later than this.
const LONGEST_EXTENDED: TimeDelta = TimeDelta::minutes(1);
/// Rows that one batch folds at most: its callers wait for them.
const FOLDED_AT_ONCE: usize = 64;
/// The same for a batch with fewer changes than `FOLDED_AT_ONCE`.
const FOLDED_ALONE: usize = 512;
/// Memory of the jobs that a batch folds, in bytes, unless it leaves more behind itself.
const FOLDED_BYTES: usize = 1 << 20;

/// Jobs whose rows a batch leaves behind, and which were not behind before; and their memory in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Added {
    jobs: usize,
    bytes: usize,
}

impl Added {
    pub(super) fn count(&mut self, job: &Job) {
        self.jobs += 1;
        self.bytes += job.bytes();
    }
}

impl OrgState {
    /// When to sweep the org next, given what the batch itself found. While rows are behind, the sweep is no later than shortly
    /// after their fold time, so that any server folds them if this one is gone.
    pub(in crate::store) fn next_due(
        &mut self,
        found: Option<NextDue>,
        now: Time,
        fold_after: TimeDelta,
    ) -> Option<NextDue> {
        let note = now + fold_after + NOTED_LATER;
        // Lease extensions need no sweep: the org is swept at the row's lease end, which is no later than the real one.
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

    /// True if rows of the org are to be folded now.
    pub(in crate::store) fn is_stale(&self, now: Time, fold_after: TimeDelta) -> bool {
        // This server sweeps the org, and writes a new time, a second before any other server does.
        let is_noted_soon = self.noted_until.is_some_and(|noted| noted <= now + NOTED_LATER / 2);
        is_noted_soon && !self.since.is_empty() || self.next_stale(now, fold_after).next().is_some()
    }

    /// The jobs that a batch with these changes folds. `added` is what the batch leaves behind itself.
    pub(super) fn stale(&self, changes: &Changes, now: Time, fold_after: TimeDelta, added: Added) -> Vec<JobId> {
        let has_little = changes.events.len() + changes.changed.len() < FOLDED_AT_ONCE;
        let least = if has_little { FOLDED_ALONE } else { FOLDED_AT_ONCE };
        let mut seen: HashSet<_> = changes.changed.iter().map(|changed| changed.job.id).collect();
        // Folding at least what the batch leaves behind bounds how much is behind.
        let mut folded = Added::default();
        let stale = self.next_stale(now, fold_after).filter(|id| seen.insert(*id));
        stale
            .take_while(|id| {
                let has_few = folded.jobs < least.max(added.jobs) && folded.bytes < FOLDED_BYTES;
                let goes_on = has_few || folded.bytes < added.bytes;
                folded.jobs += 1;
                folded.bytes += self.bytes_of(*id);
                goes_on
            })
            .collect()
    }

    fn bytes_of(&self, id: JobId) -> usize {
        self.get(id).map_or(0, Job::bytes)
    }

    /// Jobs whose rows have been behind for too long, by too many events, or beyond a bound. Rows that say queued come first,
    /// then rows that lack events, then rows that lack extensions; of each kind the longest behind first.
    fn next_stale(&self, now: Time, fold_after: TimeDelta) -> impl Iterator<Item = JobId> {
        // After the clock was set back a row's age is unknown: it counts as old.
        let is_old = move |at: Time, after| at + after <= now || at > now;
        let looks_queued =
            move |lacks: &Lacks| lacks.is_queued && is_old(lacks.recorded_at, fold_after.min(QUEUED_FOR));
        let lacking = move |id: &JobId| Some((*id, self.jobs.get(id)?.lacks?));
        let queued = self.queued.values().filter_map(lacking).take_while(move |(_, lacks)| looks_queued(lacks));
        let beyond = self.since.len().saturating_sub(MOST);
        let mut beyond_bytes = self.since_bytes.saturating_sub(MOST_BYTES);
        let is_stale = move |(n, (id, lacks)): &(usize, (JobId, Lacks))| {
            let is_too_much = beyond_bytes > 0;
            beyond_bytes = beyond_bytes.saturating_sub(self.bytes_of(*id));
            is_old(lacks.recorded_at, fold_after) || self.head - lacks.seq >= FAR || *n < beyond || is_too_much
        };
        let others = self.since.values().filter_map(lacking).enumerate().take_while(is_stale);
        let others = others.map(|(_, other)| other).filter(move |(_, lacks)| !looks_queued(lacks));
        let unheard_for =
            fold_after.checked_mul(EXTENDED_FOR).map_or(LONGEST_EXTENDED, |after| after.min(LONGEST_EXTENDED));
        let beyond = self.extended.len().saturating_sub(MOST_EXTENDED);
        let mut beyond_bytes = self.extended_bytes.saturating_sub(MOST_EXTENDED_BYTES);
        let is_unheard = move |(place, (_, id)): &(usize, &(i64, JobId))| {
            let is_too_much = beyond_bytes > 0;
            beyond_bytes = beyond_bytes.saturating_sub(self.bytes_of(*id));
            let extended = self.jobs.get(id).and_then(|behind| behind.extended);
            *place < beyond || is_too_much || extended.is_some_and(|extended| is_old(extended.at, unheard_for))
        };
        let unheard = self.extended.iter().enumerate().take_while(is_unheard).map(|(_, (_, id))| *id);
        queued.chain(others).map(|(id, _)| id).chain(unheard)
    }
}
