//! Batch records: what each batch that changes anything leaves of itself in its org's log, by which it is known whether it happened.

use chrono::TimeDelta;
use uuid::Uuid;

/// The format in which records are written.
pub(super) const RECORD_FORMAT: i16 = 1;
/// How long records are kept, by the database's clock, since events alone move the log's time on; longer than anybody looks for the
/// outcome of a batch.
pub(super) const RECORDS_KEPT: TimeDelta = TimeDelta::minutes(10);
/// Records that go at once, at most: more than are written between two such times.
pub(super) const RECORDS_DROPPED: i64 = 1_024;

/// Which record of a log: the last one tells how far the log has come, heartbeats included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordId {
    /// Its number: 1, 2, 3, …; 0 before the first.
    pub n: i64,
    /// Random: of two logs that differ, a restored one and that which it replaced, no two records are the same.
    pub id: i64,
}

impl RecordId {
    /// A new one after this.
    pub(super) fn follow(self) -> Self {
        // Random but for six bits.
        Self { n: self.n + 1, id: Uuid::new_v4().as_u128() as i64 }
    }
}
