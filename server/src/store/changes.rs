//! The inputs and outputs of one org's batch: what its commands need, what the database has of that, and what changes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::{
    BulkNeeds, Changed, ErasureNeeds, Expired, FoundBulk, FoundErasures, FoundReady, Head, Ready, RemovedFlow, Slice,
    Tally, Unblanked,
};
use crate::domain::{
    bulk::BulkOperation,
    clock::Time,
    event::{JobEvent, Position},
    flow::Milestone,
    id::{Digest, JobId},
    job::{Job, Labels},
    job_type::{OrgSettings, TypeSettings},
    json::Json,
    org_event::{LogEvent, OrgEvent},
    status::JobStatus,
    transition::Mark,
};

/// What the commands of a batch need from the database.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Jobs by id.
    pub jobs: Vec<JobId>,
    /// Jobs by idempotency key.
    pub keys: Vec<Arc<str>>,
    /// Types of which jobs are to be created, or whose settings are to be changed.
    pub types: Vec<Arc<str>>,
    /// Types whose jobs are to be counted.
    pub populations: Vec<Arc<str>>,
    /// Finished jobs whose retention time is over.
    pub expired: Option<Expired>,
    /// Jobs that earlier claims with the same `request_id` hold.
    pub held: Vec<HeldBy>,
    /// Jobs that are ready, for claims.
    pub ready: Ready,
    /// At most this many jobs that are due, those first that were due first.
    pub due: Option<usize>,
    /// At most this many jobs whose lease or retry wait was dated by a clock that was ahead, by at most this long.
    pub misdated: Option<(usize, Duration)>,
    /// Bulk operations.
    pub bulk: BulkNeeds,
    /// Events of jobs that are to be erased. Those of the jobs of a bulk operation's step are loaded in any case.
    pub erasures: ErasureNeeds,
    /// Jobs to import, each with the digest of the source's data. Their earlier imports are loaded, and the keys of their
    /// events too if the digest differs.
    pub imports: Vec<(JobId, Digest)>,
}

/// The jobs that an earlier claim of the same worker with the same `request_id` holds: a repeated claim gets them again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldBy {
    /// The worker of the claim.
    pub worker: Arc<str>,
    /// The `request_id` of the claim.
    pub request: Arc<str>,
    /// At most this many jobs.
    pub limit: usize,
}

/// How long finished jobs are kept, by terminal status. Jobs of other statuses are always kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention([Option<Duration>; JobStatus::ALL.len()]);

impl Retention {
    /// How long jobs with this status are kept. `None`: for ever.
    pub const fn get(&self, status: JobStatus) -> Option<Duration> {
        self.0[status as usize]
    }

    /// Removes jobs with this status once they have been finished for this long.
    ///
    /// # Panics
    ///
    /// If the status is not terminal.
    pub const fn set(&mut self, status: JobStatus, keep: Duration) {
        assert!(status.is_terminal(), "only finished jobs are removed");
        self.0[status as usize] = Some(keep);
    }

    /// The shortest retention time of any status. `None` if all jobs are kept for ever.
    pub fn shortest(&self) -> Option<Duration> {
        self.0.iter().flatten().min().copied()
    }

    /// The statuses whose jobs are removed, each with the time before which the jobs must have finished.
    pub fn cutoffs(&self, now: Time) -> impl Iterator<Item = (JobStatus, Time)> {
        let retention = *self;
        JobStatus::ALL.into_iter().filter_map(move |status| Some((status, now - retention.get(status)?)))
    }
}

