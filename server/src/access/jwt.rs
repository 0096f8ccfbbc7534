//! JWTs (RFC 7519), verified with the key that they name, by the one algorithm of that key.

use std::{
    collections::HashMap,
    net::IpAddr,
    panic::resume_unwind,
    sync::{Arc, Weak},
    thread,
};

use chrono::{DateTime, TimeDelta};
use jsonwebtoken::{Validation, decode, decode_header, errors::ErrorKind};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Map, Value};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::{
    AccessError,
    config::JwtConfig,
    credential::{Credential, Principal, Refusal},
    gate::Gate,
    keys::{Key, Keys},
};
use crate::{
    domain::{
        access::{NO_ORG, Role, Roles},
        clock::{Clock as _, SystemClock},
        id::{Digest, OrgId},
    },
    generations::Generations,
};

/// The longest JWT, in bytes.
const MAX_TOKEN: usize = 8 << 10;
/// Verified JWTs that are cached. Verifying one takes longer than many calls do.
const REMEMBERED: usize = 10_000;
/// Calls with unverified JWTs that may wait from one address: a client may begin many calls with a new JWT at once.
const MAY_WAIT_OF_ADDRESS: usize = 512;

pub(super) struct Jwt {
    config: JwtConfig,
    keys: Keys,
    state: Mutex<JwtCache>,
    gate: Gate,
}

struct JwtCache {
    known: Generations<Digest, Verified>,
    /// Credentials of JWTs that are in use, cached or not, by the JWT's digest; with the digest of the key that verified it.
    held: HashMap<Digest, (Digest, Weak<Credential>)>,
}

/// A verified JWT. It stays valid as long as its key does.
#[derive(Clone)]
struct Verified {
    credential: Arc<Credential>,
}

impl Jwt {
    pub(super) async fn open(config: &JwtConfig) -> Result<Self, AccessError> {
        Ok(Self::of(config.clone(), Keys::open(config).await?))
    }

    /// Accepts JWTs of HS256 with this secret only.
    pub(super) fn with_secret(config: JwtConfig, secret: &[u8]) -> Self {
        Self::of(config, Keys::of_secret(secret))
    }

    fn of(config: JwtConfig, keys: Keys) -> Self {
        let state = Mutex::new(JwtCache { known: Generations::new(REMEMBERED), held: HashMap::new() });
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self { config, keys, state, gate: Gate::new(processors / 2, MAY_WAIT_OF_ADDRESS) }
    }

    /// The credential of the JWT with this digest, if it is cached.
    pub(super) fn known(&self, digest: &Digest) -> Option<Arc<Credential>> {
        self.state().known.get(digest).map(|known| Arc::clone(&known.credential))
    }

    /// Verifies a JWT, in a turn of this address and on a blocking thread, since it takes as long as many calls do.
    pub(super) async fn find(
        self: &Arc<Self>,
        text: &str,
        digest: Digest,
        from: IpAddr,
    ) -> Result<Arc<Credential>, Refusal> {
        // A JWT that no known key can have signed is refused without a turn.
        self.key(text)?;
        let entered = self.gate.enter(from).await?;
        // Another call may have verified the same JWT meanwhile.
        if let Some(known) = self.known(&digest) {
            return Ok(known);
        }
        let (jwt, text) = (Arc::clone(self), text.to_owned());
        let verified = spawn_blocking(move || {
            // The turn lasts until the work is done, even if the caller has gone.
            let _entered = entered;
            jwt.credential(&text, digest)
        });
        match verified.await {
            Ok(verified) => verified,
            // A panic is passed on to the call that caused it.
            Err(ended) if ended.is_panic() => resume_unwind(ended.into_panic()),
            Err(_) => Err(Refusal::Busy),
        }
    }

    /// Verifies a JWT that has this digest, and caches its credential.
    pub(super) fn credential(&self, text: &str, digest: Digest) -> Result<Arc<Credential>, Refusal> {
        loop {
            let keys = self.keys.now();
            let (principal, key) = self.verify(text)?;
            let mut state = self.state();
            if !Arc::ptr_eq(&keys, &self.keys.now()) {
                // The keys changed during the verification: the JWT's key may be gone.
                continue;
            }
            // All calls with one JWT share a credential, so that they all end with its key.
            let held = state.held.get(&digest).filter(|(by, _)| *by == key).and_then(|(_, held)| held.upgrade());
            let credential = held.unwrap_or_else(|| Credential::new(principal));
            if state.held.len() > 2 * REMEMBERED {
                state.held.retain(|_, (_, held)| held.strong_count() > 0);
            }
            state.held.insert(digest, (key, Arc::downgrade(&credential)));
            state.known.insert(digest, Verified { credential: Arc::clone(&credential) });
            return Ok(credential);
        }
    }

    /// When the keys change, clears the cache, and ends the calls with JWTs whose key is gone.
    pub(super) async fn watch(&self) {
        self.keys
            .watch(|keys| {
                let mut state = self.state();
                state.known = Generations::new(REMEMBERED);
                state.held.retain(|_, (key, held)| {
                    let Some(held) = held.upgrade() else { return false };
                    let holds = keys.iter().any(|known| known.digest == *key);
                    if !holds {
                        held.end(Refusal::Revoked);
                    }
                    holds
                });
            })
            .await;
    }

