//! Repeated claims: of all calls with the same `request_id`, only the latest has a caller that still listens.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

use super::command::Claim;
use crate::domain::id::OrgId;

/// Identifies a claim: org, worker and `request_id`.
type Key = (OrgId, Arc<str>, Arc<str>);

/// The latest call of each claim with a `request_id` that is under way on this server.
#[derive(Default)]
pub(super) struct Repeats(Mutex<HashMap<Key, CancellationToken>>);

impl Repeats {
    /// Registers a call and ends an earlier call of the same claim. The earlier caller has given up, so jobs that it took would
    /// be lost until their leases expire. `None` if the claim has no `request_id`.
    pub(super) fn supersede(self: &Arc<Self>, org: OrgId, claim: &Claim) -> Option<Latest> {
        let request = claim.request.as_ref()?;
        let key = (org, Arc::clone(&claim.worker), Arc::clone(request));
        let superseded = CancellationToken::new();
        if let Some(earlier) = self.calls().insert(key.clone(), superseded.clone()) {
            earlier.cancel();
        }
        Some(Latest { repeats: Arc::clone(self), key, superseded })
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<Key, CancellationToken>> {
        self.0.lock()
    }
}

/// The latest call of a claim, while it is under way.
pub(super) struct Latest {
    repeats: Arc<Repeats>,
    key: Key,
    superseded: CancellationToken,
}

impl Latest {
    /// Waits until a later call replaces this one.
    pub(super) async fn superseded(&self) {
        self.superseded.cancelled().await;
    }
}

impl Drop for Latest {
    fn drop(&mut self) {
        let mut calls = self.repeats.calls();
        // The entry of a superseded call is the later call's.
        if !self.superseded.is_cancelled() {
            calls.remove(&self.key);
        }
    }
}
