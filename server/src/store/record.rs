//! Batch records. Each batch that changes the log or a job leaves one in its org's log, which proves that it was committed.

use chrono::TimeDelta;
use uuid::Uuid;

/// The format in which records are written.
pub(super) const RECORD_FORMAT: i16 = 1;
/// How long records are kept, by the database's clock: the log's time moves only with events. No writer looks for the outcome
/// of a batch as late as this.
pub(super) const RECORDS_KEPT: TimeDelta = TimeDelta::minutes(10);
/// Records that are removed at a time, at most: more than are written between two removals.
pub(super) const RECORDS_DROPPED: i64 = 1_024;

/// A batch record of a log. The last record says how far the log has come, heartbeats included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordId {
    /// The record's number: 1, 2, 3, …; 0 before the first.
    pub n: i64,
    /// A random number. Two different histories, such as a restored log and the one that it replaced, have no record in common.
    pub id: i64,
}

impl RecordId {
    /// A new record that follows this one.
    pub(super) fn follow(self) -> Self {
        // 62 of these 64 bits are random.
        Self { n: self.n + 1, id: Uuid::new_v4().as_u128() as i64 }
    }
}
