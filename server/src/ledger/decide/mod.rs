//! Decides a batch of commands on one org's log: pure code between loading and writing.

mod bulk;
mod choose;
mod edit;
mod erase;
mod import;
mod job_type;
mod needs;
mod quota;
mod retain;
mod sweep;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::Entry},
    sync::Arc,
    time::Instant,
};

use uuid::Uuid;

pub(super) use self::{
    choose::{Chosen, choose},
    needs::needs,
    quota::Quotas,
};
use super::{
    LedgerError,
    claim_waiters::WOKEN_BY_ONE,
    clock_watch::ClockState,
    command::{Command, Create, JobReply},
    pending::Pending,
    submission::Submission,
};
use crate::{
    domain::{
        bulk::BulkOperation,
        clock::Time,
        event::{ACTOR_LEDGER, JobEvent},
        flow::{Milestone, Timeline, Width},
        id::{JobId, OrgId},
        job::Job,
        job_type::OrgSettings,
        lease::LeaseSecret,
        status::JobStatus,
        transition::{self, Mark, Tick, Transition},
    },
    store::{
        BulkStep, Changed, Changes, Differs, FoundErasures, Head, Loaded, MAX_SMALL_PAYLOAD, NewPayload, NextDue,
        Outdated, Slice, Stock, Tally, told_since,
    },
};

/// What a job was before its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// It did not exist.
    Nothing,
    /// Ready to be claimed.
    Ready,
    /// Waiting for its time.
    Scheduled,
    /// In any other status.
    Other,
}

/// What a batch has done to a job.
#[derive(Debug, Clone, Copy)]
struct Touched {
    before: Before,
    differs: Differs,
    /// The job is due earlier than it was.
    is_due_sooner: bool,
}

impl Before {
    fn of(job: &Job) -> Self {
        match (job.is_ready(), job.is_scheduled()) {
            (true, _) => Self::Ready,
            (_, true) => Self::Scheduled,
            _ => Self::Other,
        }
    }
}

/// Inputs of a decision besides the loaded data. Equal inputs give equal decisions.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    /// The database's clock.
    pub(super) clock: Time,
    /// This process's clock, for measuring how long something took here.
    pub(super) began: Instant,
    /// What is known about the database's clock.
    pub(super) trust: ClockState,
    /// The nonces of new leases are derived from this.
    pub(super) secret: LeaseSecret,
    /// Most jobs that claims get, and most due jobs that are changed; `None`: the usual bounds.
    pub(super) most: Option<usize>,
}

/// The outcome of a batch besides its replies: the changes to write before any reply is sent.
pub(super) struct Decision {
    pub(super) changes: Changes,
    /// Jobs that became ready and were not claimed, by type.
    pub(super) ready: BTreeMap<Arc<str>, usize>,
    /// A create was refused though its idempotency key may exist: the batch has to look the key up and decide again.
    pub(super) doubts_keys: bool,
}

/// The stock of an org once events of this many bytes are removed.
fn without(stock: Stock, bytes: i64) -> Stock {
    Stock { bytes: stock.bytes - bytes, ..stock }
}

/// The part of an org's log that a batch touches.
struct Log {
    org: OrgId,
    /// Actor of the command that is being decided.
    by: Option<Arc<str>>,
    /// The database's clock.
    now: Time,
    /// `recorded_at` of the batch's events.
    recorded_at: Time,
    began: Instant,
    trust: ClockState,
    secret: LeaseSecret,
    most: Option<usize>,
    head: Head,
    loaded_head: Head,
    quotas: Quotas,
    assumes_new_keys: bool,
    /// A create was refused though its idempotency key may exist.
    doubts_keys: bool,
    jobs: HashMap<JobId, Job>,
    keys: HashMap<Arc<str>, JobId>,
    types: HashSet<Arc<str>>,
    settings: Arc<OrgSettings>,
    /// Types whose pauses the batch has ended.
    resumed: BTreeSet<Arc<str>>,
    outdated: Option<Outdated>,
    /// Bulk operations that the batch knows, and how many are under way.
    operations: HashMap<Uuid, BulkOperation>,
    open_operations: usize,
    /// The next step of the oldest one.
    step: Option<BulkStep>,
    /// The operation whose step is being decided.
    operation: Option<Uuid>,
    /// The batch has several commands.
    has_company: bool,
    /// When the org has to be swept, if that is sooner than its jobs are due.
    wake_at: Option<Time>,
    /// Jobs leased to claims with a `request_id`, by worker and `request_id`.
    held: HashMap<(Arc<str>, Arc<str>), Vec<JobId>>,
    /// Jobs that are due, and when the next other job is.
    due: Vec<JobId>,
    next_due: Option<Time>,
    /// Jobs that the clock postponed while it was ahead.
    misdated: Vec<JobId>,
    /// Jobs whose retention may be over, and when the next of the others expires.
    expired: Vec<JobId>,
    sizes: HashMap<JobId, i64>,
    slice: Option<Slice>,
    /// The stored events of jobs that are to be erased, and what earlier erasures have left.
    erasures: FoundErasures,
    histories: HashMap<JobId, Vec<Milestone>>,
    /// Earlier imports of the jobs to be imported.
    marks: HashMap<JobId, Mark>,
    /// A finished job was imported. Its retention may be over at once.
    has_brought_ended: bool,
    /// How many jobs each type of an expired job had before this batch.
    populations: HashMap<Arc<str>, i64>,
    /// Since when the series covers jobs.
    told_since: Time,
    next_expiry: Option<Time>,
    /// Jobs that the batch changed, each with what it was.
    touched: HashMap<JobId, Touched>,
    changes: Changes,
}

