//! Places for event streams: so many on this server, of one org, and on one connection.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::LedgerError;
use crate::{domain::id::OrgId, places::leave};

/// How many streams may be open.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// On this server.
    pub in_all: usize,
    /// Of one org.
    pub per_org: usize,
    /// On one connection.
    pub per_connection: usize,
}

/// All places.
pub(super) struct Places {
    limits: StreamLimits,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    in_all: usize,
    orgs: HashMap<OrgId, usize>,
    connections: HashMap<SocketAddr, usize>,
}

/// A place, for as long as it is held.
pub struct Place {
    places: Arc<Places>,
    org: OrgId,
    connection: Option<SocketAddr>,
}

/// A place among the streams that may be open. Whoever keeps a stream's events in memory keeps a clone.
pub type StreamPlace = Arc<Place>;

impl Places {
    pub(super) fn new(limits: StreamLimits) -> Self {
        Self { limits, taken: Mutex::default() }
    }

    /// Takes a place for a stream of an org, on the connection of the peer with this address if it came by one.
    pub(super) fn take(
        self: &Arc<Self>,
        org: OrgId,
        connection: Option<SocketAddr>,
    ) -> Result<StreamPlace, LedgerError> {
        let mut taken = self.taken();
        let of_org = taken.orgs.get(&org).copied().unwrap_or_default();
        let of_connection = connection.and_then(|peer| taken.connections.get(&peer).copied()).unwrap_or_default();
        for (scope, open, limit) in [
            ("server", taken.in_all, self.limits.in_all),
            ("org", of_org, self.limits.per_org),
            ("connection", of_connection, self.limits.per_connection),
        ] {
            if open >= limit {
                return Err(LedgerError::TooManyStreams { scope, limit });
            }
        }
        taken.in_all += 1;
        *taken.orgs.entry(org).or_default() += 1;
        if let Some(peer) = connection {
            *taken.connections.entry(peer).or_default() += 1;
        }
        drop(taken);
        Ok(Arc::new(Place { places: Arc::clone(self), org, connection }))
    }

    /// The maps stay whole whatever panics beside them.
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.in_all -= 1;
        leave(&mut taken.orgs, &self.org);
        if let Some(peer) = &self.connection {
            leave(&mut taken.connections, peer);
        }
    }
}
