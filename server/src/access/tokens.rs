//! API tokens: looked up in the database, and cached until they are revoked.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    credential::{Credential, Principal, Refusal},
    gate::Gate,
    token::TokenText,
};
use crate::{
    domain::access::{ApiToken, Role},
    generations::Generations,
    store::{Store, StoreError, TokenKey},
};

/// How often the revision of the credentials is read: the database raises it when a token is revoked.
const LOOK: Duration = Duration::from_secs(1);
/// Cached tokens are valid for this long after the last read of the revision. So even without an answer of the
/// database a revoked token is refused within 5 s.
const HOLDS: Duration = Duration::from_secs(4);
/// After a change, each token in doubt must be checked within this time. Else it is dropped, and its calls end.
const SURE_WITHIN: Duration = Duration::from_secs(2);
/// The time limit for one such check, and the pause after a round of checks that left some open.
const ONE_WITHIN: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(200);
/// Tokens that are cached.
const REMEMBERED: usize = 10_000;
/// Revoked tokens that are read at once. After more, all cached tokens are checked.
const REVOKED_AT_ONCE: usize = 1_000;
/// Look-ups at the same time, and callers of one address that may wait for one.
const LOOKED_UP: usize = 2;
const MAY_WAIT_OF_ADDRESS: usize = 16;

/// How often the last use of a token is written.
const NOTED_EVERY: Duration = Duration::from_secs(60);
/// Tokens in one such write.
const NOTED_AT_ONCE: usize = 500;

pub(super) struct Tokens {
    store: Arc<dyn Store>,
    state: Mutex<TokenCache>,
    gate: Gate,
    /// Notified when there are tokens to check again.
    doubted: Notify,
}

struct TokenCache {
    known: Generations<TokenText, Arc<Credential>>,
    /// Credentials of tokens that are in use, cached or not.
    held: HashMap<TokenText, Weak<Credential>>,
    /// Tokens to check again.
    doubts: HashMap<TokenText, Doubt>,
    /// Tokens that were used lately.
    uses: HashMap<TokenText, Use>,
    /// The last revision read, and when its read began.
    revision: i64,
    looked_at: Instant,
}

/// The uses of a token.
#[derive(Default)]
struct Use {
    noted_at: Option<Instant>,
    /// Whether it was used since `noted_at`.
    is_used: bool,
}

/// A token that may have been revoked.
#[derive(Clone)]
struct Doubt {
    credential: Arc<Credential>,
    /// The revision at which it has to be valid.
    revision: i64,
    since: Instant,
}

impl TokenCache {
    /// Marks those of these tokens that are cached or in use to be checked at this revision; `None`: of all tokens. Returns their
    /// number.
    fn doubt(&mut self, tokens: Option<&HashSet<TokenKey>>, revision: i64) -> usize {
        let since = Instant::now();
        let held = self.held.iter().filter_map(|(token, held)| Some((*token, held.upgrade()?)));
        let known = self.known.iter().map(|(token, known)| (*token, Arc::clone(known)));
        let is_doubted = |token: &TokenText| tokens.is_none_or(|tokens| tokens.contains(&(token.org, token.digest)));
        let doubted: HashMap<_, _> = held.chain(known).filter(|(token, _)| is_doubted(token)).collect();
        let tokens = doubted.len();
        for (token, credential) in doubted {
            let doubt = self.doubts.entry(token).or_insert(Doubt { credential, revision, since });
            doubt.revision = revision;
        }
        tokens
    }

    /// Unmarks a token that is valid at this revision.
    fn make_sure(&mut self, token: &TokenText, revision: i64) {
        if self.doubts.get(token).is_some_and(|doubt| doubt.revision <= revision) {
            self.doubts.remove(token);
        }
    }

    fn note_use(&mut self, token: &TokenText) {
        if self.uses.len() < REMEMBERED || self.uses.contains_key(token) {
            self.uses.entry(*token).or_default().is_used = true;
        }
    }