impl Log {
    fn new(org: OrgId, loaded: Loaded, inputs: Inputs, quotas: Quotas) -> Self {
        let keys = loaded
            .jobs
            .iter()
            .filter_map(|job| Some((Arc::clone(&job.spec.idempotency.as_ref()?.key), job.id)))
            .collect();
        let mut held: HashMap<_, Vec<_>> = HashMap::new();
        for job in &loaded.jobs {
            if let Some((worker, request)) =
                job.lease.as_ref().and_then(|lease| Some((&lease.worker, lease.request.as_ref()?)))
            {
                held.entry((Arc::clone(worker), Arc::clone(request))).or_default().push(job.id);
            }
        }
        Self {
            org,
            by: None,
            now: inputs.clock,
            // Never falls along `seq`, even if the clock is set back.
            recorded_at: loaded.head.recorded_at.map_or(inputs.clock, |last| last.max(inputs.clock)),
            began: inputs.began,
            trust: inputs.trust,
            secret: inputs.secret,
            most: inputs.most,
            head: Head { stock: without(loaded.head.stock, loaded.cleared), ..loaded.head },
            loaded_head: loaded.head,
            quotas,
            assumes_new_keys: loaded.assumes_new_keys,
            doubts_keys: false,
            keys,
            jobs: loaded.jobs.into_iter().map(|job| (job.id, job)).collect(),
            types: loaded.types.into_iter().map(Arc::from).collect(),
            settings: loaded.settings,
            resumed: BTreeSet::new(),
            outdated: loaded.outdated,
            operations: loaded.bulk.operations.into_iter().map(|bulk| (bulk.request.id, bulk)).collect(),
            open_operations: loaded.bulk.open,
            step: loaded.bulk.step,
            operation: None,
            has_company: false,
            wake_at: None,
            held,
            due: loaded.due,
            next_due: loaded.next_due,
            misdated: loaded.misdated,
            expired: loaded.expired,
            sizes: loaded.sizes,
            slice: loaded.slice,
            erasures: loaded.erasures,
            histories: loaded.histories,
            populations: loaded.populations,
            marks: loaded.marks,
            has_brought_ended: false,
            told_since: told_since(&loaded.head),
            next_expiry: loaded.next_expiry,
            touched: HashMap::new(),
            changes: Changes::default(),
        }
    }

    /// Decides a command, except claims and jobs given back: these are decided after all others.
    fn decide(&mut self, Pending { command, actor, .. }: &mut Pending) {
        self.by.clone_from(actor);
        match command {
            Submission::Job(Command::Create(create), reply) => reply.decide(self.create(create)),
            Submission::Job(Command::Apply { job, command }, reply) => {
                let applied = self.apply(*job, command);
                let is_erasure = matches!(**command, transition::Command::Erase(_)) && applied.is_ok();
                let is_unfinished = is_erasure && self.blank_next_of(*job);
                reply.decide(applied.map(|job| JobReply { is_unfinished, ..JobReply::of(job) }));
            }
            Submission::Type(command, reply) => reply.decide(self.set_type(command)),
            Submission::Bulk(command, reply) => reply.decide(self.bulk(command)),
            Submission::Import(import, reply) => reply.decide(self.import(import)),
            Submission::Explain(..) | Submission::Claim(..) | Submission::GiveBack(_) => {}
            Submission::Sweep(asked, reply) => {
                let sweep = asked.sweep(self.began, self.trust.jump);
                reply.decide(Ok(self.sweep(sweep)));
            }
            Submission::Redate(by, reply) => reply.decide(Ok(self.redate(*by))),
            Submission::Retain(retention, reply) => reply.decide(Ok(self.retain(retention))),
        }
    }

