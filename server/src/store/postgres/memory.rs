//! Where this server has left the logs that it writes, with their states, so that a batch which needs nothing else begins where the
//! last one ended, without asking; and the database's clock, carried on in between.
//!
//! No decision rests on it: the statement that writes such a batch locks the head first, and fails where the log has moved on. But that another
//! history has taken a log's place is known by what was witnessed of it.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{SubsecRound as _, TimeDelta};

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

/// Orgs remembered before all are forgotten, which costs each a look.
const MAX_ORGS: usize = 10_000;
/// How long a reading of the clock is carried on by that of this machine.
const CARRIED: Duration = Duration::from_secs(1);
/// How long an org's log that others write, too, is not taken to be where this server left it.
const SHARED: Duration = Duration::from_secs(1);
/// How long an org's keys are looked for once one came again.
const KEYS_AGAIN: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Memory {
    state: Mutex<State>,
    jobs: States,
    log: Mutex<Log>,
    /// A batch found no partition for its events.
    lacks_partition: AtomicBool,
}

/// Which log the database was known to have.
#[derive(Default)]
struct Log {
    id: Option<LogId>,
    /// The turn on which that was read, and the last one that was taken.
    read_on: u64,
    turns: u64,
}

#[derive(Default)]
struct State {
    orgs: HashMap<OrgId, Org>,
    reading: Option<Reading>,
}

#[derive(Default)]
struct Org {
    /// Types known to exist: once there, a type stays until its last job is removed.
    types: HashSet<Arc<str>>,
    /// How many batches had removed jobs then.
    removals: i64,
    /// Where this server's last batch has left the log.
    end: Option<End>,
    /// Where it was found, or left, by a commit that the database has confirmed.
    confirmed: Option<RecordId>,
    /// The last such record that is known of, whatever was begun since then.
    witnessed: Option<RecordId>,
    /// Others write it, too, as far as is known.
    shared_until: Option<Instant>,
    /// Jobs are created with keys that exist.
    keys_again_until: Option<Instant>,
}

impl Org {
    /// Jobs were removed since types were known: of some it may have been the last.
    fn seen_removals(&mut self, removals: i64) {
        if std::mem::replace(&mut self.removals, removals) != removals {
            self.types.clear();
        }
    }
}

/// Where a log ends, and up to where its records are folded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct End {
    pub(super) head: Head,
    /// The last record.
    pub(super) record: RecordId,
    /// `seq` of the last event, and number of the last record, that are folded.
    pub(super) folded_seq: i64,
    pub(super) folded_n: i64,
    /// Batches that have removed jobs.
    pub(super) removals: i64,
    /// Up to where rows lack nothing.
    pub(super) base: Base,
}

/// The database's clock, as it was heard of at some instant of this machine's.
#[derive(Clone, Copy)]
struct Reading {
    heard: Instant,
    time: Time,
}

impl Reading {
    fn carried_on(&self) -> Time {
        // The database keeps microseconds.
        (self.time + self.heard.elapsed()).trunc_subsecs(6)
    }
}

impl Memory {
    pub(super) fn new(fold_after: Duration) -> Self {
        let (state, jobs, log) = (Mutex::default(), States::new(fold_after), Mutex::default());
        Self { state, jobs, log, lacks_partition: AtomicBool::new(false) }
    }

    /// How long rows of running jobs may be behind, of an org that was taken.
    pub(super) fn fold_after(&self, of: &OrgState) -> TimeDelta {
        self.jobs.fold_after(of)
    }

    /// A batch failed. If that is because there is no partition for the month that the clock says, it shall be run again once there is.
    pub(super) fn failed(&self, error: sqlx::Error, meaning: fn(sqlx::Error) -> StoreError) -> StoreError {
        if lacks_partition(&error) {
            self.lacks_partition.store(true, Ordering::Relaxed);
            return StoreError::Conflict(error.to_string());
        }
        meaning(error)
    }

    /// Whether partitions have to be made first. The caller makes them.
    pub(super) fn takes_partitions(&self) -> bool {
        self.lacks_partition.swap(false, Ordering::Relaxed)
    }

    /// Parts some types into those known to exist and the others.
    pub(super) fn part(&self, org: OrgId, types: &[Arc<str>]) -> (Vec<String>, Vec<Arc<str>>) {
        let state = self.state();
        let known = state.orgs.get(&org);
        let (known, unknown): (Vec<_>, Vec<_>) =
            types.iter().cloned().partition(|name| known.is_some_and(|known| known.types.contains(name)));
        (known.iter().map(|name| name.to_string()).collect(), unknown)
    }

