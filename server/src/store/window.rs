//! The ready window: the first of the jobs that may be claimed, in memory, so that no claim looks for what it doesn't hand out.
//!
//! Of each type that claims ask for, and of all types together, a window has every job that may be claimed up to some place in their order,
//! and is filled from that place on when claims want more. Every batch brings it up to date with what it changes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock},
};

use super::{ClaimOrder, FoundReady, Ready, ReadyJob};
use crate::domain::{id::JobId, job::Job};

/// Under this, which is the name of no type, stands the window of all types.
pub(super) static ALL_TYPES: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
/// Jobs of a window, at most; more than the claims of a batch look at.
const MOST: usize = 2_048;
/// As many are looked for at least where a window is filled for the first time; then twice as many each time, up to the other number.
const FILLED_FIRST: usize = 32;
const FILLED: usize = 512;
/// The same of all windows that are filled at once.
const FILLED_TOGETHER: usize = 1_024;
/// Windows of an org, at most.
const MOST_WINDOWS: usize = 256;
/// Jobs of an org that are in windows and known as a whole, at most.
const MOST_WHOLE: usize = 4_096;
/// What a place takes, in bytes, about.
const PLACE: usize = 256;
/// What the texts of one of them may take, in bytes.
const MOST_TEXT: usize = 2 << 10;

/// The windows of one org.
#[derive(Debug, Default)]
pub(super) struct Windows {
    of: HashMap<Arc<str>, Window>,
    /// Where the jobs in them stand.
    places: HashMap<JobId, ReadyJob>,
    /// Some of the jobs in them, as they are.
    whole: HashMap<JobId, Job>,
    /// What these take, in bytes.
    bytes: usize,
    /// What the last batch has changed, as it was before.
    before: Vec<Before>,
}

/// The first jobs of a type.
#[derive(Debug, Default)]
struct Window {
    jobs: BTreeMap<ClaimOrder, ReadyJob>,
    through: Through,
    /// For how many was looked the last time.
    filled: usize,
}

/// Up to where a window has every job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Through {
    #[default]
    Nothing,
    /// Up to this place, with it.
    Order(ClaimOrder),
    All,
}

/// How a job stood among those that may be claimed.
#[derive(Debug)]
struct Before {
    id: JobId,
    place: Option<ReadyJob>,
    whole: Option<Job>,
}

/// What a window lacks of what is wanted.
#[derive(Debug, Clone)]
pub(super) struct Short {
    /// The name of the window.
    pub(super) name: Arc<str>,
    /// Look from here on; `None`: from the first on.
    pub(super) from: Option<ClaimOrder>,
    /// For as many.
    pub(super) limit: usize,
}

impl Window {
    fn reaches(&self, order: ClaimOrder) -> bool {
        match self.through {
            Through::Nothing => false,
            Through::Order(through) => order <= through,
            Through::All => true,
        }
    }
}

impl Windows {
    /// Has there be as few windows as may be, with those of what is wanted.
    pub(super) fn make_room(&mut self, wanted: &Ready) {
        let added = wanted.of.keys().filter(|name| !self.of.contains_key(*name)).count();
        if added > 0 && self.of.len() + added > MOST_WINDOWS {
            self.clear();
        }
    }

    /// What there has to be looked for before `wanted` can be told.
    pub(super) fn short(&self, wanted: &Ready) -> Vec<Short> {
        let all = (wanted.all > 0).then_some((&*ALL_TYPES, &wanted.all));
        let short = |(name, limit): (&Arc<str>, &usize)| {
            let of = self.of.get(name);
            let (known, through) = of.map_or((0, Through::Nothing), |of| (of.jobs.len(), of.through));
            let from = match through {
                Through::All => return None,
                Through::Order(_) if known >= *limit => return None,
                Through::Order(order) => Some(order),
                Through::Nothing => None,
            };
            let at_once = of.map_or(FILLED_FIRST, |of| (2 * of.filled).min(FILLED));
            let at_once = at_once.min(FILLED_TOGETHER / (wanted.of.len() + 1));
            Some(Short { name: Arc::clone(name), from, limit: at_once.max(*limit) })
        };
        wanted.of.iter().chain(all).filter_map(short).collect()
    }