    /// Decides a command on a job. Returns the job after it.
    fn apply(&mut self, job: JobId, command: &transition::Command) -> Result<Job, LedgerError> {
        let current = self.jobs.get(&job).ok_or(LedgerError::JobNotFound { job })?;
        let transition = current.apply(&self.within_quota(command), self.tick())?;
        self.check_quota(&transition)?;
        let (status, before, timeline) = (current.status, Before::of(current), Timeline::of(current));
        let erased = matches!(command, transition::Command::Erase(_)).then(|| current.clone());
        let job = transition.job.clone();
        if let transition::Command::Edit(edit) = command {
            self.note_edit(&transition, edit);
        }
        let is_new = self.touched.get(&job.id).is_some_and(|touched| touched.before == Before::Nothing);
        if transition.is_changed {
            self.append(Some(status), before, timeline, transition);
            erased.into_iter().for_each(|erased| self.note_erasure(&erased, is_new));
        }
        Ok(job)
    }

    fn create(&mut self, create: &Create) -> Result<JobReply, LedgerError> {
        if let Some(wanted) = &create.spec.idempotency
            && let Some(existing) = self.keys.get(&wanted.key).and_then(|id| self.jobs.get(id))
        {
            let held = existing.spec.idempotency.as_ref().and_then(|held| held.digest);
            // An imported key has no digest, so only the job's type can be compared.
            let is_same = match held {
                Some(digest) => wanted.digest == Some(digest),
                None => existing.spec.job_type == create.spec.job_type,
            };
            return if is_same {
                Ok(JobReply { deduplicated: true, ..JobReply::of(existing.clone()) })
            } else {
                Err(LedgerError::IdempotencyKeyReused { existing: existing.id })
            };
        }
        let has_room = self.add_to_stock(1, u64::from(create.spec.payload_bytes));
        self.doubts_keys |= has_room.is_err() && self.assumes_new_keys && create.spec.idempotency.is_some();
        has_room?;
        self.add_type(&create.spec.job_type)?;
        let mut transition =
            Job::create(create.id, self.org, Arc::clone(&create.spec), create.scheduled_at, self.tick());
        if let Some(payload) = &create.payload {
            let job = &mut transition.job;
            let is_small = payload.len() <= MAX_SMALL_PAYLOAD;
            job.payload_recorded_at = is_small.then_some(self.recorded_at);
            let seq = is_small.then_some(job.created_seq);
            self.changes.payloads.push(NewPayload { job: job.id, json: payload.clone(), seq });
        }
        let job = transition.job.clone();
        if let Some(idempotency) = &job.spec.idempotency {
            self.keys.insert(Arc::clone(&idempotency.key), job.id);
        }
        self.append(None, Before::Nothing, Timeline::default(), transition);
        Ok(JobReply::of(job))
    }

    /// True if the org does not have the type. Fails if it may not have another.
    fn is_new_type(&self, job_type: &Arc<str>) -> Result<bool, LedgerError> {
        let is_new = !self.types.contains(job_type);
        if is_new && self.head.types >= self.quotas.types as i64 {
            return Err(LedgerError::TooManyTypes { limit: self.quotas.types });
        }
        Ok(is_new)
    }

    fn add_type(&mut self, job_type: &Arc<str>) -> Result<(), LedgerError> {
        if self.is_new_type(job_type)? {
            self.head.types += 1;
            self.types.insert(Arc::clone(job_type));
        }
        Ok(())
    }

    fn tick(&self) -> Tick {
        Tick { now: self.now, recorded_at: self.recorded_at, next_seq: self.head.seq + 1, secret: self.secret }
    }

    /// Applies a transition: replaces the job and appends its events to the log.
    fn append(&mut self, status: Option<JobStatus>, before: Before, mut timeline: Timeline, transition: Transition) {
        let Transition { job, mut events, .. } = transition;
        if let Some(by) = &self.by {
            for event in events.iter_mut().filter(|event| &*event.actor != ACTOR_LEDGER) {
                event.actor = Arc::clone(by);
            }
        }
        events.iter_mut().for_each(|event| event.bulk_operation = self.operation);
        if !events.is_empty() {
            self.head.seq += events.len() as i64;
            self.head.recorded_at = Some(self.recorded_at);
        }
        let scheduled = i64::from(job.is_scheduled()) - i64::from(before == Before::Scheduled);
        if !events.is_empty() || scheduled != 0 {
            let tally = self.tally(&job);
            if let Some(status) = status {
                tally.counts.add(status, -1);
            }
            tally.counts.add(job.status, 1);
            tally.scheduled += scheduled;
            for event in &events {
                timeline.follow(&Milestone::of(event), &mut tally.flow);
            }
        }
        if before != Before::Nothing
            && let Some(known) = self.jobs.get(&job.id)
        {
            self.head.stock.bytes += job.weight() - known.weight();
        }
        self.head.stock.bytes += events.iter().map(|event| event.weight() as i64).sum::<i64>();
        if before == Before::Nothing {
            self.head.stock.jobs += 1;
            self.head.stock.bytes += job.weight();
        }
        self.changes.events.extend(events.into_iter().map(Arc::<JobEvent>::new));
        let touched = self.touched.entry(job.id).or_insert(Touched {
            before,
            differs: Differs::Nowhere,
            is_due_sooner: before == Before::Nothing,
        });
        match self.jobs.entry(job.id) {
            Entry::Occupied(mut known) => {
                touched.differs = touched.differs.max(Differs::between(known.get(), &job));
                let was_due = known.get().due_at;
                touched.is_due_sooner |= job.due_at.is_some_and(|due| was_due.is_none_or(|was_due| due < was_due));
                known.insert(job);
            }
            Entry::Vacant(place) => {
                place.insert(job);
            }
        }
    }

