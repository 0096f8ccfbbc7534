//! The end of an org's log.

use crate::domain::clock::Time;
#[cfg(doc)]
use crate::domain::job::Job;

/// The end of an org's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// `seq` of the last event; 0 before the first.
    pub seq: i64,
    /// The lowest `seq` from which on the log lacks no event.
    pub floor: i64,
    /// `recorded_at` of the last event.
    pub recorded_at: Option<Time>,
    /// How many types the org's jobs have.
    pub types: i64,
    /// How many batches have made a job ready.
    pub ready_gen: i64,
    /// What the org stores.
    pub stock: Stock,
    /// `seq` of the last event that is about no single job; 0 if there is none. Settings that were read at the same one are
    /// current.
    pub org_seq: i64,
}

/// What an org stores: quotas are checked against it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stock {
    /// Its jobs, finished ones included.
    pub jobs: i64,
    /// About how many bytes they and their events take: the sum of [`Job::weight`] and of
    /// [`JobEvent::weight`](crate::domain::event::JobEvent::weight). Events of removed jobs count until they are removed too.
    pub bytes: i64,
}

impl Head {
    /// The head of a log without events.
    pub const EMPTY: Self = Self {
        seq: 0,
        floor: 1,
        recorded_at: None,
        types: 0,
        ready_gen: 0,
        stock: Stock { jobs: 0, bytes: 0 },
        org_seq: 0,
    };

    /// The part of the head that other servers need.
    pub const fn reach(&self) -> Reach {
        Reach { seq: self.seq, ready_gen: self.ready_gen }
    }
}

/// How far a log has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    /// `seq` of the last event.
    pub seq: i64,
    /// How many batches have made a job ready.
    pub ready_gen: i64,
}

impl Reach {
    /// The higher of each of the two numbers.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { seq: self.seq.max(other.seq), ready_gen: self.ready_gen.max(other.ready_gen) }
    }
}