    /// These types exist.
    pub(super) fn add_types(&self, org: OrgId, types: impl Iterator<Item = Arc<str>>) {
        let mut types = types.peekable();
        if types.peek().is_some() {
            self.state().org(org).types.extend(types);
        }
    }

    /// A batch has found the log's end, with its head locked, and the clock.
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

    /// A batch was committed that has left the log so.
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

    /// A transaction that has found the log so was committed.
    pub(super) fn confirmed(&self, org: OrgId, last: RecordId) {
        let mut state = self.state();
        let org = state.org(org);
        (org.confirmed, org.witnessed) = (Some(last), Some(last));
    }

    /// A record that is in an org's log, unless another history has taken its place.
    pub(super) fn witnessed(&self, org: OrgId) -> Option<RecordId> {
        self.state().orgs.get(&org)?.witnessed
    }

    /// Which log the database is known to have.
    pub(super) fn log_id(&self) -> Option<LogId> {
        self.log().id
    }

    /// A turn to read which log the database has.
    pub(super) fn turn(&self) -> u64 {
        let mut log = self.log();
        log.turns += 1;
        log.turns
    }

    /// The database has a log of this id, as was read on this turn. If that is another than it was, nothing that is known counts.
    pub(super) fn has_log(&self, turn: u64, id: LogId) {
        let mut log = self.log();
        if turn < log.read_on {
            // Somebody has read it later and was told earlier.
            return;
        }
        log.read_on = turn;
        if log.id.replace(id).is_some_and(|was| was != id) {
            self.state().orgs.clear();
            self.jobs.clear();
        }
    }

    /// True if all of a log up to this record, its last, is as durable as commits are.
    pub(super) fn is_confirmed(&self, org: OrgId, last: RecordId) -> bool {
        self.state().orgs.get(&org).is_some_and(|org| org.confirmed == Some(last))
    }

    /// A batch is about to be committed: unless it is heard to be, nothing is known of its org any more but types.
    pub(super) fn committing(&self, org: OrgId) {
        let mut state = self.state();
        let org = state.org(org);
        (org.end, org.confirmed) = (None, None);
    }

    /// It is known that a batch was not committed.
    pub(super) fn reverted(&self, jobs: Left) {
        jobs.reverted(&self.jobs);
    }

    /// The log was not where this server had left it.
    pub(super) fn missed(&self, org: OrgId) {
        self.state().org(org).shared_until = Some(Instant::now() + SHARED);
    }

    /// A key of one of the orgs that a batch wrote was not new.
    pub(super) fn keys_again(&self, org: OrgId) {
        self.state().org(org).keys_again_until = Some(Instant::now() + KEYS_AGAIN);
    }

    /// True of an org whose keys are to be looked for, because one has come again of late.
    pub(super) fn has_keys_again(&self, org: OrgId) -> bool {
        let until = self.state().orgs.get(&org).and_then(|org| org.keys_again_until);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Where the log should end, and what the clock should say; if this server has written it last, as far as it knows.
    pub(super) fn recall(&self, org: OrgId) -> Option<(End, Time)> {
        let state = self.state();
        let org = state.orgs.get(&org)?;
        if org.shared_until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let reading = state.reading.filter(|reading| reading.heard.elapsed() < CARRIED)?;
        Some((org.end?, reading.carried_on()))
    }

    /// Takes what is known of an org's jobs, and the record as of which it is.
    pub(super) fn take_state(&self, org: OrgId) -> Option<(RecordId, OrgState)> {
        self.jobs.take(org)
    }

    /// Gives it back, in a log whose last record this is.
    pub(super) fn put_state(&self, org: OrgId, last: RecordId, state: OrgState) {
        self.jobs.put(org, last, state);
    }

    /// Orgs that have jobs whose rows have been behind for long, as far as this server knows.
    pub(super) fn stale(&self, limit: usize) -> Vec<OrgId> {
        let now = self.state().reading.map(|reading| reading.carried_on());
        now.map_or_else(Vec::new, |now| self.jobs.stale(now, limit))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn org(&mut self, org: OrgId) -> &mut Org {
        if self.orgs.len() >= MAX_ORGS && !self.orgs.contains_key(&org) {
            self.orgs.clear();
        }
        self.orgs.entry(org).or_default()
    }

    /// What was heard is as old as its way here took: of some readings that which says the most is the best.
    fn heard(&mut self, time: Time) {
        let is_better = |known: &Reading| time >= known.carried_on() || known.heard.elapsed() >= CARRIED;
        if self.reading.as_ref().is_none_or(is_better) {
            self.reading = Some(Reading { heard: Instant::now(), time });
        }
    }
}
