//! Connections: their number, how long they may be silent, and their memory. Independent of the service.

mod accept;
mod connection;
mod response_memory;
mod tls;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

pub(crate) use self::accept::serve;
pub(crate) use self::response_memory::{AnswerBytes, StreamingResponse};
pub use self::tls::{Tls, TlsConfig, TlsError};
use crate::{access::PeerCertificate, scheduler::Owner};

/// Bounds on connections. Each has a command-line flag.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// Open connections.
    pub connections: usize,
    /// Open connections of one IPv4 address, or of one IPv6 /64 network.
    pub connections_per_address: usize,
    /// Concurrent calls on one connection, streams included.
    pub calls_per_connection: u32,
    /// Bytes of a call's headers, names included.
    pub header_bytes: u32,
    /// Calls that a client may reset within a minute before they are answered, and calls that the server may have to
    /// reset for the client's errors, before the connection is closed.
    pub resets: usize,
    /// The time limit for the TLS handshake, and then for a connection's first bytes.
    pub first_bytes_within: Duration,
    /// How long a connection may have no call before it is closed.
    pub idle: Duration,
    /// The same for a connection without any authorised call so far.
    pub unknown_idle: Duration,
    /// The age, varied by up to a tenth, from which a connection takes no more calls, so that clients reconnect and
    /// find new servers. Its streams may continue for as long again, five minutes at most.
    pub age: Duration,
    /// How often a silent peer is pinged. It must answer within the same time.
    pub keepalive: Duration,
    /// Bytes of answers that callers have not taken, streams excluded. Above this bound, the org with the most bytes
    /// loses its largest connection. Answers without an org count for their address.
    pub unread: usize,
    /// The same bound for one org, or for one address if the answers have no org.
    pub unread_each: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            connections_per_address: 10_000 / 3,
            calls_per_connection: 4_096,
            header_bytes: 16 << 10,
            resets: 1_000,
            first_bytes_within: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            unknown_idle: Duration::from_secs(15),
            age: Duration::from_secs(1_800),
            keepalive: Duration::from_secs(20),
            unread: 128 << 20,
            unread_each: (128 << 20) / 3,
        }
    }
}

impl ConnectionLimits {
    /// Lowers the bound on connections to this number, and the bound for each address in proportion.
    pub fn at_most(&mut self, connections: usize) {
        if connections < self.connections {
            self.connections_per_address = (self.connections_per_address * connections / self.connections).max(1);
            self.connections = connections;
        }
    }
}

/// Where a call came from. An extension of the request.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// The client's certificate, if it sent one and that was verified.
    pub(crate) certificate: Option<Arc<PeerCertificate>>,
    /// Cancelling it closes the connection with all its calls.
    pub(crate) cut: CancellationToken,
    /// Cancelling it ends the connection's streams, which the client then resumes elsewhere.
    pub(crate) ending: CancellationToken,
    /// Whose the connection's tasks are: known once an authorised call was made on it.
    pub(crate) owner: Arc<Owner>,
}