    /// Takes the tokens whose last use is to be written.
    fn take_uses(&mut self) -> Vec<TokenText> {
        let is_old = |of_token: &Use| of_token.noted_at.is_none_or(|at| at.elapsed() >= NOTED_EVERY);
        self.uses.retain(|_, of_token| of_token.is_used || !is_old(of_token));
        let due = self.uses.iter_mut().filter(|(_, of_token)| of_token.is_used && is_old(of_token));
        let due = due.take(NOTED_AT_ONCE).map(|(token, of_token)| {
            *of_token = Use { noted_at: Some(Instant::now()), is_used: false };
            *token
        });
        due.collect()
    }

    /// Puts back tokens whose use could not be written.
    fn put_uses_back(&mut self, taken: &[TokenText]) {
        for token in taken {
            self.uses.insert(*token, Use { noted_at: None, is_used: true });
        }
    }

    fn forget(&mut self, token: &TokenText) {
        self.doubts.remove(token);
        self.known.remove(token);
        self.held.remove(token);
    }
}

impl Tokens {
    pub(super) async fn open(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let looked_at = Instant::now();
        let revision = store.about().await?.credentials;
        let (known, held, doubts) = (Generations::new(REMEMBERED), HashMap::new(), HashMap::new());
        let state = Mutex::new(TokenCache { known, held, doubts, uses: HashMap::new(), revision, looked_at });
        Ok(Self { store, state, gate: Gate::new(LOOKED_UP, MAY_WAIT_OF_ADDRESS), doubted: Notify::new() })
    }

    /// True if any token was ever made.
    pub(super) fn were_made(&self) -> bool {
        self.state().revision > 0
    }

    /// The credential of a cached token; `None` if the last read of the revision, or the token's check, is overdue.
    pub(super) fn known(&self, token: &TokenText) -> Option<Arc<Credential>> {
        let mut state = self.state();
        let is_unsure = state.doubts.get(token).is_some_and(|doubt| doubt.since.elapsed() > SURE_WITHIN);
        if state.looked_at.elapsed() > HOLDS || is_unsure {
            return None;
        }
        let known = state.known.get(token).cloned()?;
        state.note_use(token);
        Some(known)
    }

    /// Looks a token up, in a turn of this address.
    pub(super) async fn find(&self, token: &TokenText, from: IpAddr) -> Result<Arc<Credential>, Refusal> {
        let _entered = self.gate.enter(from).await?;
        // Another call may have looked it up meanwhile.
        if let Some(known) = self.known(token) {
            return Ok(known);
        }
        loop {
            let revision = self.state().revision;
            let found = self.look_up(token).await?;
            let mut state = self.state();
            if state.revision != revision {
                // The revision changed during the look-up: the token may have been revoked.
                continue;
            }
            state.make_sure(token, revision);
            let held = state.held.get(token).and_then(Weak::upgrade);
            let credential = held.unwrap_or_else(|| Credential::new(principal(found)));
            state.held.insert(*token, Arc::downgrade(&credential));
            state.known.insert(*token, Arc::clone(&credential));
            state.note_use(token);
            return Ok(credential);
        }
    }

