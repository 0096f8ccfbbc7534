//! Which of the jobs that are ready a claim gets: the most urgent first.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::command::Claim;
use crate::{
    domain::{clock::Time, id::JobId, job::Job},
    store::{Loaded, Ready},
};

/// What the jobs of one answer may take on the wire, unless it is a single one: an answer stays below 4 MiB.
pub(super) const ANSWER_BYTES: usize = 3_584 << 10;
/// Jobs that are looked at for the claims of one batch, of each type: as many as ten claims take at most.
const LOOKED_AT: usize = 1_000;

/// The jobs that claims may take, as the database is asked for them: of each type as many as all claims on it could take,
/// and one more, by which it is seen that some are left.
pub(super) fn ready(claims: &[&Claim]) -> Ready {
    let bounded = |wanted: usize| wanted.min(LOOKED_AT) + 1;
    let mut wanted = BTreeMap::<_, usize>::new();
    for claim in claims {
        for name in claim.types.iter() {
            *wanted.entry(Arc::clone(name)).or_default() += claim.max_jobs;
        }
    }
    // Of the most urgent of all types, others may take what they name.
    let wants_all = claims.iter().any(|claim| claim.types.is_empty());
    let all = if wants_all { bounded(claims.iter().map(|claim| claim.max_jobs).sum()) } else { 0 };
    Ready { of: wanted.into_iter().map(|(name, n)| (name, bounded(n))).collect(), all }
}

/// The order in which jobs of a type are taken: by priority, then by how long they have been ready, then as they were created.
type Place = (Reverse<i32>, Time, i64);

/// The jobs that are left to be taken.
pub(super) struct Candidates {
    types: HashMap<Arc<str>, BTreeMap<Place, (JobId, usize)>>,
    places: HashMap<JobId, (Arc<str>, Place)>,
    /// Types of which the database has more than it was asked for.
    cut: BTreeSet<Arc<str>>,
    /// Whether it has more of whatever type.
    is_cut: bool,
}

impl Candidates {
    /// None yet, but what is known of those that the database has.
    pub(super) fn new(wanted: &Ready, loaded: &Loaded) -> Self {
        let mut found: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        for job in loaded.jobs.iter().filter(|job| job.is_ready()) {
            *found.entry(Arc::clone(&job.spec.job_type)).or_default() += 1;
        }
        let is_cut = wanted.all > 0 && found.values().sum::<usize>() >= wanted.all;
        let is_type_cut = |name: &Arc<str>, found| wanted.of.get(name).is_some_and(|limit| found >= *limit);
        let cut = found.into_iter().filter(|(name, found)| is_type_cut(name, *found)).map(|(name, _)| name).collect();
        Self { types: HashMap::new(), places: HashMap::new(), cut, is_cut }
    }

    pub(super) fn fill<'a>(&mut self, jobs: impl Iterator<Item = &'a Job>) {
        for job in jobs {
            let place = (Reverse(job.spec.priority), job.ready_at, job.created_seq);
            let job_type = &job.spec.job_type;
            self.types.entry(Arc::clone(job_type)).or_default().insert(place, (job.id, weight(job)));
            self.places.insert(job.id, (Arc::clone(job_type), place));
        }
    }

    /// The job that the claim gets next, and what it takes on the wire.
    pub(super) fn first(&self, claim: &Claim) -> Option<(JobId, usize)> {
        // The database has more urgent ones than what is left of the other types, maybe: another batch will see.
        let is_used_up = |name: &Arc<str>| self.types.get(name).is_none_or(BTreeMap::is_empty);
        if self.cut.iter().any(|name| claim.wants(name) && is_used_up(name)) {
            return None;
        }
        let of_type = |name| self.types.get(name).and_then(BTreeMap::first_key_value);
        let first = if claim.types.is_empty() {
            self.types.values().filter_map(BTreeMap::first_key_value).min()
        } else {
            claim.types.iter().filter_map(of_type).min()
        };
        first.map(|(_, found)| *found)
    }

    pub(super) fn take(&mut self, id: JobId) {
        let Some((name, place)) = self.places.remove(&id) else { return };
        if let Some(of_type) = self.types.get_mut(&name) {
            of_type.remove(&place);
        }
    }

    /// True if there is, or may be, one more that the claim could get.
    pub(super) fn has_more(&self, claim: &Claim) -> bool {
        let is_cut = self.is_cut && claim.types.is_empty();
        is_cut || self.first(claim).is_some() || self.cut.iter().any(|name| claim.wants(name))
    }
}

/// What a job takes in an answer, about.
fn weight(job: &Job) -> usize {
    const FIXED: usize = 1_024;
    FIXED + job.spec.payload_bytes as usize + job.text_bytes()
}
