//! Jobs as this server's batches have left them, so that what names them again need not have them read.
//!
//! Nothing rests on it: whoever decides by what is remembered makes sure, within the same transaction or statement, that the
//! log's last record is still that after which it was so.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::TimeDelta;

use super::{
    Changes, ClaimOrder, RecordId,
    unfolded::{RowWrite, Unfolded},
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
    },
    generations::Generations,
};

const LONGEST_FOLD: TimeDelta = TimeDelta::days(366);
/// Jobs that are remembered for batches, at most; about 1 KiB each.
const MAX_JOBS: usize = 8_192;
/// What the texts of one may take, in bytes.
const MAX_TEXT: usize = 2 << 10;

/// The jobs of logs that this server writes, from the first change on.
pub(super) struct Recent {
    /// How long rows of running jobs may be behind.
    pub(super) fold_after: TimeDelta,
    state: Mutex<State>,
}

struct State {
    orgs: HashMap<OrgId, End>,
    jobs: Generations<(OrgId, JobId), Kept>,
    stretches: u64,
}

/// Where this server has left a log.
struct End {
    record: RecordId,
    /// Which of the stretches ends here that no other server has written into.
    stretch: u64,
    /// Of some types, where the first of the jobs that may be claimed stands, or before it.
    fronts: HashMap<Arc<str>, ClaimOrder>,
    /// The jobs whose rows are behind; `None` where that is not known, or a batch has it.
    unfolded: Option<Unfolded>,
}

/// Under this, which is the name of no type, stands the front of all types.
pub(super) static ALL_TYPES: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
/// Types of an org whose fronts are remembered, at most.
const MAX_FRONTS: usize = 256;

struct Kept {
    job: Box<Job>,
    stretch: u64,
}

impl Recent {
    pub(super) fn new(fold_after: Duration) -> Self {
        let state = State { orgs: HashMap::new(), jobs: Generations::new(MAX_JOBS), stretches: 0 };
        let fold_after = TimeDelta::from_std(fold_after).unwrap_or(LONGEST_FOLD).min(LONGEST_FOLD);
        Self { fold_after, state: Mutex::new(state) }
    }

    /// Those of these jobs that are remembered, as they are in a log whose last record this is.
    pub(super) fn jobs(&self, org: OrgId, last: RecordId, ids: &[JobId]) -> Vec<Job> {
        let state = &mut *self.state();
        let Some(left) = state.orgs.get(&org).filter(|left| left.record == last) else { return Vec::new() };
        let mut known = |id: &JobId| {
            let kept = state.jobs.get(&(org, *id)).filter(|kept| kept.stretch == left.stretch)?;
            Some(Job::clone(&kept.job))
        };
        ids.iter().filter_map(&mut known).collect()
    }

    /// Before this place no job of the type may be claimed, in a log whose last record this is.
    pub(super) fn front(&self, org: OrgId, last: RecordId, job_type: &Arc<str>) -> Option<ClaimOrder> {
        let state = self.state();
        state.orgs.get(&org).filter(|left| left.record == last)?.fronts.get(job_type).copied()
    }

    /// Takes the jobs whose rows are behind, if they are known, and the record as of which they are.
    pub(super) fn take_unfolded(&self, org: OrgId) -> Option<(RecordId, Unfolded)> {
        let state = &mut *self.state();
        let end = state.orgs.get_mut(&org)?;
        Some((end.record, end.unfolded.take()?))
    }

    /// Gives them back, in a log whose last record this is.
    pub(super) fn put_unfolded(&self, org: OrgId, last: RecordId, unfolded: Unfolded) {
        let state = &mut *self.state();
        match state.orgs.get_mut(&org).filter(|left| left.record == last) {
            Some(left) => left.unfolded = Some(unfolded),
            None => {
                state.stretches += 1;
                let (stretch, fronts) = (state.stretches, HashMap::new());
                state.keep(org, End { record: last, stretch, fronts, unfolded: Some(unfolded) });
            }
        }
    }

