//! What a verification asks of a store: everything that is kept, in small parts, to be computed again.

use std::time::Duration;

use async_trait::async_trait;

use super::{Series, Stock, StoreError};
use crate::domain::{
    event::JobEvent,
    id::{JobId, LogId, OrgId},
};

/// Retention waits no longer than this without being told again. Where it was told to wait until later than that, the clock was ahead
/// then, and has been set back since.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(3_900);

/// What a database says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    /// The log's identity.
    pub log_id: LogId,
    /// Retention is to wait.
    pub is_retention_paused: bool,
    /// Raised whenever an API token is made or revoked; 0 if there has never been one.
    pub credentials: i64,
}

/// Events of a stretch of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// How many there are.
    pub events: i64,
    /// How many different places they take.
    pub places: i64,
    /// What they take, in bytes.
    pub bytes: i64,
}

/// Jobs whose time is still to come, told in two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// By the counter.
    pub stored: i64,
    /// By counting, in the same snapshot.
    pub counted: i64,
}

/// The reads of a verification. None holds a snapshot for longer than one statement.
#[async_trait]
pub trait Audit: Send + Sync {
    /// Has every server's retention wait for so long, at least; no longer than [`LONGEST_PAUSE`].
    async fn pause_retention(&self, time: Duration) -> Result<(), StoreError>;

    /// Says that the clock is right: retention waits no longer.
    async fn confirm_clock(&self) -> Result<(), StoreError>;

    /// Reads the whole series of some types of an org, as of one place in its log.
    async fn series(&self, org: OrgId, types: &[String]) -> Result<Series, StoreError>;

    /// Counts the batch records that do not follow on the one before them, or are not what the head says that they are.
    async fn broken_records(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Counts the jobs whose rows lack an event, or the last extension of their lease, up to where none is said to; of extensions it looks
    /// at those of the last thousand records that have any.
    async fn early_rows(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Reads up to where an org's log goes, and what the org has then; `None` where it has no log.
    async fn stock(&self, org: OrgId) -> Result<Option<(i64, Stock)>, StoreError>;

    /// Reads how many batches have removed jobs of an org.
    async fn removals(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Counts the queued jobs whose time is still to come: the types for which that is not what the counter says.
    async fn miscounted(&self, org: OrgId) -> Result<Vec<(String, Scheduled)>, StoreError>;

    /// Counts the events after `after` up to `last`.
    async fn count_events(&self, org: OrgId, after: i64, last: i64) -> Result<Stretch, StoreError>;

    /// Counts the events that are still to go of jobs that are gone.
    async fn count_remaining(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Reads events of some jobs, in the order given and of each in the order of `seq`: at most `limit`, those of the first job
    /// only if they are after `after`, and none after `last`. A result is told by a null in its place.
    async fn histories(
        &self,
        org: OrgId,
        jobs: &[JobId],
        after: i64,
        last: i64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError>;
}
