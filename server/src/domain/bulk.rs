//! Bulk operations: one action on all jobs that match a filter, in bounded steps.
//!
//! An operation is about the jobs that existed when it began: those up to `through_seq`. It first counts the matching ones, then
//! walks all of them by `created_seq`, each at most once, and acts on those that match when it reaches them.

use std::{collections::BTreeMap, sync::Arc};

use uuid::Uuid;

use super::{
    clock::Time,
    edit::EditableFields,
    id::Digest,
    job_filter::JobFilter,
    status::JobStatus,
    transition::{Cancel, Command, Edit, Erase, FoundPayload, Retry},
};

/// What a bulk operation does to each job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BulkAction {
    /// Cancel jobs that are queued or running.
    Cancel,
    /// Queue jobs again that are failed, canceled or in dead_letter.
    Retry,
    /// Change what queued jobs ask for, as [`BulkRequest::edit`] says.
    Update,
    /// Blank finished jobs for good.
    Erase,
    /// Cancel jobs that have not finished, at once, and blank all.
    CancelAndErase,
}

impl BulkAction {
    /// Every action.
    pub const ALL: [Self; 5] = [Self::Cancel, Self::Retry, Self::Update, Self::Erase, Self::CancelAndErase];

    /// The name in the database.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Retry => "retry",
            Self::Update => "update",
            Self::Erase => "erase",
            Self::CancelAndErase => "cancel_and_erase",
        }
    }

    /// The action with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == name)
    }

    /// The statuses of jobs that the action applies to.
    pub const fn statuses(self) -> &'static [JobStatus] {
        match self {
            Self::Cancel => &[JobStatus::Queued, JobStatus::Running],
            Self::Retry => &[JobStatus::Failed, JobStatus::Canceled, JobStatus::DeadLetter],
            Self::Update => &[JobStatus::Queued],
            Self::Erase => &[JobStatus::Succeeded, JobStatus::Failed, JobStatus::Canceled, JobStatus::DeadLetter],
            Self::CancelAndErase => &JobStatus::ALL,
        }
    }

    /// True of actions that erase jobs. What such an operation was asked for may tell whose jobs they were, so it is forgotten
    /// when the operation ends.
    pub const fn erases(self) -> bool {
        match self {
            Self::Cancel | Self::Retry | Self::Update => false,
            Self::Erase | Self::CancelAndErase => true,
        }
    }
}

/// Where a bulk operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BulkStatus {
    /// It counts the matching jobs.
    Counting,
    /// It acts on them.
    Running,
    /// It has reached all of them.
    Succeeded,
    /// It found another number of jobs than was expected, and did nothing.
    Refused,
    /// Somebody stopped it. What it has done stays.
    Stopped,
}

impl BulkStatus {
    /// Every status.
    pub const ALL: [Self; 5] = [Self::Counting, Self::Running, Self::Succeeded, Self::Refused, Self::Stopped];

    /// The name in the database.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counting => "counting",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Refused => "refused",
            Self::Stopped => "stopped",
        }
    }

    /// The status with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }

    /// True of an operation that has ended.
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Counting | Self::Running => false,
            Self::Succeeded | Self::Refused | Self::Stopped => true,
        }
    }
}

/// What somebody asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct BulkRequest {
    /// The operation's id, chosen when the call is accepted or by the caller.
    pub id: Uuid,
    /// What to do to each job.
    pub action: BulkAction,
    /// The values that [`BulkAction::Update`] sets, none of them a payload.
    pub edit: EditableFields,
    /// Which jobs. Only jobs with one of [`BulkAction::statuses`] match.
    pub filter: JobFilter,
    /// Why, for the log; may be empty.
    pub reason: Arc<str>,
    /// Only count.
    pub is_dry_run: bool,
    /// Do nothing if another number of jobs match.
    pub expected_count: Option<i64>,
    /// Digest of the request, to recognise it when it is repeated with the same id.
    pub digest: Digest,
}

/// A bulk operation.
#[derive(Debug, Clone, PartialEq)]
pub struct BulkOperation {
    /// What was asked for.
    pub request: BulkRequest,
    /// Who asked; empty when unknown.
    pub actor: Arc<str>,
    /// Where it stands.
    pub status: BulkStatus,
    /// The head of the log when it began. Later jobs are none of its business.
    pub through_seq: i64,
    /// The `created_seq` up to which the current phase has come.
    pub cursor: i64,
    /// Jobs that matched when they were counted.
    pub matched: i64,
    /// Jobs that matched when they were reached.
    pub reached: i64,
    /// Those of them that the action has changed.
    pub changed: i64,
    /// Those of them that were as the action wants them.
    pub unchanged: i64,
    /// Those of them that could not be changed, by reason.
    pub failed: BTreeMap<String, i64>,
    /// When it began.
    pub created_at: Time,
    /// When it last made progress.
    pub updated_at: Time,
    /// When it ended.
    pub finished_at: Option<Time>,
}

