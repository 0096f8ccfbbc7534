//! Erasures: events of erased jobs are blanked in place, so many a batch. What a job has beyond that is noted with the first of
//! its batches, and blanked by later ones.

use std::{collections::HashMap, sync::Arc};

use super::Most;
use crate::domain::{clock::Time, event::JobEvent, id::JobId, job::Job};

/// Most events that one batch blanks, and most bytes of these events.
const BLANKED: Most = Most { events: 10_000, bytes: 16 << 20 };
/// The same while others wait for their turns.
const BLANKED_IN_COMPANY: Most = Most { events: 1_000, bytes: 1 << 20 };

/// What a batch needs for erasures.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ErasureNeeds {
    /// Jobs to be erased.
    pub jobs: Vec<JobId>,
    /// What erasures of any job have left to blank, beside those of `jobs`.
    pub of_any: bool,
    /// Others wait for their turns.
    pub has_company: bool,
}

impl ErasureNeeds {
    /// How much one batch blanks.
    pub(super) const fn most(&self) -> Most {
        if self.has_company { BLANKED_IN_COMPANY } else { BLANKED }
    }
}

/// Events of an erased job that are still to be blanked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unblanked {
    /// The job.
    pub job: JobId,
    /// Its events up to this `seq` are blank.
    pub after: i64,
    /// `seq` of the last event to blank.
    pub last: i64,
    /// A time no later than `recorded_at` of the job's first event.
    pub since: Time,
    /// `recorded_at` of the last event to blank.
    pub until: Time,
    /// Who asked for the job. Events that name it as their actor lose that too.
    pub requester: Arc<str>,
}

impl Unblanked {
    /// All events of a job that is not erased yet.
    pub fn of(job: &Job) -> Self {
        Self {
            job: job.id,
            after: 0,
            last: job.last_seq,
            since: job.created_at,
            until: job.last_recorded_at,
            requester: Arc::clone(&job.spec.requested_by),
        }
    }

    /// True once all of them are blank.
    pub const fn is_done(&self) -> bool {
        self.after >= self.last
    }
}

/// An event as it is stored, without its result.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredEvent {
    /// The event.
    pub event: JobEvent,
    /// Its size, as it is counted for the org.
    pub bytes: i64,
}

/// The first stored events of those that are to be blanked of a job, as many as one batch may blank.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StoredEvents {
    /// The events, in order.
    pub events: Vec<StoredEvent>,
    /// True if there are no more.
    pub are_all: bool,
}

/// What the database has of [`ErasureNeeds`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FoundErasures {
    /// What earlier erasures have left to blank.
    pub left: Vec<Unblanked>,
    /// The events to blank next of the first in `left`, and those of jobs that are to be erased.
    pub events: HashMap<JobId, StoredEvents>,
}

/// The events to load: of the first erasure that has left some, and of jobs that are to be erased, in the order of their creation,
/// as long as one batch may blank them all.
pub(super) fn wanted(mut jobs: Vec<&Job>, left: &[Unblanked], most: Most) -> Vec<Unblanked> {
    jobs.retain(|job| job.erased_at.is_none());
    jobs.sort_unstable_by_key(|job| job.created_seq);
    let mut before = 0;
    let fits = |job: &&Job| {
        let fits = before < most.events;
        before += job.last_job_seq;
        fits
    };
    left.first().cloned().into_iter().chain(jobs.into_iter().take_while(fits).map(Unblanked::of)).collect()
}

/// The loaded events by job. They are in the order of `wanted`, and cut where the batch may blank no more.
pub(super) fn by_job(wanted: &[Unblanked], loaded: Vec<StoredEvent>, most: Most) -> HashMap<JobId, StoredEvents> {
    let is_cut =
        loaded.len() as i64 >= most.events || loaded.iter().map(|stored| stored.bytes).sum::<i64>() >= most.bytes;
    let last = loaded.last().map(|stored| stored.event.job_id).filter(|_| is_cut);
    let mut by_job: HashMap<_, StoredEvents> = HashMap::new();
    for stored in loaded {
        by_job.entry(stored.event.job_id).or_default().events.push(stored);
    }
    let mut is_before_cut = true;
    for unblanked in wanted {
        is_before_cut &= Some(unblanked.job) != last;
        let of_job = by_job.entry(unblanked.job).or_default();
        of_job.are_all = is_before_cut || of_job.events.last().is_some_and(|stored| stored.event.seq >= unblanked.last);
    }
    by_job
}
