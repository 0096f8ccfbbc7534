//! What a batch does to the rows of jobs, and what it leaves to the log.

use std::{borrow::Cow, collections::HashMap};

use super::Changes;
use crate::domain::{
    event::{EventKind, JobEvent},
    id::JobId,
    job::Job,
    status::JobStatus,
};

/// Up to where rows lack nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Base {
    /// No event up to here.
    pub(super) seq: i64,
    /// And no extension of a lease that is in a record up to this one.
    pub(super) n: i64,
}

/// What a batch does to the rows of an org's jobs that were there.
#[derive(Debug, Default)]
pub(super) struct RowWrites<'a> {
    /// The rows that it writes.
    pub(super) rows: Vec<Cow<'a, Job>>,
    /// Images of the others that it changes, by `seq` of the events that they lie with.
    pub(super) images: HashMap<i64, String>,
    /// Up to where rows lack nothing then.
    pub(super) base: Base,
    /// Jobs whose rows it writes without an event of theirs.
    pub(super) quiet: Vec<JobId>,
    /// What its record has of jobs that it changes without an event, and whose rows it need not write.
    pub(super) extensions: Option<String>,
    /// Some of the rows were behind, and nothing else is changed in them.
    pub(super) is_fold: bool,
}

/// The first event that a batch writes of each of its jobs, and whether that job's row may be left to the log.
pub(super) struct Events<'a>(HashMap<JobId, First<'a>>);

/// See [`Events`].
struct First<'a> {
    event: &'a JobEvent,
    may_be_left: bool,
}

impl<'a> Events<'a> {
    pub(super) fn of(changes: &'a Changes) -> Self {
        let mut first: HashMap<JobId, First<'_>> = HashMap::new();
        for event in &changes.events {
            // A row that says that its job has ended is in the lists of those.
            let has_ended = event.prev_status.is_some_and(JobStatus::is_terminal);
            let of_job = first.entry(event.job_id).or_insert(First { event, may_be_left: !has_ended });
            // Of what was brought in, events don't say when they changed the job.
            of_job.may_be_left &= !event.is_past && event.kind != EventKind::Imported;
        }
        Self(first)
    }

    /// True of a job of which the batch writes an event.
    pub(super) fn have(&self, job: JobId) -> bool {
        self.0.contains_key(&job)
    }

    /// The first event of a job that was there, if its row is left to the log: it runs now, and events tell how that came.
    pub(super) fn left_to_log(&self, job: &Job) -> Option<&'a JobEvent> {
        let first = self.0.get(&job.id)?;
        (first.may_be_left && job.status == JobStatus::Running).then_some(first.event)
    }
}
