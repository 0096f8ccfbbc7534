//! Connections: how many there may be, how long one may be silent, and what it may hold. Knows nothing of what is served.

mod accept;
mod connection;
mod tls;
mod unread;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

pub(crate) use self::accept::serve;
pub use self::tls::{Tls, TlsConfig, TlsError};
pub(crate) use self::unread::{AnswerBytes, GoesOn};
use crate::access::PeerCertificate;

/// What connections may take. Every bound has a flag of the same name.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// Connections at the same time.
    pub connections: usize,
    /// Connections from one address; of IPv6 from one network of 64 bits.
    pub connections_per_address: usize,
    /// Calls that one connection may have under way, streams among them.
    pub calls_per_connection: u32,
    /// Bytes of a call's headers, names included.
    pub header_bytes: u32,
    /// Calls that a caller may reset within a minute before their answers come, and that the server may have to reset for a caller's
    /// mistakes, before the connection is closed.
    pub resets: usize,
    /// How long a new connection may take for its first bytes, and for the handshake of TLS.
    pub first_bytes_within: Duration,
    /// How long a connection may have no call before it is closed.
    pub idle: Duration,
    /// The same where nobody has ever called on it who may.
    pub unknown_idle: Duration,
    /// How old a connection may become, give or take a tenth: it then takes no more calls, so that whoever reconnects finds servers that
    /// have come since. Streams on it have as long again to end by themselves, five minutes at most.
    pub age: Duration,
    /// A peer that says nothing is asked for a sign of life this often, and given up after the same time again.
    pub keepalive: Duration,
    /// Bytes of answers that callers have not taken, but for those that go on; beyond that, the connection with most of them is closed, of the
    /// org with most, or of the address where they are about none.
    pub unread: usize,
    /// The same of one org, or of one address where they are about none.
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
    /// No more connections than these, and of one address the same part of them.
    pub fn at_most(&mut self, connections: usize) {
        if connections < self.connections {
            self.connections_per_address = (self.connections_per_address * connections / self.connections).max(1);
            self.connections = connections;
        }
    }
}

/// Whom a call came from: an extension of its request.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Its certificate, where it has shown one that was verified.
    pub(crate) certificate: Option<Arc<PeerCertificate>>,
    /// Cancelled, the connection is closed with all that is on it.
    pub(crate) cut: CancellationToken,
    /// Cancelled, what goes on without an end on it is to end, and to go on elsewhere.
    pub(crate) ending: CancellationToken,
    /// Somebody has called on it who may.
    pub(crate) is_known: Arc<AtomicBool>,
}