    /// Takes what was found of what a window lacked, in order, but for those that run in truth. Of these it may know so many as a whole,
    /// once somebody reads them.
    pub(super) fn fill(&mut self, short: &Short, found: Vec<ReadyJob>, runs: impl Fn(JobId) -> bool) -> Vec<JobId> {
        let room = MOST_WHOLE.saturating_sub(self.whole.len());
        let mut unknown = Vec::new();
        let window = self.of.entry(Arc::clone(&short.name)).or_default();
        window.through = match found.last() {
            Some(last) if found.len() >= short.limit => Through::Order(last.order),
            _ => Through::All,
        };
        window.filled = short.limit;
        for job in found.into_iter().filter(|job| !runs(job.id)) {
            if unknown.len() < room && !self.whole.contains_key(&job.id) {
                unknown.push(job.id);
            }
            self.places.insert(job.id, job.clone());
            window.jobs.insert(job.order, job);
        }
        self.trim(&short.name);
        unknown
    }

    /// This is how a job in a window is.
    pub(super) fn know(&mut self, job: &Job) {
        if self.whole.len() < MOST_WHOLE && self.places.contains_key(&job.id) && job.text_bytes() <= MOST_TEXT {
            self.forget(job.id);
            self.bytes += job.bytes();
            self.whole.insert(job.id, job.clone());
        }
    }

    /// A job in a window is not known as a whole any more.
    fn forget(&mut self, id: JobId) -> Option<Job> {
        let job = self.whole.remove(&id)?;
        self.bytes -= job.bytes();
        Some(job)
    }

    /// A job in a window, if it is known as a whole; maybe without stage and progress, which a claim clears.
    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.whole.get(&id)
    }

    /// The first jobs of what is wanted, of which nothing is [short](Self::short).
    pub(super) fn ready(&self, wanted: &Ready) -> FoundReady {
        let first = |name: &Arc<str>, limit: usize| {
            self.of.get(name).into_iter().flat_map(move |window| window.jobs.values().take(limit)).cloned()
        };
        let of_types = wanted.of.iter().flat_map(|(name, limit)| first(name, *limit)).collect();
        FoundReady::new(wanted, of_types, first(&ALL_TYPES, wanted.all).collect())
    }

    /// What they take in memory, about.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + self.places.len() * PLACE
    }

    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// A batch begins to change jobs.
    pub(super) fn begin(&mut self) {
        self.before = Vec::new();
    }

    /// A batch has made this of a job.
    pub(super) fn follow(&mut self, job: &Job) {
        let place = job.is_ready().then(|| ready_job(job));
        if let Some(before) = self.set(job.id, place, Some(job)) {
            self.before.push(before);
        }
    }

    /// The last batch has come to nothing.
    pub(super) fn revert(&mut self) {
        for Before { id, place, whole } in std::mem::take(&mut self.before).into_iter().rev() {
            self.set(id, place, whole.as_ref());
        }
    }

    /// Has a job stand here among those that may be claimed, or nowhere; how it was before, unless it is in no window.
    fn set(&mut self, id: JobId, place: Option<ReadyJob>, whole: Option<&Job>) -> Option<Before> {
        if self.of.is_empty() {
            return None;
        }
        let before = Before { id, place: self.places.remove(&id), whole: self.forget(id) };
        if let Some(job) = &before.place {
            for name in [&job.job_type, &*ALL_TYPES] {
                self.of.get_mut(name).and_then(|window| window.jobs.remove(&job.order));
            }
        }
        let mut is_there = false;
        for name in place.iter().flat_map(|job| [&job.job_type, &*ALL_TYPES]) {
            let (Some(job), Some(window)) = (&place, self.of.get_mut(name)) else { continue };
            if window.reaches(job.order) {
                window.jobs.insert(job.order, job.clone());
                is_there = true;
            }
        }
        if let Some(job) = place.filter(|_| is_there) {
            let job_type = Arc::clone(&job.job_type);
            self.places.insert(id, job);
            whole.into_iter().for_each(|job| self.know(job));
            self.trim(&job_type);
            self.trim(&ALL_TYPES);
        }
        (before.place.is_some() || is_there).then_some(before)
    }

    /// Has a window be no larger than it may be.
    fn trim(&mut self, name: &Arc<str>) {
        while let Some(window) = self.of.get_mut(name).filter(|window| window.jobs.len() > MOST) {
            let Some((order, job)) = window.jobs.pop_last() else { return };
            window.through = window.jobs.last_key_value().map_or(Through::Nothing, |(last, _)| Through::Order(*last));
            let other = if *name == *ALL_TYPES { &job.job_type } else { &*ALL_TYPES };
            if self.of.get(other).is_none_or(|window| !window.jobs.contains_key(&order)) {
                self.places.remove(&job.id);
                self.forget(job.id);
            }
        }
    }
}

fn ready_job(job: &Job) -> ReadyJob {
    ReadyJob { id: job.id, job_type: Arc::clone(&job.spec.job_type), order: ClaimOrder::of(job) }
}

#[cfg(test)]
mod tests;