/// What the database has of a batch's [`Needs`].
#[derive(Debug)]
pub struct Loaded {
    /// The head of the log.
    pub head: Head,
    /// The settings of the org's types.
    pub settings: Arc<OrgSettings>,
    /// The jobs that exist of those needed, each once, except for ready jobs.
    pub jobs: Vec<Job>,
    /// Jobs that are ready, by id, type and claim order.
    pub ready: FoundReady,
    /// The types that exist, of those named.
    pub types: Vec<String>,
    /// Those of `jobs` whose retention time is over. Within a status, the jobs that finished first come first.
    pub expired: Vec<JobId>,
    /// About how many bytes the events take of each expired job that may be removed now.
    pub sizes: HashMap<JobId, i64>,
    /// The next events to remove of a job that is gone, if expired jobs were asked for.
    pub slice: Option<Slice>,
    /// The events of expired jobs that may be removed now and that the series still covers: in order, without progress and
    /// cancel requests.
    pub histories: HashMap<JobId, Vec<Milestone>>,
    /// How many jobs there are of each type that was asked for, and of each type in `jobs` if expired jobs were.
    pub populations: HashMap<Arc<str>, i64>,
    /// When the retention time of the next finished job ends.
    pub next_expiry: Option<Time>,
    /// Those of `jobs` that are due.
    pub due: Vec<JobId>,
    /// When the next job is due that is not due yet, if due jobs were asked for.
    pub next_due: Option<Time>,
    /// Those of `jobs` that were dated by a clock that was ahead.
    pub misdated: Vec<JobId>,
    /// The last import of each job that is imported again.
    pub marks: HashMap<JobId, Mark>,
    /// What there is of the bulk operations that were asked for. The jobs of the next step are among `jobs`, unless it only
    /// counts them.
    pub bulk: FoundBulk,
    /// Events of jobs that are to be erased.
    pub erasures: FoundErasures,
    /// Keys of new jobs were not looked up, but taken to be new. If one exists, writing fails.
    pub assumes_new_keys: bool,
    /// The oldest org events before the floor of the log, if expired jobs were asked for.
    pub outdated: Option<Outdated>,
    /// Bytes of leftover events that this transaction has removed because their removed jobs are imported again.
    pub cleared: i64,
}

impl Loaded {
    /// The head, the settings and the types, and nothing else.
    pub(crate) fn end(head: Head, settings: Arc<OrgSettings>, types: Vec<String>) -> Self {
        Self {
            head,
            settings,
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
            outdated: None,
            bulk: FoundBulk::default(),
            erasures: FoundErasures::default(),
            cleared: 0,
        }
    }
}

/// The changes of one org's batch.
#[derive(Debug, Default)]
pub struct Changes {
    /// The new head. `None` if the log does not change.
    pub head: Option<Head>,
    /// New jobs.
    pub created: Vec<Job>,
    /// Existing jobs that have changed, as they are after the batch. Each once.
    pub changed: Vec<Changed>,
    /// Jobs to remove, with their events.
    pub removed: Vec<Job>,
    /// Those of `removed` whose events are removed by later batches.
    pub remaining: HashSet<JobId>,
    /// Events to remove of a job that is gone already.
    pub removed_slice: Option<Slice>,
    /// When to sweep the org for retention next. `None` leaves the time as it is.
    pub next_retention: Option<Time>,
    /// When to sweep the org for due jobs next. `None` leaves the time as it is.
    pub next_due: Option<NextDue>,
    /// Existing jobs that were edited or erased.
    pub edited: Vec<Edited>,
    /// Events of erased jobs, as they are from now on.
    pub blanked: Vec<JobEvent>,
    /// Erased jobs that have events left to blank, or have none left any more.
    pub unblanked: Vec<Unblanked>,
    /// The payloads of new jobs, and new payloads of edited ones.
    pub payloads: Vec<NewPayload>,
    /// New events, in the order of `seq`.
    pub events: Vec<Arc<JobEvent>>,
    /// New events that are about no single job, in the order of `seq`.
    pub org_events: Vec<Arc<OrgEvent>>,
    /// Types whose settings have changed, with the settings after the batch.
    pub settings: BTreeMap<Arc<str>, TypeSettings>,
    /// Bulk operations that have begun, made progress or ended, as they are after the batch.
    pub bulk: Vec<BulkOperation>,
    /// Org events to remove.
    pub removed_org_events: Option<Outdated>,
    /// How the statistics of each type change.
    pub tallies: BTreeMap<Arc<str>, Tally>,
    /// The flow that the log loses with the removed jobs.
    pub removed_flow: RemovedFlow,
    /// Types whose last job is removed.
    pub forgotten: Vec<Arc<str>>,
    /// The batch's `recorded_at`, if it is the first batch of its minute. Old rows of the series are removed then.
    pub new_minute: Option<Time>,
}

/// Bytes up to which a payload is stored with its job's first event.
pub const MAX_SMALL_PAYLOAD: usize = 512;

/// A payload to store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPayload {
    /// Its job.
    pub job: JobId,
    /// The JSON text as the creator gave it.
    pub json: Json,
    /// `seq` of the job's first event, if the payload is stored with that event ([`Job::payload_recorded_at`]).
    pub seq: Option<i64>,
}