    /// Reads the token from the database. Refuses unknown and revoked ones.
    async fn look_up(&self, token: &TokenText) -> Result<ApiToken, Refusal> {
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

    /// Keeps the cache current, ends the calls of revoked tokens, and writes when tokens were used.
    pub(super) async fn watch(&self) {
        tokio::join!(self.look_for_changes(), self.make_sure(), self.note_uses());
    }

    /// Writes when tokens were last used, once a second.
    async fn note_uses(&self) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let taken = self.state().take_uses();
            if taken.is_empty() {
                continue;
            }
            let mut used: Vec<_> = taken.iter().map(|token| (token.org, token.digest)).collect();
            // All servers write the rows in the same order, so that they don't deadlock.
            used.sort_unstable_by_key(|(org, digest)| (*org, digest.0));
            if let Err(error) = self.store.use_tokens(&used).await {
                tracing::debug!(%error, "it can't be noted that tokens were used");
                self.state().put_uses_back(&taken);
            }
        }
    }

    async fn look_for_changes(&self) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let looked_at = Instant::now();
            let Ok(Ok((revision, revoked))) = timeout(HOLDS, self.look()).await else { continue };
            let mut state = self.state();
            state.held.retain(|_, held| held.strong_count() > 0);
            (state.looked_at, state.revision) = (looked_at, revision);
            let tokens = state.doubt(revoked.as_ref(), revision);
            if tokens > 0 {
                tracing::info!(tokens, "API tokens may have been revoked; re-checking them");
                self.doubted.notify_one();
            }
        }
    }

    /// The revision, and the tokens that were revoked since the last look. `None` if that can't be told: any may have been.
    async fn look(&self) -> Result<(i64, Option<HashSet<TokenKey>>), StoreError> {
        let revision = self.store.about().await?.credentials;
        let (since, looked_at) = {
            let state = self.state();
            (state.revision, state.looked_at)
        };
        // The database may be another one since, whose revisions are others; and rows of tokens that ended make room after a while.
        if revision < since || looked_at.elapsed() > HOLDS {
            return Ok((revision, None));
        }
        if revision == since {
            return Ok((revision, Some(HashSet::new())));
        }
        let revoked = self.store.revoked_tokens(since, REVOKED_AT_ONCE + 1).await?;
        Ok((revision, (revoked.len() <= REVOKED_AT_ONCE).then(|| revoked.into_iter().collect())))
    }

    /// Checks marked tokens until each is confirmed or dropped.
    async fn make_sure(&self) {
        loop {
            let mut doubts: Vec<_> = self.state().doubts.iter().map(|(token, doubt)| (*token, doubt.clone())).collect();
            if doubts.is_empty() {
                self.doubted.notified().await;
                continue;
            }
            // Tokens with open calls first: each call has a reference to its credential.
            doubts.sort_by_key(|(_, doubt)| Reverse(Arc::strong_count(&doubt.credential)));
            let queue = Mutex::new(doubts.into_iter());
            let next = || queue.lock().next();
            let unsure = AtomicUsize::new(0);
            let lane = async || {
                while let Some((token, doubt)) = next() {
                    if !self.settle(&token, &doubt).await {
                        unsure.fetch_add(1, Ordering::Relaxed);
                    }
                }
            };
            tokio::join!(lane(), lane(), lane(), lane());
            let tokens = unsure.into_inner();
            if tokens > 0 {
                tracing::warn!(
                    tokens,
                    "can't re-check API tokens: the database did not answer; ending their open calls"
                );
            }
            if !self.state().doubts.is_empty() {
                sleep(AGAIN).await;
            }
        }
    }

    /// Checks one marked token. Returns false if its calls end because the database did not answer in time.
    async fn settle(&self, token: &TokenText, doubt: &Doubt) -> bool {
        let looked = timeout(ONE_WITHIN, self.look_up(token)).await.unwrap_or(Err(Refusal::Unavailable));
        let mut state = self.state();
        let why = match looked {
            Ok(_) => {
                state.make_sure(token, doubt.revision);
                return true;
            }
            Err(why @ (Refusal::Revoked | Refusal::Unknown)) => why,
            Err(_) if doubt.since.elapsed() < SURE_WITHIN => return true,
            Err(_) => Refusal::Unavailable,
        };
        state.forget(token);
        if why == Refusal::Revoked {
            let name = &doubt.credential.principal.name;
            tracing::info!(%name, "an API token was revoked; ending its open calls");
        }
        doubt.credential.end(why);
        why != Refusal::Unavailable
    }

    fn state(&self) -> MutexGuard<'_, TokenCache> {
        self.state.lock()
    }
}

fn principal(token: ApiToken) -> Principal {
    // Only principals without an org can be operators.
    let roles = if token.org.is_some() { token.roles.without(Role::Operator) } else { token.roles };
    Principal { name: format!("token:{}", token.name).into(), org: token.org, roles, expires_at: token.expires_at }
}
