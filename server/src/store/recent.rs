//! Jobs as this server's batches have left them, so that what names them again need not have them read.
//!
//! Nothing rests on it: whoever decides by what is remembered makes sure, within the same transaction or statement, that the
//! database has it so.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{Changes, Head};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::Job,
    },
    generations::Generations,
};

/// Jobs that are remembered for batches, at most; about 1 KiB each.
const MAX_JOBS: usize = 8_192;
/// What the texts of one may take, in bytes.
const MAX_TEXT: usize = 2 << 10;

/// The jobs of logs that this server writes, from the first change on.
pub(super) struct Recent(Mutex<State>);

struct State {
    orgs: HashMap<OrgId, End>,
    jobs: Generations<(OrgId, JobId), Kept>,
    stretches: u64,
}

/// Where this server has left a log.
#[derive(Clone, Copy)]
struct End {
    head: Head,
    /// Which of the stretches ends here that no other server has written into.
    stretch: u64,
}

struct Kept {
    job: Box<Job>,
    stretch: u64,
}

impl Default for Recent {
    fn default() -> Self {
        Self(Mutex::new(State { orgs: HashMap::new(), jobs: Generations::new(MAX_JOBS), stretches: 0 }))
    }
}

impl Recent {
    /// Those of these jobs that are remembered, as they are in a log that ends here; as far as the log tells: of a lease that was
    /// extended since by another server, it doesn't.
    pub(super) fn jobs(&self, org: OrgId, end: &Head, ids: &[JobId]) -> Vec<Job> {
        let state = &mut *self.state();
        let Some(left) = state.orgs.get(&org).filter(|left| left.head == *end) else { return Vec::new() };
        let mut known = |id: &JobId| {
            let kept = state.jobs.get(&(org, *id)).filter(|kept| kept.stretch == left.stretch)?;
            Some(Job::clone(&kept.job))
        };
        ids.iter().filter_map(&mut known).collect()
    }

    /// What a batch that begins here leaves, for when it is committed; nothing for sure where it has not looked for the head.
    pub(super) fn leaving(org: OrgId, before: Option<Head>, changes: &Changes) -> Left {
        let changed = changes.changed.iter().map(|changed| &changed.job);
        let (light, heavy): (Vec<_>, Vec<_>) = changed.partition(|job| job.text_bytes() <= MAX_TEXT);
        let gone = changes.removed.iter().chain(heavy).map(|job| job.id).collect();
        let after = before.map(|before| changes.head.unwrap_or(before));
        let jobs = light.into_iter().map(|job| Box::new(job.clone())).collect();
        Left { org, before, after, jobs, gone, end: None }
    }

    /// A batch is about to be committed: unless it is heard to be, nothing is known of its org any more.
    pub(super) fn committing(&self, left: &mut Left) {
        left.end = self.state().orgs.remove(&left.org);
    }

    /// It was committed.
    pub(super) fn left(&self, left: Left) {
        let state = &mut *self.state();
        let Left { org, before, after, jobs, gone, end } = left;
        let Some((before, after)) = before.zip(after) else { return };
        let stretch = end.filter(|end| end.head == before).map_or_else(
            || {
                state.stretches += 1;
                state.stretches
            },
            |end| end.stretch,
        );
        if state.orgs.len() >= MAX_JOBS {
            state.orgs.clear();
        }
        state.orgs.insert(org, End { head: after, stretch });
        for id in gone {
            state.jobs.remove(&(org, id));
        }
        for job in jobs {
            state.jobs.insert((org, job.id), Kept { job, stretch });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a batch leaves once it is committed.
pub(super) struct Left {
    org: OrgId,
    before: Option<Head>,
    after: Option<Head>,
    jobs: Vec<Box<Job>>,
    gone: Vec<JobId>,
    /// Where the log was left before.
    end: Option<End>,
}
