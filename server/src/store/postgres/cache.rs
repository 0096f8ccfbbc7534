//! What this server has cached of the logs that it writes: where it has left them, and the states of their orgs. A batch that
//! needs nothing else begins there without a query. The last reading of the database's clock is cached too.
//!
//! No decision depends on a cached end: the statement that writes such a batch locks the head first, and fails if the log has
//! moved on. The witnessed records show whether another history has replaced a log.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{SubsecRound as _, TimeDelta};
use parking_lot::{Mutex, MutexGuard};

use super::error::lacks_partition;

use crate::{
    domain::{
        clock::Time,
        id::{LogId, OrgId},
    },
    store::{
        Head, RecordId, StoreError,
        row_writes::Base,
        state::OrgState,
        states::{Left, States},
    },
};

/// Orgs that are cached at most. Beyond that all are dropped, which costs each of them a query.
const MAX_ORGS: usize = 10_000;
/// How long this machine's clock carries on a reading of the database's clock.
const CARRIED: Duration = Duration::from_secs(1);
/// How long an org's batches don't begin from memory after another server has written the log too.
const SHARED: Duration = Duration::from_secs(1);
/// How long an org's idempotency keys are looked up first after one of them was not new.
const KEYS_AGAIN: Duration = Duration::from_secs(1);

pub(super) struct Cache {
    state: Mutex<CacheState>,
    jobs: States,
    log: Mutex<KnownLog>,
    /// A batch found no partition for its events.
    lacks_partition: AtomicBool,
}

/// The id that the database's log had when it was last read.
#[derive(Default)]
struct KnownLog {
    id: Option<LogId>,
    /// Reads of the id are numbered as they begin: the one that found `id`, and the last one.
    read_on: u64,
    turns: u64,
}

#[derive(Default)]
struct CacheState {
    orgs: HashMap<OrgId, Org>,
    reading: Option<Reading>,
}

#[derive(Default)]
struct Org {
    /// Types that exist. A type stays until its last job is removed.
    types: HashSet<Arc<str>>,
    /// The org's count of batches that removed jobs, as of `types`.
    removals: i64,
    /// The log's end, as this server's last batch on it found or left it. `None` while a later commit is undecided.
    end: Option<End>,
    /// The log's last record, as of the last commit that the database confirmed. `None` at the same times.
    confirmed: Option<RecordId>,
    /// The same record, but it stays while a commit is under way.
    witnessed: Option<RecordId>,
    /// Until then other servers are assumed to write this log too.
    shared_until: Option<Instant>,
    /// Until then creates are assumed to use keys that exist.
    keys_again_until: Option<Instant>,
}

impl Org {
    /// Drops the types if jobs were removed since they were cached: some types may have lost their last job.
    fn seen_removals(&mut self, removals: i64) {
        if std::mem::replace(&mut self.removals, removals) != removals {
            self.types.clear();
        }
    }
}

/// Where a log ends, and how far its records are folded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct End {
    pub(super) head: Head,
    pub(super) record: RecordId,
    /// `seq` of the last folded event, and number of the last folded record.
    pub(super) folded_seq: i64,
    pub(super) folded_n: i64,
    /// How many batches have removed jobs.
    pub(super) removals: i64,
    /// The place up to which no row lacks anything.
    pub(super) base: Base,
}

/// A time of the database's clock, and the instant of this machine's clock at which it arrived.
#[derive(Clone, Copy)]
struct Reading {
    heard: Instant,
    time: Time,
}

impl Reading {
    fn carried_on(&self) -> Time {
        // The database's times have microseconds.
        (self.time + self.heard.elapsed()).trunc_subsecs(6)
    }
}

impl Cache {
    pub(super) fn new(fold_after: Duration) -> Self {
        let (state, jobs, log) = (Mutex::default(), States::new(fold_after), Mutex::default());
        Self { state, jobs, log, lacks_partition: AtomicBool::new(false) }
    }

    /// How long the rows of running jobs of an org may be behind. The org's state must have been taken.
    pub(super) fn fold_after(&self, of: &OrgState) -> TimeDelta {
        self.jobs.fold_after(of)
    }

    /// The error of a failed batch. A missing partition is a conflict: the batch is run again once the partition is made.
    pub(super) fn failed(&self, error: sqlx::Error, meaning: fn(sqlx::Error) -> StoreError) -> StoreError {
        if lacks_partition(&error) {
            self.lacks_partition.store(true, Ordering::Relaxed);
            return StoreError::Conflict(error.to_string());
        }
        meaning(error)
    }

    /// True if partitions have to be made first, which is left to the caller. Only the first call says so.
    pub(super) fn takes_partitions(&self) -> bool {
        self.lacks_partition.swap(false, Ordering::Relaxed)
    }

    /// Splits types into those that are cached, and so exist, and the others.
    pub(super) fn part(&self, org: OrgId, types: &[Arc<str>]) -> (Vec<String>, Vec<Arc<str>>) {
        let state = self.state();
        let known = state.orgs.get(&org);
        let (known, unknown): (Vec<_>, Vec<_>) =
            types.iter().cloned().partition(|name| known.is_some_and(|known| known.types.contains(name)));
        (known.iter().map(|name| name.to_string()).collect(), unknown)
    }

    pub(super) fn add_types(&self, org: OrgId, types: impl Iterator<Item = Arc<str>>) {
        let mut types = types.peekable();
        if types.peek().is_some() {
            self.state().org(org).types.extend(types);
        }
    }

