//! Decides a batch of commands on one org's log: pure code between loading and writing.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::{
    LedgerError,
    command::{Command, Create, Removed, Reply},
};
use crate::{
    domain::{
        clock::Time,
        event::JobEvent,
        id::{JobId, OrgId},
        job::Job,
        status::JobStatus,
        transition::{Tick, Transition},
    },
    store::{Changes, Expired, Head, Loaded, Needs, Retention},
};

/// Jobs that one batch removes, at most.
const REMOVED_JOBS: usize = 500;
/// Events that one batch removes with their jobs, at most; or those of one job.
const REMOVED_EVENTS: i64 = 10_000;
/// A job with more events than this is kept: removing them would take longer than a batch may.
const REMOVABLE_EVENTS: i64 = 200_000;
/// The least and the longest wait between two looks for what an org no longer keeps.
const LEAST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// What the commands of a batch name.
pub(super) fn needs<'a>(commands: impl IntoIterator<Item = &'a Command>) -> Needs {
    let (mut jobs, mut keys, mut types, mut expired) = (HashSet::new(), HashSet::new(), HashSet::new(), None);
    for command in commands {
        match command {
            Command::Create(create) => {
                types.insert(Arc::clone(&create.spec.job_type));
                if let Some(idempotency) = &create.spec.idempotency {
                    keys.insert(Arc::clone(&idempotency.key));
                }
            }
            Command::Apply { job, .. } => {
                jobs.insert(*job);
            }
            Command::Retain(retention) => expired = Some(Expired { retention: *retention, limit: REMOVED_JOBS }),
        }
    }
    Needs {
        jobs: jobs.into_iter().collect(),
        keys: keys.into_iter().collect(),
        types: types.into_iter().collect(),
        expired,
    }
}

/// What became of a batch: an answer for each command in order, and what to write before any of them is given.
pub(super) struct Decision {
    pub(super) replies: Vec<Result<Reply, LedgerError>>,
    pub(super) changes: Changes,
}

/// Decides the commands in order. Each sees what those before it did; an error is its caller's alone.
pub(super) fn decide<'a>(
    org: OrgId,
    commands: impl IntoIterator<Item = &'a Command>,
    loaded: Loaded,
    clock: Time,
    max_types: usize,
) -> Decision {
    let mut log = Log::new(org, loaded, clock, max_types);
    let replies = commands.into_iter().map(|command| log.decide(command)).collect();
    Decision { replies, changes: log.finish() }
}

/// The part of an org's log that a batch touches.
struct Log {
    org: OrgId,
    now: Time,
    head: Head,
    max_types: usize,
    jobs: HashMap<JobId, Job>,
    keys: HashMap<Arc<str>, JobId>,
    types: HashSet<Arc<str>>,
    /// Jobs that may be kept no longer, and when the next one may.
    expired: Vec<JobId>,
    next_expiry: Option<Time>,
    created: HashSet<JobId>,
    /// Where the log ended before: a job with a later `last_seq` has changed.
    loaded_seq: i64,
    changes: Changes,
}

impl Log {
    fn new(org: OrgId, loaded: Loaded, clock: Time, max_types: usize) -> Self {
        let keys = loaded
            .jobs
            .iter()
            .filter_map(|job| Some((Arc::clone(&job.spec.idempotency.as_ref()?.key), job.id)))
            .collect();
        Self {
            org,
            // `recorded_at` never falls along `seq`, whatever the clock does.
            now: loaded.head.recorded_at.map_or(clock, |last| last.max(clock)),
            head: loaded.head,
            max_types,
            keys,
            jobs: loaded.jobs.into_iter().map(|job| (job.id, job)).collect(),
            types: loaded.types.into_iter().map(Arc::from).collect(),
            expired: loaded.expired,
            next_expiry: loaded.next_expiry,
            created: HashSet::new(),
            loaded_seq: loaded.head.seq,
            changes: Changes::default(),
        }
    }

    fn decide(&mut self, command: &Command) -> Result<Reply, LedgerError> {
        match command {
            Command::Create(create) => self.create(create),
            Command::Apply { job, command } => {
                let current = self.jobs.get(job).ok_or(LedgerError::JobNotFound { job: *job })?;
                let before = current.status;
                let transition = current.apply(command, self.tick())?;
                let reply = Reply::of_job(transition.job.clone(), false);
                if !transition.events.is_empty() {
                    self.append(Some(before), transition);
                }
                Ok(reply)
            }
            Command::Retain(retention) => Ok(Reply::Removed(self.retain(retention))),
        }
    }

