//! Claims that come again by their `request_id`: the latest call of each is the one whose caller still listens.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

use super::command::Claim;
use crate::domain::id::OrgId;

/// By what a claim is known when it comes again: the org, its worker and its `request_id`.
type Key = (OrgId, Arc<str>, Arc<str>);

/// The latest calls of all claims with a `request_id` that are under way on this server.
#[derive(Default)]
pub(super) struct Repeats(Mutex<HashMap<Key, CancellationToken>>);

impl Repeats {
    /// Takes the place of an earlier call of the same claim, which ends: its caller has given it up, and a job that it took now would
    /// be held by nobody. `None` of a claim without a `request_id`.
    pub(super) fn supersede(self: &Arc<Self>, org: OrgId, claim: &Claim) -> Option<Latest> {
        let request = claim.request.as_ref()?;
        let key = (org, Arc::clone(&claim.worker), Arc::clone(request));
        let superseded = CancellationToken::new();
        if let Some(earlier) = self.calls().insert(key.clone(), superseded.clone()) {
            earlier.cancel();
        }
        Some(Latest { repeats: Arc::clone(self), key, superseded })
    }

    /// The map stays whole whatever panics beside it.
    fn calls(&self) -> MutexGuard<'_, HashMap<Key, CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The latest call of a claim, for as long as it is under way.
pub(super) struct Latest {
    repeats: Arc<Repeats>,
    key: Key,
    superseded: CancellationToken,
}

impl Latest {
    /// Waits until a later call has taken its place.
    pub(super) async fn superseded(&self) {
        self.superseded.cancelled().await;
    }
}

impl Drop for Latest {
    fn drop(&mut self) {
        let mut calls = self.repeats.calls();
        // The place of one that was superseded is another's.
        if !self.superseded.is_cancelled() {
            calls.remove(&self.key);
        }
    }
}