    /// The key that the JWT's header names.
    fn key(&self, text: &str) -> Result<Arc<Key>, Refusal> {
        if text.len() > MAX_TOKEN {
            return Err(Refusal::Jwt("it is too long"));
        }
        let header = decode_header(text).map_err(|_| Refusal::Jwt("its header can't be read"))?;
        // RFC 7515, 4.1.11: a JWT with critical headers that are not understood must be refused. None is understood here.
        if header.crit.is_some() {
            return Err(Refusal::Jwt("it has critical headers"));
        }
        if !header.typ.as_deref().is_none_or(is_access_token) {
            return Err(Refusal::Jwt("its typ is not JWT or at+jwt"));
        }
        self.keys.find(header.kid.as_deref(), header.alg).ok_or(Refusal::Jwt("its key is unknown"))
    }

    /// The principal of a valid JWT, and the digest of its key.
    fn verify(&self, text: &str) -> Result<(Principal, Digest), Refusal> {
        let key = self.key(text)?;
        let mut rules = Validation::new(key.algorithm);
        rules.set_required_spec_claims(&["exp", "iss", "aud"]);
        rules.set_issuer(&[&self.config.issuer]);
        rules.set_audience(&[&self.config.audience]);
        rules.validate_nbf = true;
        rules.leeway = self.config.leeway.as_secs();
        let claims =
            decode::<Map<String, Value>>(text, &key.decoding, &rules).map_err(|error| refused(error.kind()))?;
        Ok((self.principal(&Value::Object(claims.claims))?, key.digest))
    }

    fn principal(&self, claims: &Value) -> Result<Principal, Refusal> {
        let JwtConfig { org_claim, subject_claim, roles_claim, leeway, max_lifetime, .. } = &self.config;
        let name = claim(claims, subject_claim).and_then(Value::as_str).unwrap_or_default();
        if !Principal::is_name(name) {
            return Err(Refusal::Jwt("its subject claim is missing or not a valid name"));
        }
        let org = match claim(claims, org_claim) {
            None | Some(Value::Null) => None,
            Some(org) => {
                let org = org.as_str().and_then(|org| Uuid::try_parse(org).ok()).filter(|org| *org != NO_ORG);
                Some(org.ok_or(Refusal::Jwt("its org is no UUID"))?)
            }
        };
        let named = self.roles(claim(claims, roles_claim));
        // Only principals without an org can be operators.
        let roles = if org.is_some() { named.without(Role::Operator) } else { named };
        if org.is_none() && !roles.has(Role::Operator) {
            return Err(Refusal::Jwt("it has neither an org nor the operator role"));
        }
        let time = |name: &str| {
            let seconds = claims.get(name).and_then(Value::as_f64).map(|seconds| seconds as i64);
            seconds.and_then(|seconds| DateTime::from_timestamp(seconds, 0))
        };
        let unreadable = Refusal::Jwt("its times can't be read");
        let (now, end) = (SystemClock.now(), time("exp").ok_or(unreadable)?);
        let issued = match claims.get("iat") {
            None => now,
            Some(_) => time("iat").ok_or(unreadable)?,
        };
        if (issued - now).to_std().is_ok_and(|ahead| ahead > *leeway) {
            return Err(Refusal::Jwt("its iat is in the future"));
        }
        if (end - issued.min(now)).to_std().is_ok_and(|lifetime| lifetime > *max_lifetime) {
            return Err(Refusal::Jwt("its lifetime is longer than the server allows"));
        }
        let expires_at = TimeDelta::from_std(*leeway).ok().and_then(|leeway| end.checked_add_signed(leeway));
        let expires_at = Some(expires_at.ok_or(unreadable)?);
        Ok(Principal { name: format!("jwt:{name}").into(), org: org.map(OrgId), roles, expires_at })
    }

    /// The roles that the claim names, by the configured role names.
    fn roles(&self, claim: Option<&Value>) -> Roles {
        let words: Vec<&str> = match claim {
            Some(Value::String(words)) => words.split_whitespace().collect(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let mut roles = Vec::new();
        for word in &words {
            if self.config.roles.is_empty() {
                roles.extend(Role::parse(word));
            }
            roles.extend(self.config.roles.iter().filter(|(name, _)| name == word).map(|(_, role)| *role));
        }
        let is_operator = self.config.operator_role.as_deref().is_some_and(|name| words.contains(&name));
        let roles = roles.into_iter().filter(|role| *role != Role::Operator);
        roles.chain(is_operator.then_some(Role::Operator)).collect()
    }

    fn state(&self) -> MutexGuard<'_, JwtCache> {
        self.state.lock()
    }
}

/// True if this `typ` is allowed for an access token (RFC 7519, 5.1; RFC 9068, 2.1).
fn is_access_token(typ: &str) -> bool {
    ["JWT", "at+jwt", "application/at+jwt"].iter().any(|name| typ.eq_ignore_ascii_case(name))
}

/// A claim, by its name or by a JSON pointer.
fn claim<'a>(claims: &'a Value, name: &str) -> Option<&'a Value> {
    if name.starts_with('/') { claims.pointer(name) } else { claims.get(name) }
}

fn refused(error: &ErrorKind) -> Refusal {
    match error {
        ErrorKind::ExpiredSignature => Refusal::Expired,
        ErrorKind::ImmatureSignature => Refusal::Jwt("it is not valid yet"),
        ErrorKind::InvalidIssuer => Refusal::Jwt("its iss is another issuer"),
        ErrorKind::InvalidAudience => Refusal::Jwt("its aud is another audience"),
        ErrorKind::MissingRequiredClaim(_) => Refusal::Jwt("it lacks exp, iss or aud"),
        ErrorKind::InvalidSignature => Refusal::Jwt("its signature is wrong"),
        _ => Refusal::Jwt("it can't be read"),
    }
}
