//! Which rows of jobs a batch writes, and which changes it leaves to the log.

use std::{borrow::Cow, collections::HashMap};

use super::Changes;
use crate::domain::{
    event::{EventKind, JobEvent},
    id::JobId,
    job::Job,
    status::JobStatus,
};

/// The base: up to here no row is behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Base {
    /// No row lacks an event up to this `seq`.
    pub(super) seq: i64,
    /// No row lacks a lease extension in a record up to this number.
    pub(super) n: i64,
}

/// What a batch writes for the existing jobs of one org.
#[derive(Debug, Default)]
pub(super) struct RowWrites<'a> {
    /// The rows to write.
    pub(super) rows: Vec<Cow<'a, Job>>,
    /// Images of the other changed jobs, by the `seq` of their events.
    pub(super) images: HashMap<i64, String>,
    /// The base after the batch.
    pub(super) base: Base,
    /// Jobs whose rows the batch writes without an event.
    pub(super) quiet: Vec<JobId>,
    /// The lease extensions for the batch's record: of jobs that change without an event and whose rows need not be written.
    pub(super) extensions: Option<String>,
    /// True if some of the rows are folded: they only catch up with the log.
    pub(super) is_fold: bool,
}

/// The first event that a batch writes of each of its jobs, and whether the job's row may be left behind.
pub(super) struct Events<'a>(HashMap<JobId, First<'a>>);

struct First<'a> {
    event: &'a JobEvent,
    may_be_left: bool,
}

impl<'a> Events<'a> {
    pub(super) fn of(changes: &'a Changes) -> Self {
        let mut first: HashMap<JobId, First<'_>> = HashMap::new();
        for event in &changes.events {
            // Lists find finished jobs by their rows, so the row must be written when such a job runs again.
            let has_ended = event.prev_status.is_some_and(JobStatus::is_terminal);
            let of_job = first.entry(event.job_id).or_insert(First { event, may_be_left: !has_ended });
            // Imported events don't say when they changed the job.
            of_job.may_be_left &= !event.is_past && !matches!(event.kind, EventKind::Imported | EventKind::Edited);
        }
        Self(first)
    }

    /// True if the batch writes an event of this job.
    pub(super) fn have(&self, job: JobId) -> bool {
        self.0.contains_key(&job)
    }

    /// The first event of an existing job whose row may be left behind, if the job runs after the batch.
    pub(super) fn left_to_log(&self, job: &Job) -> Option<&'a JobEvent> {
        let first = self.0.get(&job.id)?;
        (first.may_be_left && job.status == JobStatus::Running).then_some(first.event)
    }
}
