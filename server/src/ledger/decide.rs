//! Decides a batch of commands on one org's log: pure code between loading and writing.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    LedgerError,
    command::{Command, Create, Reply},
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
    store::{Changes, Head, Loaded, Needs},
};

/// What the commands of a batch name.
pub(super) fn needs<'a>(commands: impl IntoIterator<Item = &'a Command>) -> Needs {
    let (mut jobs, mut keys, mut types) = (HashSet::new(), HashSet::new(), HashSet::new());
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
        }
    }
    Needs { jobs: jobs.into_iter().collect(), keys: keys.into_iter().collect(), types: types.into_iter().collect() }
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
                let reply = Reply { job: transition.job.clone(), deduplicated: false };
                if !transition.events.is_empty() {
                    self.append(Some(before), transition);
                }
                Ok(reply)
            }
        }
    }

    fn create(&mut self, create: &Create) -> Result<Reply, LedgerError> {
        if let Some(wanted) = &create.spec.idempotency
            && let Some(existing) = self.keys.get(&wanted.key).and_then(|id| self.jobs.get(id))
        {
            let same = existing.spec.idempotency.as_ref().is_some_and(|held| held.digest == wanted.digest);
            return if same {
                Ok(Reply { job: existing.clone(), deduplicated: true })
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
        self.append(None, transition);
        Ok(Reply { job, deduplicated: false })
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
        if !self.changes.events.is_empty() {
            self.changes.head = Some(self.head);
            self.changes.jobs = self.jobs.into_values().filter(|job| job.last_seq > self.loaded_seq).collect();
            // In the order of the table, which is that in which rows are locked where rows are.
            self.changes.jobs.sort_unstable_by_key(|job| job.id);
        }
        self.changes
    }
}
