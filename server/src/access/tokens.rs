//! API tokens that were looked up, for as long as nobody has made or revoked one since.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, TryAcquireError},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{
    credential::{Credential, Principal, Refusal},
    token::TokenText,
};
use crate::{
    domain::access::{ApiToken, Role},
    generations::Generations,
    store::{Store, StoreError},
};

/// How often servers look whether a token was made or revoked.
const LOOK: Duration = Duration::from_secs(1);
/// What is known counts no longer than this after the last look: a revoked token is refused within 5 s even where the database
/// can't be asked.
const HOLDS: Duration = Duration::from_secs(4);
/// Tokens that are remembered, at most.
const REMEMBERED: usize = 10_000;
/// Tokens that are looked up at the same time, and that may wait for it: who makes tokens up must not keep the database from others.
const LOOKED_UP: usize = 2;
const MAY_WAIT: usize = 64;

/// See the module.
pub(super) struct Tokens {
    store: Arc<dyn Store>,
    state: Mutex<State>,
    places: Semaphore,
    turns: Semaphore,
}

struct State {
    known: Generations<TokenText, Arc<Credential>>,
    /// All that somebody calls with, known or forgotten.
    held: HashMap<TokenText, Weak<Credential>>,
    /// What the database said the last time that it was asked, and when that was.
    revision: i64,
    looked_at: Instant,
}

impl Tokens {
    pub(super) async fn open(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let looked_at = Instant::now();
        let revision = store.about().await?.credentials;
        let known = Generations::new(REMEMBERED);
        let state = Mutex::new(State { known, held: HashMap::new(), revision, looked_at });
        let (places, turns) = (Semaphore::new(LOOKED_UP + MAY_WAIT), Semaphore::new(LOOKED_UP));
        Ok(Self { store, state, places, turns })
    }

    /// True if there has ever been one.
    pub(super) fn were_made(&self) -> bool {
        self.state().revision > 0
    }

    /// Whose a token is, if that is remembered and still holds.
    pub(super) fn known(&self, token: &TokenText) -> Option<Arc<Credential>> {
        let mut state = self.state();
        if state.looked_at.elapsed() > HOLDS {
            return None;
        }
        state.known.get(token).cloned()
    }

    /// Looks a token up.
    pub(super) async fn find(&self, token: &TokenText) -> Result<Arc<Credential>, Refusal> {
        let _place = self.places.try_acquire().map_err(|error| match error {
            TryAcquireError::NoPermits | TryAcquireError::Closed => Refusal::Busy,
        })?;
        let _turn = self.turns.acquire().await.map_err(|_| Refusal::Busy)?;
        // Another may have looked it up meanwhile.
        if let Some(known) = self.known(token) {
            return Ok(known);
        }
        loop {
            let revision = self.state().revision;
            let found = self.look(token).await?;
            let mut state = self.state();
            if state.revision != revision {
                // It may have been revoked since.
                continue;
            }
            let held = state.held.get(token).and_then(Weak::upgrade);
            let credential = held.unwrap_or_else(|| Credential::new(principal(found)));
            state.held.insert(*token, Arc::downgrade(&credential));
            state.known.insert(*token, Arc::clone(&credential));
            return Ok(credential);
        }
    }

    /// The token in the database, if it still holds.
    async fn look(&self, token: &TokenText) -> Result<ApiToken, Refusal> {
        match self.store.token(token.org, token.digest).await {
            Ok(Some(found)) if found.revoked_at.is_some() => Err(Refusal::Revoked),
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(Refusal::Unknown),
            Err(error) => {
                tracing::debug!(%error, "a token can't be looked up");
                Err(Refusal::Unavailable)
            }
        }
    }

    /// Looks now and then whether tokens were made or revoked, and ends the calls of those that were.
    pub(super) async fn watch(&self) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let looked_at = Instant::now();
            let Ok(Ok(about)) = timeout(HOLDS, self.store.about()).await else { continue };
            let held: Vec<_> = {
                let mut state = self.state();
                state.held.retain(|_, held| held.strong_count() > 0);
                state.looked_at = looked_at;
                if state.revision == about.credentials {
                    continue;
                }
                state.revision = about.credentials;
                state.known = Generations::new(REMEMBERED);
                state.held.iter().filter_map(|(token, held)| Some((*token, held.upgrade()?))).collect()
            };
            tracing::info!(calls = held.len(), "API tokens were made or revoked; looking again");
            for (token, credential) in held {
                if let Err(Refusal::Revoked | Refusal::Unknown) = self.look(&token).await {
                    credential.end();
                    self.state().held.remove(&token);
                }
            }
        }
    }

    /// The maps stay whole whatever panics beside them.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn principal(token: ApiToken) -> Principal {
    // An operator is one without an org.
    let roles = if token.org.is_some() { token.roles.without(Role::Operator) } else { token.roles };
    Principal { name: token.name.into(), org: token.org, roles, expires_at: token.expires_at }
}
