//! Which ready jobs a claim gets: the most urgent first.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::command::Claim;
use crate::{
    domain::{id::JobId, job::Job, job_type::OrgSettings},
    store::{ClaimOrder, FoundReady, HeldBy, Ready},
};

/// Bytes on the wire of the jobs of one answer, unless it has a single job. Keeps answers below 4 MiB.
pub(super) const ANSWER_BYTES: usize = 3_584 << 10;
/// Candidates of each type for the claims of one batch: as many as ten claims take at most.
pub(super) const LOOKED_AT: usize = 1_000;

/// The candidates to load: of each type as many as all claims that name it could take, and one more, which shows that some are
/// left.
pub(super) fn ready(claims: &[&Claim]) -> Ready {
    let bounded = |wanted: usize| wanted.min(LOOKED_AT) + 1;
    let mut wanted = BTreeMap::<_, usize>::new();
    for claim in claims {
        for name in claim.types.iter() {
            *wanted.entry(Arc::clone(name)).or_default() += claim.max_jobs;
        }
    }
    // Claims that name types may take some of the most urgent jobs of all types, so all claims count.
    let wants_all = claims.iter().any(|claim| claim.types.is_empty());
    let all = if wants_all { bounded(claims.iter().map(|claim| claim.max_jobs).sum()) } else { 0 };
    Ready { of: wanted.into_iter().map(|(name, n)| (name, bounded(n))).collect(), all }
}

/// The leases that earlier calls of these claims may have taken.
pub(super) fn held(claims: &[&Claim]) -> Vec<HeldBy> {
    let by = |claim: &&Claim| {
        let request = Arc::clone(claim.request.as_ref()?);
        Some(HeldBy { worker: Arc::clone(&claim.worker), request, limit: claim.max_jobs })
    };
    claims.iter().filter_map(by).collect()
}

/// The jobs that can still be chosen.
pub(super) struct Candidates {
    types: HashMap<Arc<str>, BTreeMap<ClaimOrder, JobId>>,
    /// Types of which the database may have more jobs than were loaded.
    cut: BTreeSet<Arc<str>>,
    /// The last jobs that were loaded of these types.
    last: HashMap<Arc<str>, ClaimOrder>,
    /// The database may have more jobs of any type than were loaded.
    is_cut: bool,
    /// The last jobs that were loaded of all types, in that case.
    last_of_all: Option<ClaimOrder>,
}

impl Candidates {
    /// The loaded ready jobs, except those of paused types. A job that the batch has loaded in full counts only if it is ready
    /// at this point.
    pub(super) fn new(mut found: FoundReady, known: &HashMap<JobId, Job>, settings: &OrgSettings) -> Self {
        if settings.has_pause() {
            // The batch may have paused types after their jobs were loaded.
            found.jobs.retain(|job| !settings.is_paused(&job.job_type));
            found.cut.retain(|name| !settings.is_paused(name));
            found.is_cut &= !settings.are_all_paused();
        }
        let is_ready = |job: &&Job| job.is_ready() && !settings.is_paused(&job.spec.job_type);
        let mut types: HashMap<Arc<str>, BTreeMap<ClaimOrder, JobId>> = HashMap::new();
        let mut last: HashMap<Arc<str>, ClaimOrder> = HashMap::new();
        for job in found.jobs.iter().filter(|job| found.cut.contains(&job.job_type)) {
            let last = last.entry(Arc::clone(&job.job_type)).or_insert(job.order);
            *last = job.order.max(*last);
        }
        for job in found.jobs.into_iter().filter(|job| !known.contains_key(&job.id)) {
            types.entry(job.job_type).or_default().insert(job.order, job.id);
        }
        for job in known.values().filter(is_ready) {
            types.entry(Arc::clone(&job.spec.job_type)).or_default().insert(ClaimOrder::of(job), job.id);
        }
        Self { types, cut: found.cut, last, is_cut: found.is_cut, last_of_all: found.last_of_all }
    }