    fn create(&mut self, create: &Create) -> Result<Reply, LedgerError> {
        if let Some(wanted) = &create.spec.idempotency
            && let Some(existing) = self.keys.get(&wanted.key).and_then(|id| self.jobs.get(id))
        {
            let same = existing.spec.idempotency.as_ref().is_some_and(|held| held.digest == wanted.digest);
            return if same {
                Ok(Reply::of_job(existing.clone(), true))
            } else {
                Err(LedgerError::IdempotencyKeyReused { existing: existing.id })
            };
        }
        if !self.types.contains(&create.spec.job_type) {
            if self.head.types >= self.max_types as i64 {
                return Err(LedgerError::TooManyTypes { limit: self.max_types });
            }
            self.head.types += 1;
            self.types.insert(Arc::clone(&create.spec.job_type));
        }
        let transition = Job::create(create.id, self.org, Arc::clone(&create.spec), create.scheduled_at, self.tick());
        let job = transition.job.clone();
        if let Some(idempotency) = &job.spec.idempotency {
            self.keys.insert(Arc::clone(&idempotency.key), job.id);
        }
        if let Some(payload) = &create.payload {
            self.changes.payloads.push((job.id, payload.clone()));
        }
        self.created.insert(job.id);
        self.append(None, transition);
        Ok(Reply::of_job(job, false))
    }

    /// Removes finished jobs that are kept no longer. A job that this batch has changed is judged as it is now.
    fn retain(&mut self, retention: &Retention) -> Removed {
        let candidates = std::mem::take(&mut self.expired);
        let mut has_more = candidates.len() >= REMOVED_JOBS;
        let (mut jobs, mut events) = (0, 0);
        for id in candidates {
            let Some(job) = self.jobs.get(&id) else { continue };
            let expires_at =
                retention.get(job.status).zip(job.finished_at).map(|(keep, finished_at)| finished_at + keep);
            if expires_at.is_none_or(|at| at >= self.now) {
                continue;
            }
            if job.last_job_seq > REMOVABLE_EVENTS {
                tracing::warn!(org_id = %self.org, job_id = %id, events = job.last_job_seq, "kept: it has too many events");
                continue;
            }
            events += job.last_job_seq;
            if events > REMOVED_EVENTS && jobs > 0 {
                has_more = true;
                break;
            }
            jobs += 1;
            self.remove(id);
        }
        // Where none could be removed, looking again at once would find the same.
        has_more &= jobs > 0;
        self.changes.next_due = retention.shortest().map(|keep| {
            if has_more {
                return self.now;
            }
            // What finishes from now on expires after the shortest time, at the earliest.
            let next = self.next_expiry.map_or(self.now + keep, |next| next.min(self.now + keep));
            next.max(self.now + (keep / 100).clamp(LEAST_WAIT, LONGEST_WAIT))
        });
        Removed { jobs, has_more }
    }

    fn remove(&mut self, id: JobId) {
        let Some(job) = self.jobs.remove(&id) else { return };
        if let Some(idempotency) = &job.spec.idempotency {
            self.keys.remove(&idempotency.key);
        }
        self.head.floor = self.head.floor.max(job.last_seq + 1);
        self.changes.counts.entry(Arc::clone(&job.spec.job_type)).or_default().add(job.status, -1);
        self.changes.removed.push(job);
    }

    fn tick(&self) -> Tick {
        Tick { now: self.now, next_seq: self.head.seq + 1 }
    }

    /// Appends a transition's events to the log.
    fn append(&mut self, before: Option<JobStatus>, transition: Transition) {
        let Transition { job, events } = transition;
        self.head.seq += events.len() as i64;
        self.head.recorded_at = Some(self.now);
        let counts = self.changes.counts.entry(Arc::clone(&job.spec.job_type)).or_default();
        if let Some(before) = before {
            counts.add(before, -1);
        }
        counts.add(job.status, 1);
        self.changes.events.extend(events.into_iter().map(Arc::<JobEvent>::new));
        self.jobs.insert(job.id, job);
    }

    fn finish(mut self) -> Changes {
        if !self.changes.events.is_empty() || !self.changes.removed.is_empty() {
            self.changes.head = Some(self.head);
            let written = self.jobs.into_values().filter(|job| job.last_seq > self.loaded_seq);
            (self.changes.created, self.changes.changed) = written.partition(|job| self.created.contains(&job.id));
            // In the order of the table: neighbours in the database are written one after the other.
            self.changes.created.sort_unstable_by_key(|job| job.id);
            self.changes.changed.sort_unstable_by_key(|job| job.id);
        }
        self.changes
    }
}
