//! Options that bound what callers may use.

use std::time::Duration;

use clap::{Args, builder::RangedU64ValueParser, value_parser};
use jobledger_server::{
    CallLimits, ConnectionLimits,
    ledger::{Limits, StreamLimits},
};

/// A number, of things or bytes: 1 to 2³² − 1.
fn many() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..)
}

/// The bound for one org: by default a third of the bound for all.
fn part(said: Option<u32>, all: u32) -> usize {
    said.unwrap_or((all / 3).max(1)) as usize
}

fn short(text: &str) -> Result<Duration, String> {
    super::time(text, Duration::from_millis(100)..=Duration::from_secs(3_600))
}

fn long(text: &str) -> Result<Duration, String> {
    super::time(text, Duration::from_secs(1)..=Duration::from_secs(30 * 86_400))
}

/// Bounds on callers. Beyond one, calls get RESOURCE_EXHAUSTED and often a retry delay, or connections are turned away.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Concurrent connections. Lowered if the open file limit is less than this plus 300 for the server itself.
    #[arg(long, env = "JOBLEDGER_MAX_CONNECTIONS", value_name = "N", default_value_t = 10_000, value_parser = many())]
    max_connections: u32,

    /// Connections from one address, or from one /64 network of IPv6. By default a third of all. Behind a proxy, set it
    /// to at least the proxy's number of connections.
    #[arg(long, env = "JOBLEDGER_MAX_CONNECTIONS_PER_ADDRESS", value_name = "N", value_parser = many())]
    max_connections_per_address: Option<u32>,

    /// Types that the jobs of one org may have.
    #[arg(long, env = "JOBLEDGER_MAX_TYPES_PER_ORG", value_name = "N", default_value_t = 10_000, value_parser = many())]
    max_types_per_org: u32,

    /// Jobs that one org may have, finished ones included. At this number its creates are refused (QUOTA_EXCEEDED). By
    /// default unlimited.
    #[arg(long, env = "JOBLEDGER_MAX_JOBS_PER_ORG", value_name = "N", value_parser = value_parser!(u64).range(1..))]
    max_jobs_per_org: Option<u64>,

    /// Approximate bytes of one org's jobs and events. At this size its creates and redrives are refused
    /// (QUOTA_EXCEEDED), and at 125 % of it its claims and progress reports as well. By default unlimited.
    #[arg(long, env = "JOBLEDGER_MAX_BYTES_PER_ORG", value_name = "BYTES", value_parser = value_parser!(u64).range(1..))]
    max_bytes_per_org: Option<u64>,

    /// Calls under way on one connection, streams included.
    #[arg(long, env = "JOBLEDGER_MAX_CALLS_PER_CONNECTION", value_name = "N", default_value_t = 4_096, value_parser = many())]
    max_calls_per_connection: u32,

    /// Bytes of a call's headers: 4,096 to 1,048,576.
    #[arg(long, env = "JOBLEDGER_MAX_HEADER_BYTES", value_name = "BYTES", default_value_t = 16_384, value_parser = value_parser!(u32).range(4_096..=1_048_576))]
    max_header_bytes: u32,

    /// Calls that a connection may have reset within a minute before it is closed: by the client before their answers,
    /// or by the server because of the client's errors.
    #[arg(long, env = "JOBLEDGER_MAX_RESETS", value_name = "N", default_value_t = 1_000, value_parser = many())]
    max_resets: u32,

    /// How long a new connection may take for its first bytes, and for the TLS handshake.
    #[arg(long, env = "JOBLEDGER_FIRST_BYTES_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = short)]
    first_bytes_timeout: Duration,

    /// How long a connection may have no call before it is closed.
    #[arg(long, env = "JOBLEDGER_IDLE_TIMEOUT", value_name = "TIME", default_value = "10m", value_parser = long)]
    idle_timeout: Duration,

    /// The same before any admitted caller has used the connection.
    #[arg(long, env = "JOBLEDGER_UNKNOWN_IDLE_TIMEOUT", value_name = "TIME", default_value = "15s", value_parser = long)]
    unknown_idle_timeout: Duration,

    /// Age (±10 %) at which a connection accepts no more calls, so that new servers behind a load balancer get
    /// connections. Event streams on it have five minutes to end; then the server ends them, to be resumed elsewhere.
    #[arg(long, env = "JOBLEDGER_MAX_CONNECTION_AGE", value_name = "TIME", default_value = "30m", value_parser = long)]
    max_connection_age: Duration,

    /// How often a silent connection is pinged. It is closed if no reply comes for as long again.
    #[arg(long, env = "JOBLEDGER_KEEPALIVE", value_name = "TIME", default_value = "20s", value_parser = long)]
    keepalive: Duration,

    /// Bytes of answers that clients have not read, without event streams: 16,777,216 or more. Beyond that the server
    /// closes the largest connection of the organisation (or of the address, for calls without one) that holds the most.
    #[arg(long, env = "JOBLEDGER_MAX_ANSWER_MEMORY", value_name = "BYTES", default_value_t = 128 << 20, value_parser = value_parser!(u32).range(16_777_216..))]
    max_answer_memory: u32,

    /// The same for one organisation, or for one address if a call has no organisation. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_ANSWER_MEMORY_PER_ORG", value_name = "BYTES", value_parser = value_parser!(u32).range(4_194_304..))]
    max_answer_memory_per_org: Option<u32>,

    /// Calls under way of all organisations. Heartbeats, reports and cancellations have a quarter more. Claims and
    /// event streams are not counted.
    #[arg(long, env = "JOBLEDGER_MAX_CALLS", value_name = "N", default_value_t = 16_384, value_parser = many())]
    max_calls: u32,

    /// Calls under way of one organisation. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_CALLS_PER_ORG", value_name = "N", value_parser = many())]
    max_calls_per_org: Option<u32>,

    /// Calls a second of one organisation on this server. Claims, heartbeats, reports, batches of reports and
    /// cancellations each have this rate of their own. By default unlimited.
    #[arg(long, env = "JOBLEDGER_MAX_RATE_PER_ORG", value_name = "N", value_parser = many())]
    max_rate_per_org: Option<u32>,

    /// Bytes of one request: 65,536 to 67,108,864.
    #[arg(long, env = "JOBLEDGER_MAX_REQUEST_BYTES", value_name = "BYTES", default_value_t = 4 << 20, value_parser = value_parser!(u32).range(65_536..=67_108_864))]
    max_request_bytes: u32,

    /// Bytes of all requests that are being received.
    #[arg(long, env = "JOBLEDGER_MAX_REQUEST_MEMORY", value_name = "BYTES", default_value_t = 64 << 20, value_parser = many())]
    max_request_memory: u32,

    /// The same for one organisation. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_REQUEST_MEMORY_PER_ORG", value_name = "BYTES", value_parser = many())]
    max_request_memory_per_org: Option<u32>,

    /// How long a request may take to arrive whole.
    #[arg(long, env = "JOBLEDGER_REQUEST_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = short)]
    request_timeout: Duration,

    /// How long a call may take, whatever its deadline. Event streams are exempt.
    #[arg(long, env = "JOBLEDGER_CALL_TIMEOUT", value_name = "TIME", default_value = "2m", value_parser = long)]
    call_timeout: Duration,

    /// Claims under way, most of them waiting for work.
    #[arg(long, env = "JOBLEDGER_MAX_CLAIMS", value_name = "N", default_value_t = 16_384, value_parser = many())]
    max_claims: u32,

    /// The same for one organisation. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_CLAIMS_PER_ORG", value_name = "N", value_parser = many())]
    max_claims_per_org: Option<u32>,

    /// Event streams that may be open on this server.
    #[arg(long, env = "JOBLEDGER_MAX_STREAMS", value_name = "N", default_value_t = 16_384, value_parser = many())]
    max_streams: u32,

    /// Event streams that one organisation may have open on this server. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_STREAMS_PER_ORG", value_name = "N", value_parser = many())]
    max_streams_per_org: Option<u32>,

    /// Event streams that one connection may have open.
    #[arg(long, env = "JOBLEDGER_MAX_STREAMS_PER_CONNECTION", value_name = "N", default_value_t = 1_000, value_parser = many())]
    max_streams_per_connection: u32,

    /// Bytes of past events and jobs buffered for streams until clients read them: 8,388,608 or more. When less than a
    /// quarter is left, a stream whose client reads nothing for a second ends with SLOW_CONSUMER.
    #[arg(long, env = "JOBLEDGER_MAX_STREAM_MEMORY", value_name = "BYTES", default_value_t = 128 << 20, value_parser = value_parser!(u32).range(8_388_608..))]
    max_stream_memory: u32,

    /// The same for one organisation. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_STREAM_MEMORY_PER_ORG", value_name = "BYTES", value_parser = many())]
    max_stream_memory_per_org: Option<u32>,

    /// Bytes of the filters (types, labels, workers) of waiting claims and event streams.
    #[arg(long, env = "JOBLEDGER_MAX_NAMED_MEMORY", value_name = "BYTES", default_value_t = 32 << 20, value_parser = value_parser!(u32).range(1_048_576..))]
    max_named_memory: u32,

    /// The same for one organisation. By default a third of all.
    #[arg(long, env = "JOBLEDGER_MAX_NAMED_MEMORY_PER_ORG", value_name = "BYTES", value_parser = many())]
    max_named_memory_per_org: Option<u32>,

    /// Commands in one batch, and so in one commit: 1 to 4,096.
    #[arg(long, env = "JOBLEDGER_MAX_BATCH", value_name = "N", default_value_t = 512, value_parser = value_parser!(u16).range(1..=4_096))]
    max_batch: u16,

    /// Queued commands of all organisations.
    #[arg(long, env = "JOBLEDGER_MAX_QUEUED", value_name = "N", default_value_t = 65_536, value_parser = many())]
    max_queued: u32,

    /// Queued commands of one organisation.
    #[arg(long, env = "JOBLEDGER_MAX_QUEUED_PER_ORG", value_name = "N", default_value_t = 16_384, value_parser = many())]
    max_queued_per_org: u32,

    /// How long a command may wait in the queue. After that it is refused without being executed.
    #[arg(long, env = "JOBLEDGER_QUEUE_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = short)]
    queue_timeout: Duration,
}

