//! What a batch of one org takes and leaves: what its commands name, what the database has of that, and what changes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::{Changed, Expired, FoundReady, Head, Ready, RemovedFlow, Slice, Tally};
use crate::domain::{
    clock::Time,
    event::JobEvent,
    flow::Milestone,
    id::{Digest, JobId},
    job::Job,
    json::Json,
    status::JobStatus,
    transition::Mark,
};

/// What the commands of a batch name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Jobs.
    pub jobs: Vec<JobId>,
    /// Idempotency keys.
    pub keys: Vec<Arc<str>>,
    /// Types of jobs to be created.
    pub types: Vec<Arc<str>>,
    /// Finished jobs that are kept no longer.
    pub expired: Option<Expired>,
    /// Jobs that claims hold which came before.
    pub held: Vec<HeldBy>,
    /// Jobs that may be claimed.
    pub ready: Ready,
    /// Jobs that are due: those that were so first, no more than this many.
    pub due: Option<usize>,
    /// Jobs whose lease, or wait that the ledger has set, was dated by a clock that was ahead: no more than this many, and by so much at
    /// most.
    pub misdated: Option<(usize, Duration)>,
    /// What was brought in of these of the jobs before, and if that is other than this, what is in the log of them.
    pub imports: Vec<(JobId, Digest)>,
}

/// What a claim holds that came before with the same `request_id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldBy {
    /// Whose claim it is.
    pub worker: Arc<str>,
    /// Its `request_id`.
    pub request: Arc<str>,
    /// No more of the jobs than this.
    pub limit: usize,
}

/// How long finished jobs are kept, by the status in which they ended. Others are always kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention([Option<Duration>; JobStatus::ALL.len()]);

impl Retention {
    /// How long jobs that ended in this status are kept; `None`: for ever.
    pub const fn get(&self, status: JobStatus) -> Option<Duration> {
        self.0[status as usize]
    }

    /// Keeps jobs that ended in this status so long, and no longer.
    ///
    /// # Panics
    ///
    /// If it is not a status in which jobs end.
    pub const fn set(&mut self, status: JobStatus, keep: Duration) {
        assert!(status.is_terminal(), "only finished jobs are removed");
        self.0[status as usize] = Some(keep);
    }

    /// The shortest time for which any finished job is kept; `None` if all are kept for ever.
    pub fn shortest(&self) -> Option<Duration> {
        self.0.iter().flatten().min().copied()
    }

    /// The statuses whose jobs are removed, each with the time before which they must have ended.
    pub fn cutoffs(&self, now: Time) -> impl Iterator<Item = (JobStatus, Time)> {
        let retention = *self;
        JobStatus::ALL.into_iter().filter_map(move |status| Some((status, now - retention.get(status)?)))
    }
}

/// What the database has of it.
#[derive(Debug)]
pub struct Loaded {
    /// The end of the log.
    pub head: Head,
    /// The jobs that exist of those named, and of those asked for in other ways but that they may be claimed. Each once.
    pub jobs: Vec<Job>,
    /// Jobs that may be claimed.
    pub ready: FoundReady,
    /// The types that exist of those named.
    pub types: Vec<String>,
    /// Of the jobs, those that are kept no longer; of each status those that ended first.
    pub expired: Vec<JobId>,
    /// What the events of those of them that may go at once take, about, in bytes.
    pub sizes: HashMap<JobId, i64>,
    /// Where jobs that are kept no longer were asked for, the next events of one that is gone.
    pub slice: Option<Slice>,
    /// What happened to those of them of which the series may still tell, as far as their events are within the bounds: those
    /// events in order, but for progress.
    pub histories: HashMap<JobId, Vec<Milestone>>,
    /// Where jobs that are kept no longer were asked for, how many jobs the types of all these have.
    pub populations: HashMap<Arc<str>, i64>,
    /// When the next of the finished jobs that are still kept ends to be so.
    pub next_expiry: Option<Time>,
    /// Of the jobs, those that are due.
    pub due: Vec<JobId>,
    /// When the next of the others is due, if jobs that are were asked for.
    pub next_due: Option<Time>,
    /// Of the jobs, those that were dated by a clock that was ahead.
    pub misdated: Vec<JobId>,
    /// What was brought in before of the jobs of which that was asked.
    pub marks: HashMap<JobId, Mark>,
    /// The keys of new jobs were taken to be new: where one is not, writing fails.
    pub assumes_new_keys: bool,
    /// What events took, in bytes, that were left of such of them as had gone: the same transaction has removed them.
    pub cleared: i64,
}

