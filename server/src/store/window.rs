//! The ready window: the first ready jobs in memory, so that no claim reads rows of jobs that it does not get.
//!
//! Each type that claims ask for has a window, and so have all types together. A window has every ready job up to some position
//! in claim order. It is filled from there on when claims want more. Every batch applies its changes to the windows.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock},
};

use super::{ClaimOrder, FoundReady, Ready, ReadyJob};
use crate::domain::{id::JobId, job::Job, job_type::OrgSettings};

/// The name of the window of all types: no type is called so.
pub(super) static ALL_TYPES: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
/// Jobs in a window, at most: more than the claims of a batch consider.
const MOST: usize = 2_048;
/// Jobs that a window loads the first time. Each load doubles that, up to `FILLED`. Claims that want more load more.
const FILLED_FIRST: usize = 32;
const FILLED: usize = 512;
/// Jobs that the windows of an org load together, unless claims want more.
const FILLED_TOGETHER: usize = 1_024;
/// Windows of an org, at most.
const MOST_WINDOWS: usize = 256;
/// Jobs of an org that are cached whole, at most.
const MOST_WHOLE: usize = 4_096;
/// About how many bytes an entry of `places` takes.
const PLACE: usize = 256;
/// Bytes of text beyond which a job is not cached whole.
const MOST_TEXT: usize = 2 << 10;

/// The windows of one org.
#[derive(Debug, Default)]
pub(super) struct Windows {
    of: HashMap<Arc<str>, Window>,
    /// The jobs in any window, with their positions.
    places: HashMap<JobId, ReadyJob>,
    /// Some of these jobs, whole.
    whole: HashMap<JobId, Job>,
    /// Memory of the whole jobs, in bytes.
    bytes: usize,
    /// Undo log of the last batch.
    before: Vec<Before>,
    /// The window of all types leaves out types that are paused.
    settings: Arc<OrgSettings>,
}

/// The first ready jobs of a type, or of all types.
#[derive(Debug, Default)]
struct Window {
    jobs: BTreeMap<ClaimOrder, ReadyJob>,
    through: Through,
    /// The limit of the last load.
    filled: usize,
}

/// How far a window has every ready job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Through {
    #[default]
    Nothing,
    /// Up to and including this position.
    Order(ClaimOrder),
    All,
}

/// A job as the windows had it before a change.
#[derive(Debug)]
struct Before {
    id: JobId,
    place: Option<ReadyJob>,
    whole: Option<Job>,
}

/// A load that a window needs before it has enough jobs.
#[derive(Debug, Clone)]
pub(super) struct Short {
    /// The name of the window.
    pub(super) name: Arc<str>,
    /// The position from which to load. `None`: from the first job on.
    pub(super) from: Option<ClaimOrder>,
    /// How many jobs to load.
    pub(super) limit: usize,
}

impl Short {
    /// True if the window is that of all types.
    pub(super) fn is_of_all(&self) -> bool {
        *self.name == **ALL_TYPES
    }

    /// The loads that the window of all types needs while it leaves out types: one for each of the others.
    pub(super) fn by_type(&self, types: Vec<Arc<str>>, settings: &OrgSettings) -> Vec<Self> {
        let types = types.into_iter().filter(|name| !settings.is_paused(name));
        types.map(|name| Self { name, ..self.clone() }).collect()
    }

    /// The jobs of the window, of what was found by type.
    pub(super) fn merge(&self, found: Vec<Vec<ReadyJob>>) -> Vec<ReadyJob> {
        let mut found = found.concat();
        found.sort_unstable_by_key(|job| job.order);
        found.truncate(self.limit);
        found
    }
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
    /// Drops all windows if those that `wanted` needs would exceed the bound.
    pub(super) fn make_room(&mut self, wanted: &Ready) {
        let added = wanted.of.keys().filter(|name| !self.of.contains_key(*name)).count();
        if added > 0 && self.of.len() + added > MOST_WINDOWS {
            self.clear();
        }
    }

    /// The loads that the windows need before they have what is wanted.
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

    /// Adds the jobs that were loaded for a window, in claim order, except those that run according to the log. Returns those
    /// that [`Windows::know`] may cache whole once their rows are read.
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

    /// Caches a job whole if it is in a window, is not too long, and there is room.
    pub(super) fn know(&mut self, job: &Job) {
        if self.whole.len() < MOST_WHOLE && self.places.contains_key(&job.id) && job.text_bytes() <= MOST_TEXT {
            self.forget(job.id);
            self.bytes += job.bytes();
            self.whole.insert(job.id, job.clone());
        }
    }

    /// Drops a job that is cached whole.
    fn forget(&mut self, id: JobId) -> Option<Job> {
        let job = self.whole.remove(&id)?;
        self.bytes -= job.bytes();
        Some(job)
    }

    /// A job in a window, if it is cached whole. It may lack stage and progress, which a claim clears.
    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.whole.get(&id)
    }

    /// The first jobs of what is wanted. Nothing of that may be [short](Self::short).
    pub(super) fn ready(&self, wanted: &Ready) -> FoundReady {
        let first = |name: &Arc<str>, limit: usize| {
            self.of.get(name).into_iter().flat_map(move |window| window.jobs.values().take(limit)).cloned()
        };
        let of_types = wanted.of.iter().flat_map(|(name, limit)| first(name, *limit)).collect();
        FoundReady::new(wanted, of_types, first(&ALL_TYPES, wanted.all).collect())
    }

    /// About how many bytes the windows take in memory.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + self.places.len() * PLACE
    }

    /// Drops all windows.
    pub(super) fn clear(&mut self) {
        *self = Self { settings: Arc::clone(&self.settings), ..Self::default() };
    }

    /// Applies these settings. If types are paused or resumed, all windows are dropped.
    pub(super) fn pause(&mut self, settings: &Arc<OrgSettings>) {
        if settings.has_pause() || self.settings.has_pause() {
            self.clear();
        }
        self.settings = Arc::clone(settings);
    }

    /// Starts the undo log of a batch.
    pub(super) fn begin(&mut self) {
        self.before = Vec::new();
    }

    /// Applies what a batch has made of a job.
    pub(super) fn follow(&mut self, job: &Job) {
        let place = job.is_ready().then(|| ready_job(job));
        if let Some(before) = self.set(job.id, place, Some(job)) {
            self.before.push(before);
        }
    }

    /// Undoes the changes of the last batch.
    pub(super) fn revert(&mut self) {
        for Before { id, place, whole } in std::mem::take(&mut self.before).into_iter().rev() {
            self.set(id, place, whole.as_ref());
        }
    }

    /// Sets a job's position, `None` if it is not ready. Returns what the windows had of it, `None` if it was and is in none.
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
            if window.reaches(job.order) && !(**name == **ALL_TYPES && self.settings.is_paused(&job.job_type)) {
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

    /// Cuts a window down to its bound.
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