/// What a bulk operation did to one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BulkOutcome {
    /// The job changed.
    Changed,
    /// The job was as the action wants it.
    Unchanged,
    /// It could not be changed, for this reason.
    Failed(&'static str),
}

impl BulkOperation {
    /// An operation that begins now, in a log that ends at `head`.
    pub fn begin(request: BulkRequest, actor: Arc<str>, head: i64, now: Time) -> Self {
        Self {
            request,
            actor,
            status: BulkStatus::Counting,
            through_seq: head,
            cursor: 0,
            matched: 0,
            reached: 0,
            changed: 0,
            unchanged: 0,
            failed: BTreeMap::new(),
            created_at: now,
            updated_at: now,
            finished_at: None,
        }
    }

    /// The filter of the jobs that it acts on.
    pub fn filter(&self) -> JobFilter {
        let filter = &self.request.filter;
        let applies = |status: &JobStatus| filter.statuses.is_empty() || filter.statuses.contains(status);
        let statuses: Vec<_> = self.request.action.statuses().iter().copied().filter(applies).collect();
        JobFilter { statuses, ..filter.clone() }
    }

    /// True if jobs of no status can match, so there is nothing to do.
    pub fn is_about_nothing(&self) -> bool {
        self.filter().statuses.is_empty()
    }

    /// The command for one job.
    pub fn command(&self) -> Command {
        let actor = Arc::clone(&self.actor);
        match self.request.action {
            BulkAction::Cancel => {
                Command::Cancel(Cancel { reason: Arc::clone(&self.request.reason), etag: None, actor })
            }
            BulkAction::Retry => Command::Retry(Retry { etag: None, request: None, actor }),
            BulkAction::Erase | BulkAction::CancelAndErase => {
                let cancel = self.request.action == BulkAction::CancelAndErase;
                Command::Erase(Erase { cancel, etag: None, actor })
            }
            BulkAction::Update => {
                let (fields, found) = (self.request.edit.clone(), FoundPayload::default());
                Command::Edit(Box::new(Edit { fields, payload: None, found, etag: None, actor }))
            }
        }
    }

    /// Adds jobs that match to the count, which has come to `cursor`; `None`: all are counted.
    pub fn count(&mut self, matched: usize, cursor: Option<i64>, now: Time) {
        self.matched += matched as i64;
        self.updated_at = now;
        match cursor {
            Some(cursor) => self.cursor = cursor,
            None if self.request.expected_count.is_some_and(|expected| expected != self.matched) => {
                self.end(BulkStatus::Refused, now);
            }
            None if self.request.is_dry_run => self.end(BulkStatus::Succeeded, now),
            None => (self.status, self.cursor) = (BulkStatus::Running, 0),
        }
    }

    /// Notes what was done to a job that matched.
    pub fn note(&mut self, outcome: BulkOutcome) {
        self.reached += 1;
        match outcome {
            BulkOutcome::Changed => self.changed += 1,
            BulkOutcome::Unchanged => self.unchanged += 1,
            BulkOutcome::Failed(reason) => *self.failed.entry(reason.to_owned()).or_default() += 1,
        }
    }

    /// Notes that all jobs up to `cursor` were reached; `None`: all jobs.
    pub fn advance(&mut self, cursor: Option<i64>, now: Time) {
        self.updated_at = now;
        match cursor {
            Some(cursor) => self.cursor = cursor,
            None => self.end(BulkStatus::Succeeded, now),
        }
    }

    /// Ends the operation.
    pub fn end(&mut self, status: BulkStatus, now: Time) {
        (self.status, self.updated_at, self.finished_at) = (status, now, Some(now));
        if self.request.action.erases() {
            let request = &mut self.request;
            (request.filter, request.reason, request.digest) = (JobFilter::default(), Arc::default(), Digest([0; 32]));
        }
    }

    /// Jobs that were counted and did not match any more when they were reached, at least: others may have come to match.
    pub fn no_longer_matching(&self) -> i64 {
        if self.request.is_dry_run || self.status != BulkStatus::Succeeded {
            return 0;
        }
        (self.matched - self.reached).max(0)
    }
}