impl Loaded {
    /// A log's end, and types, and nothing else.
    pub(crate) fn end(head: Head, types: Vec<String>) -> Self {
        Self {
            head,
            types,
            jobs: Vec::new(),
            ready: FoundReady::default(),
            expired: Vec::new(),
            sizes: HashMap::new(),
            slice: None,
            histories: HashMap::new(),
            populations: HashMap::new(),
            next_expiry: None,
            due: Vec::new(),
            next_due: None,
            misdated: Vec::new(),
            marks: HashMap::new(),
            assumes_new_keys: false,
            cleared: 0,
        }
    }
}

/// What a batch changes in one org.
#[derive(Debug, Default)]
pub struct Changes {
    /// The new head; `None` if nothing changed.
    pub head: Option<Head>,
    /// Jobs that are new.
    pub created: Vec<Job>,
    /// Jobs that were there and have changed, as they are now. Each once.
    pub changed: Vec<Changed>,
    /// Jobs that go, with their events.
    pub removed: Vec<Job>,
    /// Those of them whose events stay for now.
    pub remaining: HashSet<JobId>,
    /// Events that go, of a job that is gone already.
    pub removed_slice: Option<Slice>,
    /// When to look again for finished jobs that are kept no longer, if that is known now.
    pub next_retention: Option<Time>,
    /// What became known of when jobs are due.
    pub next_due: Option<NextDue>,
    /// The payloads of those that are new and have one.
    pub payloads: Vec<NewPayload>,
    /// New events, in the order of `seq`.
    pub events: Vec<Arc<JobEvent>>,
    /// By how much the statistics of each type change.
    pub tallies: BTreeMap<Arc<str>, Tally>,
    /// What the log loses with the jobs that go.
    pub removed_flow: RemovedFlow,
    /// Types whose last job goes: the head counts them no more.
    pub forgotten: Vec<Arc<str>>,
    /// The batch's time, if it is the first of its minute: what is too old of the series may go.
    pub new_minute: Option<Time>,
}

/// Of so many bytes a payload may be to lie with its job's first event.
pub const MAX_SMALL_PAYLOAD: usize = 512;

/// A payload that is to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPayload {
    /// Of which job.
    pub job: JobId,
    /// As it was given.
    pub json: Json,
    /// `seq` of the job's first event, if it is to lie with that ([`Job::payload_recorded_at`]).
    pub seq: Option<i64>,
}

impl Changes {
    /// Payloads that are to lie with events, by `seq`.
    pub(super) fn small_payloads(&self) -> HashMap<i64, &Json> {
        self.payloads.iter().filter_map(|payload| Some((payload.seq?, &payload.json))).collect()
    }

    /// Payloads that get rows of their own.
    pub(super) fn large_payloads(&self) -> impl Iterator<Item = &NewPayload> {
        self.payloads.iter().filter(|payload| payload.seq.is_none())
    }

    /// What it writes of its callers' texts, payloads and results, about, in bytes.
    pub fn text_bytes(&self) -> usize {
        const LABEL: usize = 2 << 10;
        let events = self.events.iter().map(|event| event.weight());
        // A job's labels have rows of their own, too, each at its place in two trees: where few are alike, on pages of its own.
        let created = self.created.iter().map(|job| 2 * job.text_bytes() + LABEL * job.spec.labels.len());
        let changed = self.changed.iter().map(|changed| changed.job.text_bytes());
        let payloads = self.payloads.iter().map(|payload| payload.json.len());
        events.chain(created).chain(changed).chain(payloads).sum()
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        !self.is_recorded() && self.next_retention.is_none() && self.next_due.is_none() && self.removed_slice.is_none()
    }

    /// True if anything of the log or its jobs changes, which leaves a record.
    pub fn is_recorded(&self) -> bool {
        self.head.is_some() || !self.changed.is_empty()
    }
}

/// When an org's jobs are to be looked at for what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextDue {
    /// No later than this, whatever is on record.
    By(Time),
    /// Then, and not before; `None`: nothing waits for its time.
    At(Option<Time>),
}

/// Jobs by status, or a change of such counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatusCounts([i64; JobStatus::ALL.len()]);

impl StatusCounts {
    /// All together.
    pub fn total(&self) -> i64 {
        self.0.iter().sum()
    }

    /// Counts in the order of [`JobStatus::ALL`].
    pub const fn new(counts: [i64; JobStatus::ALL.len()]) -> Self {
        Self(counts)
    }

    /// The count of one status.
    pub const fn get(&self, status: JobStatus) -> i64 {
        self.0[status as usize]
    }

    /// Adds to the count of one status.
    pub const fn add(&mut self, status: JobStatus, n: i64) {
        self.0[status as usize] += n;
    }

    /// Adds counts status by status.
    pub fn add_all(&mut self, other: &Self) {
        for status in JobStatus::ALL {
            self.add(status, other.get(status));
        }
    }
}
