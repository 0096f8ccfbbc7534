//! The reads of `verify`. They return everything that is stored in small parts, so that `verify` can compute it again.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{Series, Stock, StoreError};
use crate::domain::{
    event::JobEvent,
    id::{JobId, LogId, OrgId},
    org_event::OrgEvent,
};

/// The longest pause of retention: a longer one has to be renewed. A stored end that is later than this from now is ignored. It
/// was set by a clock that was ahead, and that was set back since.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(3_900);

/// What a database says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerInfo {
    /// The log id.
    pub log_id: LogId,
    /// Retention must wait.
    pub is_retention_paused: bool,
    /// The revision of the API tokens: raised when a token is revoked, or made by command; 0 if there has never been one.
    pub credentials: i64,
}

/// The events of a range of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The number of events.
    pub events: i64,
    /// The number of different `seq`s.
    pub places: i64,
    /// The weight of the events, in bytes.
    pub bytes: i64,
    /// The number of events that are about no single job. They have `seq`s of their own.
    pub org_events: i64,
    /// The weight of these events, in bytes.
    pub org_bytes: i64,
}

/// The number of scheduled jobs of a type, from two sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// By the counter.
    pub stored: i64,
    /// By counting, in the same snapshot.
    pub counted: i64,
}

/// The reads of `verify`. None holds a snapshot for longer than one statement.
#[async_trait]
pub trait Audit: Send + Sync {
    /// Pauses retention on every server for at least this long, which is at most [`LONGEST_PAUSE`].
    async fn pause_retention(&self, time: Duration) -> Result<(), StoreError>;

    /// Ends every pause of retention: the operator says that the clock is right.
    async fn confirm_clock(&self) -> Result<(), StoreError>;

    /// Reads the whole series of some types of an org, as of one `seq` of its log.
    async fn series(&self, org: OrgId, types: &[String]) -> Result<Series, StoreError>;

    /// Counts the batch records that do not follow the record before them, or that contradict the head.
    async fn broken_records(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Counts the jobs whose rows lack an event or the last lease extension although the base says that they don't. Of
    /// extensions, only the last thousand records with any are checked.
    async fn early_rows(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Reads the org's head `seq`, and what the org stores at that `seq`. `None` for an org without a log.
    async fn stock(&self, org: OrgId) -> Result<Option<(i64, Stock)>, StoreError>;

    /// Reads how many batches have removed jobs of an org.
    async fn removals(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Counts the scheduled jobs of each type, and returns the types whose counter differs.
    async fn miscounted(&self, org: OrgId) -> Result<Vec<(String, Scheduled)>, StoreError>;

    /// Counts the events after `after`, up to `last`.
    async fn count_events(&self, org: OrgId, after: i64, last: i64) -> Result<Stretch, StoreError>;

    /// Reads the events about no single job after `after`, up to `last`, in order.
    async fn org_events(&self, org: OrgId, after: i64, last: i64) -> Result<Vec<Arc<OrgEvent>>, StoreError>;

    /// Counts the events of removed jobs that are still stored.
    async fn count_remaining(&self, org: OrgId) -> Result<i64, StoreError>;

    /// Reads at most `limit` events up to `last` of some jobs: in the order of `jobs`, and by `seq` within a job. Of the first
    /// job it reads only events after `after`. A null stands for each result.
    async fn histories(
        &self,
        org: OrgId,
        jobs: &[JobId],
        after: i64,
        last: i64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError>;
}