    /// Orgs that have jobs whose rows have been behind for long.
    pub(super) fn stale(&self, now: Time, limit: usize) -> Vec<OrgId> {
        let state = self.state();
        let is_stale = |(_, end): &(&OrgId, &End)| {
            end.unfolded.as_ref().is_some_and(|unfolded| unfolded.is_stale(now, self.fold_after))
        };
        state.orgs.iter().filter(is_stale).map(|(org, _)| *org).take(limit).collect()
    }

    /// What a batch that follows on this record and writes these rows leaves, for when it is committed. The jobs whose rows are behind then
    /// are remembered by themselves.
    pub(super) fn leaving(
        org: OrgId,
        before: RecordId,
        after: RecordId,
        changes: &Changes,
        rows: &[RowWrite<'_>],
    ) -> Left {
        let is_light = |job: &&Job| job.text_bytes() <= MAX_TEXT;
        let jobs: Vec<_> = rows.iter().map(|row| &*row.job).filter(is_light).cloned().collect();
        let kept: HashSet<_> = jobs.iter().map(|job| job.id).collect();
        let changed = changes.changed.iter().map(|changed| &changed.job);
        let gone = changed.clone().chain(&changes.removed).map(|job| job.id).filter(|id| !kept.contains(id)).collect();
        let ready = changes.created.iter().chain(changed).filter(|job| job.is_ready());
        let mut may_be_claimed: HashMap<_, ClaimOrder> = HashMap::new();
        for job in ready {
            let place = ClaimOrder::of(job);
            for name in [&job.spec.job_type, &*ALL_TYPES] {
                match may_be_claimed.get_mut(name) {
                    Some(first) => *first = place.min(*first),
                    None => _ = may_be_claimed.insert(Arc::clone(name), place),
                }
            }
        }
        Left { org, before, after, jobs, gone, fronts: HashMap::new(), unfolded: None, may_be_claimed, end: None }
    }

    /// A batch is about to be committed: unless it is heard to be, nothing is known of its org any more.
    pub(super) fn committing(&self, left: &mut Left) {
        left.end = self.state().orgs.remove(&left.org);
    }

    /// It is known that it was not: all is as it was before.
    pub(super) fn reverted(&self, left: Left) {
        let Some(mut unfolded) = left.unfolded else { return };
        unfolded.revert();
        if let Some(end) = left.end.filter(|end| end.record == left.before) {
            self.state().keep(left.org, End { unfolded: Some(unfolded), ..end });
        } else {
            self.put_unfolded(left.org, left.before, unfolded);
        }
    }

    /// It was committed.
    pub(super) fn left(&self, left: Left) {
        let state = &mut *self.state();
        let Left { org, before, after, jobs, gone, fronts: found, unfolded, may_be_claimed, end } = left;
        let (stretch, mut fronts) = match end.filter(|end| end.record == before) {
            Some(end) => (end.stretch, end.fronts),
            None => {
                state.stretches += 1;
                (state.stretches, HashMap::new())
            }
        };
        if fronts.len() + found.len() > MAX_FRONTS {
            fronts.clear();
        }
        fronts.extend(found);
        for (job_type, place) in may_be_claimed {
            if let Some(front) = fronts.get_mut(&job_type) {
                *front = place.min(*front);
            }
        }
        state.keep(org, End { record: after, stretch, fronts, unfolded });
        for id in gone {
            state.jobs.remove(&(org, id));
        }
        for job in jobs {
            state.jobs.insert((org, job.id), Kept { job: Box::new(job), stretch });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep(&mut self, org: OrgId, end: End) {
        if self.orgs.len() >= MAX_JOBS {
            self.orgs.clear();
        }
        self.orgs.insert(org, end);
    }
}

/// What a batch leaves once it is committed.
pub(super) struct Left {
    org: OrgId,
    before: RecordId,
    after: RecordId,
    jobs: Vec<Job>,
    gone: Vec<JobId>,
    /// Where the first jobs of some types that could be claimed were found to stand.
    pub(super) fronts: HashMap<Arc<str>, ClaimOrder>,
    /// The jobs whose rows are behind then, if that is known.
    pub(super) unfolded: Option<Unfolded>,
    /// Where the first jobs stand that this batch leaves to be claimed.
    may_be_claimed: HashMap<Arc<str>, ClaimOrder>,
    /// Where the log was left before.
    end: Option<End>,
}