    /// The type of the job that the claim gets next.
    fn first(&self, claim: &Claim) -> Option<&Arc<str>> {
        // The database may have jobs of a used-up type that are more urgent than the candidates left: those that the batch has
        // made, or has given a lower priority, come after the loaded ones. Another batch will see.
        let is_used_up = |name: &Arc<str>| {
            let first = self.types.get(name).and_then(BTreeMap::first_key_value);
            first.is_none_or(|(order, _)| self.last.get(name).is_some_and(|last| order > last))
        };
        if self.cut.iter().any(|name| claim.wants(name) && is_used_up(name)) {
            return None;
        }
        let of_type =
            |name| self.types.get_key_value(name).and_then(|(name, jobs)| Some((jobs.first_key_value()?, name)));
        let first = if claim.types.is_empty() {
            let is_loaded =
                |((order, _), _): &((&ClaimOrder, &JobId), _)| self.last_of_all.is_none_or(|last| **order <= last);
            self.types.keys().filter_map(of_type).min().filter(is_loaded)
        } else {
            claim.types.iter().filter_map(of_type).min()
        };
        first.map(|(_, name)| name)
    }

    /// How many candidates of its type come before a ready job, and whether others may, because it lies behind all that were
    /// loaded.
    pub(super) fn ahead(&self, job: &Job) -> (usize, bool) {
        let (of_type, order) = (self.types.get(&job.spec.job_type), ClaimOrder::of(job));
        let ahead = of_type.map_or(0, |of_type| of_type.range(..order).count());
        (ahead, self.last.get(&job.spec.job_type).is_some_and(|last| order > *last))
    }

    /// Takes the job that the claim gets next.
    pub(super) fn take(&mut self, claim: &Claim) -> Option<JobId> {
        let name = Arc::clone(self.first(claim)?);
        let (_, id) = self.types.get_mut(&name)?.pop_first()?;
        Some(id)
    }

    /// True if there is, or may be, one more job for the claim.
    pub(super) fn has_more(&self, claim: &Claim) -> bool {
        let is_cut = self.is_cut && claim.types.is_empty();
        is_cut || self.first(claim).is_some() || self.cut.iter().any(|name| claim.wants(name))
    }
}

/// Approximate bytes of a job in an answer.
pub(super) fn weight(job: &Job) -> usize {
    const FIXED: usize = 1_024;
    FIXED + job.spec.payload_bytes as usize + job.text_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{job::JobSpec, tests::ready_job},
        store::ReadyJob,
    };

    /// Two jobs were loaded of more, and the batch has then given one of them this priority. Returns the jobs that a claim gets.
    fn claimed(priority: i32, types: &[&str], is_cut_by_type: bool) -> usize {
        let jobs = [1, 2].map(|seq| ready_job("t", seq));
        let of =
            |job: &Job| ReadyJob { id: job.id, job_type: Arc::clone(&job.spec.job_type), order: ClaimOrder::of(job) };
        let loaded: Vec<_> = jobs.iter().map(of).collect();
        let last_of_all = loaded.iter().map(|job| job.order).max().filter(|_| !is_cut_by_type);
        let cut = if is_cut_by_type { BTreeSet::from(["t".into()]) } else { BTreeSet::new() };
        let found = FoundReady { jobs: loaded, cut, is_cut: !is_cut_by_type, last_of_all };
        let edited = Job { spec: Arc::new(JobSpec { priority, ..(*jobs[0].spec).clone() }), ..jobs[0].clone() };
        let mut candidates = Candidates::new(found, &HashMap::from([(edited.id, edited)]), &OrgSettings::default());
        let claim = Claim {
            worker: "w".into(),
            types: types.iter().map(|name| Arc::from(*name)).collect(),
            max_jobs: 10,
            lease: std::time::Duration::from_secs(30),
            request: None,
        };
        let taken = std::iter::from_fn(|| candidates.take(&claim)).count();
        assert!(candidates.has_more(&claim));
        taken
    }

    #[test]
    fn a_job_that_the_batch_put_behind_those_that_were_loaded_waits_for_the_next() {
        for (types, is_cut_by_type) in [(&["t"][..], true), (&[], false)] {
            assert_eq!(claimed(5, types, is_cut_by_type), 2);
            assert_eq!(claimed(-5, types, is_cut_by_type), 1, "jobs that were not loaded may come before it");
        }
    }
}
