//! Slots for event streams: bounded on this server, for each org, and on each connection.

use std::{net::SocketAddr, sync::Arc};

use super::{LedgerError, name_budget::NameShare};
use crate::{
    domain::id::OrgId,
    shares::{Full, Most, Part, Shares},
};

/// How many event streams may be open.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// On this server.
    pub in_all: usize,
    /// For one org.
    pub per_org: usize,
    /// On one connection.
    pub per_connection: usize,
}

#[derive(Clone)]
pub(super) struct StreamSlots {
    limits: StreamLimits,
    of_orgs: Arc<Shares<OrgId>>,
    of_connections: Arc<Shares<SocketAddr>>,
}

/// One slot, until it is dropped.
pub struct TakenSlot {
    _of_org: Part<OrgId>,
    _of_connection: Option<Part<SocketAddr>>,
    _wish: NameShare,
}

/// A stream's slot. Everything that keeps events of the stream in memory keeps a clone.
pub type StreamSlot = Arc<TakenSlot>;

impl StreamSlots {
    pub(super) fn new(limits: StreamLimits) -> Self {
        let StreamLimits { in_all, per_org, per_connection } = limits;
        let of_orgs = Shares::new(Most { in_all, each: per_org });
        Self { limits, of_orgs, of_connections: Shares::new(Most { in_all, each: per_connection }) }
    }

    /// Takes a slot for a stream of an org. `connection` is the peer's address, if the call came over a connection.
    pub(super) fn take(
        &self,
        org: OrgId,
        connection: Option<SocketAddr>,
        _wish: NameShare,
    ) -> Result<StreamSlot, LedgerError> {
        let StreamLimits { in_all, per_org, per_connection } = self.limits;
        let _of_org = self.of_orgs.take(org, 1).map_err(|full| match full {
            Full::InAll => LedgerError::TooManyStreams { scope: "server", limit: in_all },
            Full::Each => LedgerError::TooManyStreams { scope: "org", limit: per_org },
        })?;
        let _of_connection = connection.map(|peer| self.of_connections.take(peer, 1)).transpose();
        let _of_connection =
            _of_connection.map_err(|_| LedgerError::TooManyStreams { scope: "connection", limit: per_connection })?;
        Ok(Arc::new(TakenSlot { _of_org, _of_connection, _wish }))
    }
}
