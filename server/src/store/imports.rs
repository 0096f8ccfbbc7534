//! Which jobs of a batch were imported before, and have changed in the source since.

use std::collections::{HashMap, HashSet};

use crate::domain::{
    id::{Digest, JobId},
    job::Job,
    transition::Mark,
};

/// Those of the jobs that are imported again.
pub(super) fn of_imported<'a>(jobs: &'a [Job], imports: &[(JobId, Digest)]) -> Vec<&'a Job> {
    let wanted: HashSet<_> = imports.iter().map(|(job, _)| job).collect();
    jobs.iter().filter(|job| wanted.contains(&job.id)).collect()
}

/// The jobs whose source has other data than at the last import.
pub(super) fn other_than(marks: &HashMap<JobId, Mark>, imports: &[(JobId, Digest)]) -> HashSet<JobId> {
    let is_other = |(job, digest): &&(JobId, Digest)| marks.get(job).is_some_and(|mark| mark.digest != *digest);
    imports.iter().filter(is_other).map(|(job, _)| *job).collect()
}