impl LimitArgs {
    pub(super) fn connections(&self) -> ConnectionLimits {
        ConnectionLimits {
            connections: self.max_connections as usize,
            connections_per_address: part(self.max_connections_per_address, self.max_connections),
            calls_per_connection: self.max_calls_per_connection,
            header_bytes: self.max_header_bytes,
            resets: self.max_resets as usize,
            first_bytes_within: self.first_bytes_timeout,
            idle: self.idle_timeout,
            unknown_idle: self.unknown_idle_timeout,
            age: self.max_connection_age,
            keepalive: self.keepalive,
            unread: self.max_answer_memory as usize,
            unread_each: part(self.max_answer_memory_per_org, self.max_answer_memory),
        }
    }

    pub(super) fn calls(&self) -> CallLimits {
        CallLimits {
            calls: self.max_calls as usize,
            calls_per_org: part(self.max_calls_per_org, self.max_calls),
            rate_per_org: self.max_rate_per_org,
            request_bytes: self.max_request_bytes as usize,
            request_memory: self.max_request_memory as usize,
            request_memory_per_org: part(self.max_request_memory_per_org, self.max_request_memory),
            request_within: self.request_timeout,
            call_within: self.call_timeout,
        }
    }

    pub(super) fn ledger(&self) -> Limits {
        Limits {
            batch_commands: usize::from(self.max_batch),
            queued_commands: self.max_queued as usize,
            queued_commands_per_org: self.max_queued_per_org as usize,
            queued_within: self.queue_timeout,
            types_per_org: self.max_types_per_org as usize,
            jobs_per_org: self.max_jobs_per_org,
            bytes_per_org: self.max_bytes_per_org,
            claims: self.max_claims as usize,
            claims_per_org: part(self.max_claims_per_org, self.max_claims),
            streams: StreamLimits {
                in_all: self.max_streams as usize,
                per_org: part(self.max_streams_per_org, self.max_streams),
                per_connection: self.max_streams_per_connection as usize,
            },
            stream_bytes: self.max_stream_memory as usize,
            stream_bytes_per_org: part(self.max_stream_memory_per_org, self.max_stream_memory),
            named_bytes: self.max_named_memory as usize,
            named_bytes_per_org: part(self.max_named_memory_per_org, self.max_named_memory),
            ..Limits::default()
        }
    }
}