/// An existing job that was edited or erased: its row is written whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edited {
    /// The job.
    pub job: JobId,
    /// `seq` of its first event.
    pub created_seq: i64,
    /// The labels that the database has of it, if they were changed.
    pub labels_before: Option<Labels>,
    /// Its payload was changed: a row with the payload before it is to be removed.
    pub has_other_payload: bool,
    /// It was erased. Its key is free from now on.
    pub is_erased: bool,
}

/// Org events before the floor of the log: the oldest ones, up to a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outdated {
    /// `seq` of the last of them.
    pub last: i64,
    /// How many bytes they take.
    pub bytes: i64,
}

/// Org events that one batch removes at most.
pub(super) const OUTDATED_AT_ONCE: i64 = 1_000;

impl Changes {
    /// The batch's first event.
    pub(super) fn first(&self) -> Option<Position> {
        let of_jobs = self.events.first();
        let of_jobs = of_jobs.map(|event| Position { seq: event.seq, recorded_at: event.recorded_at });
        let of_org = self.org_events.first();
        let of_org = of_org.map(|event| Position { seq: event.seq, recorded_at: event.recorded_at });
        of_jobs.into_iter().chain(of_org).min_by_key(|first| first.seq)
    }

    /// The batch's events, in the order of `seq`.
    pub fn log(&self) -> Vec<LogEvent> {
        let of_jobs = self.events.iter().map(|event| LogEvent::Job(Arc::clone(event)));
        let mut events: Vec<_> = of_jobs.collect();
        if !self.org_events.is_empty() {
            events.extend(self.org_events.iter().map(|event| LogEvent::Org(Arc::clone(event))));
            events.sort_by_key(LogEvent::seq);
        }
        events
    }

    /// Payloads that are stored with events, by the `seq` of the event.
    pub(super) fn small_payloads(&self) -> HashMap<i64, &Json> {
        self.payloads.iter().filter_map(|payload| Some((payload.seq?, &payload.json))).collect()
    }

    /// Payloads that are stored in rows of their own.
    pub(super) fn large_payloads(&self) -> impl Iterator<Item = &NewPayload> {
        self.payloads.iter().filter(|payload| payload.seq.is_none())
    }

    /// About how many bytes of callers' texts, payloads and results the batch writes.
    pub fn text_bytes(&self) -> usize {
        const LABEL: usize = 2 << 10;
        let events = self.events.iter().map(|event| event.weight());
        // Labels are stored in the job's row, and in a row each. Such a row changes a page of its own if labels differ.
        let created = self.created.iter().map(|job| 2 * job.text_bytes() + LABEL * job.spec.labels.len());
        let changed = self.changed.iter().map(|changed| changed.job.text_bytes());
        let payloads = self.payloads.iter().map(|payload| payload.json.len());
        let of_org = self.org_events.iter().map(|event| event.weight());
        let of_org = of_org.chain(self.blanked.iter().map(JobEvent::weight));
        events.chain(created).chain(changed).chain(payloads).chain(of_org).sum()
    }

    /// True if the batch writes nothing.
    pub fn is_empty(&self) -> bool {
        let removes = self.removed_slice.is_some() || self.removed_org_events.is_some();
        let others = removes || !self.bulk.is_empty() || !self.unblanked.is_empty();
        !self.is_recorded() && self.next_retention.is_none() && self.next_due.is_none() && !others
    }

    /// True if the batch erases jobs, or what erasures have left.
    pub fn erases(&self) -> bool {
        !self.unblanked.is_empty() || self.edited.iter().any(|edited| edited.is_erased)
    }

    /// True if jobs or types are gone afterwards, or what events have said. A state from before can't catch up.
    pub(super) fn is_removing(&self) -> bool {
        !self.removed.is_empty() || !self.forgotten.is_empty() || self.erases()
    }

    /// True if the log or a job changes. Such a batch leaves a record.
    pub fn is_recorded(&self) -> bool {
        self.head.is_some() || !self.changed.is_empty()
    }
}

/// How a batch changes the time at which its org is swept for due jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextDue {
    /// Lowers the time to this one, if it is later or unset.
    By(Time),
    /// Sets the time. `None`: no job is due at any time.
    At(Option<Time>),
}

/// Counts of jobs by status, or a change of such counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatusCounts([i64; JobStatus::ALL.len()]);

impl StatusCounts {
    /// The sum of all counts.
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