    /// Notes the log's end and the clock that a batch has read after it locked the head.
    pub(super) fn found(&self, org: OrgId, found: End, clock: Time) {
        let mut state = self.state();
        state.heard(clock);
        let org = state.org(org);
        org.seen_removals(found.removals);
        let expected = org.end.replace(found);
        if expected.is_some_and(|expected| expected != found) {
            org.shared_until = Some(Instant::now() + SHARED);
        }
    }

    /// Notes that a batch was committed, and left the log at `end`.
    pub(super) fn left(&self, org: OrgId, end: End, jobs: Left, clock: Option<Time>) {
        jobs.committed(&self.jobs);
        let mut state = self.state();
        let org = state.org(org);
        org.seen_removals(end.removals);
        (org.end, org.confirmed, org.witnessed) = (Some(end), Some(end.record), Some(end.record));
        if let Some(clock) = clock {
            state.heard(clock);
        }
    }

    /// Notes that a transaction was committed that had found this last record.
    pub(super) fn confirmed(&self, org: OrgId, last: RecordId) {
        let mut state = self.state();
        let org = state.org(org);
        (org.confirmed, org.witnessed) = (Some(last), Some(last));
    }

    /// The last record known to be in an org's log, unless another history has replaced it.
    pub(super) fn witnessed(&self, org: OrgId) -> Option<RecordId> {
        self.state().orgs.get(&org)?.witnessed
    }

    /// The id of the database's log, as last read.
    pub(super) fn log_id(&self) -> Option<LogId> {
        self.log().id
    }

    /// The number of a read of the log id. Take it before the read.
    pub(super) fn turn(&self) -> u64 {
        let mut log = self.log();
        log.turns += 1;
        log.turns
    }

    /// Notes the log id that the read of this number found. If the id has changed, drops everything that is cached of orgs.
    pub(super) fn has_log(&self, turn: u64, id: LogId) {
        let mut log = self.log();
        if turn < log.read_on {
            // A read that began later has already finished.
            return;
        }
        log.read_on = turn;
        if log.id.replace(id).is_some_and(|was| was != id) {
            self.state().orgs.clear();
            self.jobs.clear();
        }
    }

    /// True if the log up to this record, its last, is as durable as commits are.
    pub(super) fn is_confirmed(&self, org: OrgId, last: RecordId) -> bool {
        self.state().orgs.get(&org).is_some_and(|org| org.confirmed == Some(last))
    }

    /// Notes that a batch is about to be committed. Until the commit is known to have happened, the org's end is unknown. Its
    /// types and the witnessed record stay.
    pub(super) fn committing(&self, org: OrgId) {
        let mut state = self.state();
        let org = state.org(org);
        (org.end, org.confirmed) = (None, None);
    }

    /// Notes that a batch was not committed: caches the org's state as it was before.
    pub(super) fn reverted(&self, jobs: Left) {
        jobs.reverted(&self.jobs);
    }

    /// Notes that the log was not where this server had left it.
    pub(super) fn missed(&self, org: OrgId) {
        self.state().org(org).shared_until = Some(Instant::now() + SHARED);
    }

    /// Notes that a batch on this org, and maybe on others, used a key that was not new.
    pub(super) fn keys_again(&self, org: OrgId) {
        self.state().org(org).keys_again_until = Some(Instant::now() + KEYS_AGAIN);
    }

    /// True if the org's keys have to be looked up first, because one was not new a moment ago.
    pub(super) fn has_keys_again(&self, org: OrgId) -> bool {
        let until = self.state().orgs.get(&org).and_then(|org| org.keys_again_until);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Where the log should end, and what the database's clock should show. `None` if another server writes the log too, or if
    /// no end or recent reading is cached.
    pub(super) fn begin_cached(&self, org: OrgId) -> Option<(End, Time)> {
        let state = self.state();
        let org = state.orgs.get(&org)?;
        if org.shared_until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let reading = state.reading.filter(|reading| reading.heard.elapsed() < CARRIED)?;
        Some((org.end?, reading.carried_on()))
    }

    /// Takes the state of an org, and the record that it was made at.
    pub(super) fn take_state(&self, org: OrgId) -> Option<(RecordId, OrgState)> {
        self.jobs.take(org)
    }

    /// Puts a state back, with the log's last record as that which it was made at.
    pub(super) fn put_state(&self, org: OrgId, last: RecordId, state: OrgState) {
        self.jobs.put(org, last, state);
    }

    /// Orgs whose cached states have rows that have been behind for long.
    pub(super) fn stale(&self, limit: usize) -> Vec<OrgId> {
        let now = self.state().reading.map(|reading| reading.carried_on());
        now.map_or_else(Vec::new, |now| self.jobs.stale(now, limit))
    }

    fn log(&self) -> MutexGuard<'_, KnownLog> {
        self.log.lock()
    }

    fn state(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock()
    }
}

impl CacheState {
    fn org(&mut self, org: OrgId) -> &mut Org {
        if self.orgs.len() >= MAX_ORGS && !self.orgs.contains_key(&org) {
            self.orgs.clear();
        }
        self.orgs.entry(org).or_default()
    }

    /// A reading is as old as its answer took to arrive, so the one that implies the latest time is the most accurate.
    fn heard(&mut self, time: Time) {
        let is_better = |known: &Reading| time >= known.carried_on() || known.heard.elapsed() >= CARRIED;
        if self.reading.as_ref().is_none_or(is_better) {
            self.reading = Some(Reading { heard: Instant::now(), time });
        }
    }
}