    /// The batch's changes to the statistics of a job's type.
    fn tally(&mut self, job: &Job) -> &mut Tally {
        self.changes.tallies.entry(Arc::clone(&job.spec.job_type)).or_default()
    }

    /// Counts the jobs that became ready and still are, and raises `ready_gen` if there are any. A type that was resumed counts
    /// as if one claim had left jobs of it: claims that find more wake others.
    fn count_ready(&mut self) -> BTreeMap<Arc<str>, usize> {
        let mut ready = self.ready_now();
        ready.extend(self.resumed.iter().map(|name| (Arc::clone(name), WOKEN_BY_ONE)));
        if !ready.is_empty() {
            self.head.ready_gen += 1;
        }
        ready
    }

    /// Jobs that claims can get now and that were not ready before this batch, by type.
    fn ready_now(&self) -> BTreeMap<Arc<str>, usize> {
        let mut ready: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        let became = self.touched.iter().filter(|(_, touched)| touched.before != Before::Ready);
        let is_ready = |job: &&Job| job.is_ready() && !self.settings.is_paused(&job.spec.job_type);
        for job in became.filter_map(|(id, _)| self.jobs.get(id)).filter(is_ready) {
            match ready.get_mut(&job.spec.job_type) {
                Some(n) => *n += 1,
                None => {
                    ready.insert(Arc::clone(&job.spec.job_type), 1);
                }
            }
        }
        ready
    }

    fn finish(mut self) -> Changes {
        self.forget_types();
        // The tallies are stored with the batch record, which needs a head, even an unchanged one.
        if self.head != self.loaded_head || !self.changes.tallies.is_empty() {
            self.changes.head = Some(self.head);
        }
        if self.has_brought_ended {
            self.changes.next_retention = Some(self.now);
        }
        // The age of the series' buckets goes by the log's time, that of its last event.
        let minute = |head: &Head| head.recorded_at.map(|last| Width::Minute.start(last));
        if minute(&self.head) != minute(&self.loaded_head) {
            self.changes.new_minute = self.head.recorded_at;
        }
        let ends = self.settings.next_end().filter(|_| !self.changes.org_events.is_empty());
        let ends = ends.into_iter().chain(self.wake_at).min();
        self.changes.next_due = match (self.changes.next_due, ends) {
            (Some(NextDue::At(due)), Some(end)) => Some(NextDue::At(Some(due.map_or(end, |due| due.min(end))))),
            (Some(NextDue::By(due)), Some(end)) => Some(NextDue::By(due.min(end))),
            (None, Some(end)) => Some(NextDue::By(end)),
            (due, None) => due,
        };
        if !self.touched.is_empty() {
            let touched = &self.touched;
            for job in self.jobs.into_values() {
                match touched.get(&job.id) {
                    Some(Touched { before: Before::Nothing, .. }) => self.changes.created.push(job),
                    Some(Touched { differs, .. }) => self.changes.changed.push(Changed { job, differs: *differs }),
                    None => {}
                }
            }
            // In the order of the table, so that neighbouring rows are written one after the other.
            self.changes.created.sort_unstable_by_key(|job| job.id);
            self.changes.changed.sort_unstable_by_key(|changed| changed.job.id);
            let changed = self.changes.changed.iter().map(|changed| &changed.job);
            let waiting = self.changes.created.iter().chain(changed);
            let due = |job: &Job| Some((job.due_at?, touched.get(&job.id)?.is_due_sooner));
            let due: Vec<_> = waiting.filter_map(due).collect();
            let of_all = due.iter().map(|(due, _)| *due).min();
            // The due times of the other jobs are already on record.
            let sooner = due.iter().filter(|(_, is_sooner)| *is_sooner).map(|(due, _)| *due).min();
            self.changes.next_due = match (self.changes.next_due, sooner) {
                (Some(NextDue::At(next)), _) => Some(NextDue::At(next.into_iter().chain(of_all).min())),
                (Some(NextDue::By(end)), Some(due)) => Some(NextDue::By(due.min(end))),
                (None, Some(due)) => Some(NextDue::By(due)),
                (next, None) => next,
            };
        }
        self.changes
    }
}
