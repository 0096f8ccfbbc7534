//! Bounds on what the ledger may use.

use std::time::Duration;

use super::stream_slots::StreamLimits;

/// Bounds of the ledger on memory and time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Commands in one batch; at least 1.
    pub batch_commands: usize,
    /// Bytes of commands in one batch. A single larger command is still accepted.
    pub batch_bytes: usize,
    /// Bytes at which a shared batch takes no further org; on SQLite the bytes of any batch while other orgs call.
    pub shared_bytes: usize,
    /// Commands waiting in all lanes. Vital commands may exceed this and the next two bounds by a quarter.
    pub queued_commands: usize,
    /// Commands waiting in one lane.
    pub queued_commands_per_org: usize,
    /// Bytes of commands waiting in all lanes together. One lane may have a quarter of them.
    pub queued_bytes: usize,
    /// How long a command waits before it is refused, and a read for its turn. Jobs that are given back wait without a limit.
    pub queued_within: Duration,
    /// Distinct types of jobs in one org.
    pub types_per_org: usize,
    /// Jobs that one org may have, finished ones included; `None`: no bound.
    pub jobs_per_org: Option<u64>,
    /// Approximate bytes of one org's jobs and events ([`Stock`](crate::store::Stock)); `None`: no bound.
    pub bytes_per_org: Option<u64>,
    /// Bytes of recent events cached for live subscribers, shared by the orgs that have any. Each org gets at least 16 KiB.
    pub tail_bytes: usize,
    /// Event streams that may be open.
    pub streams: StreamLimits,
    /// Bytes of past events that were read for streams and that the callers have not taken yet.
    pub stream_bytes: usize,
    /// As `stream_bytes`, for one org.
    pub stream_bytes_per_org: usize,
    /// Bytes of types, labels and worker names in waiting claims and event streams.
    pub named_bytes: usize,
    /// As `named_bytes`, for one org.
    pub named_bytes_per_org: usize,
    /// Bytes of what is known of workers. One org may have a third.
    pub worker_bytes: usize,
    /// How long a silent worker is known.
    pub workers_known_for: Duration,
    /// Claims under way, most of them waiting for work.
    pub claims: usize,
    /// As `claims`, for one org.
    pub claims_per_org: usize,
    /// Concurrent reads of lists and of large jobs, 2 to 6. One org may have all but one.
    pub reads: usize,
    /// Concurrent reads of claimed jobs' payloads, 2 to 4. One org may have all but one.
    pub deliveries: usize,
    /// Concurrent reads of one org over all these kinds, 2 to 6, and one less of the org whose reads take most time while others
    /// call. One kind may have all but one.
    pub reads_per_org: usize,
    /// Concurrent reads of past events for one org, 1 or 2, and as many of statistics. All orgs together may have one more.
    pub catch_up_reads: usize,
    /// A subscriber gets a bookmark at least this often.
    pub bookmark_interval: Duration,
    /// How long the writer looks for the outcome of a broken commit.
    pub resolve_within: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            batch_commands: 512,
            batch_bytes: 4 << 20,
            shared_bytes: 1 << 20,
            queued_commands: 65_536,
            queued_commands_per_org: 16_384,
            queued_bytes: 64 << 20,
            queued_within: Duration::from_secs(10),
            types_per_org: 10_000,
            jobs_per_org: None,
            bytes_per_org: None,
            tail_bytes: 64 << 20,
            streams: StreamLimits { in_all: 16_384, per_org: 16_384 / 3, per_connection: 1_000 },
            stream_bytes: 128 << 20,
            stream_bytes_per_org: (128 << 20) / 3,
            named_bytes: 32 << 20,
            named_bytes_per_org: (32 << 20) / 3,
            worker_bytes: 16 << 20,
            workers_known_for: Duration::from_secs(300),
            claims: 16_384,
            claims_per_org: 16_384 / 3,
            reads: processors.clamp(1, 5) + 1,
            deliveries: processors.clamp(1, 3) + 1,
            reads_per_org: processors.clamp(1, 5) + 1,
            catch_up_reads: processors.clamp(1, 2),
            bookmark_interval: Duration::from_secs(15),
            resolve_within: Duration::from_secs(10),
        }
    }
}
