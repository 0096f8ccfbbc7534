//! Keys that verify JWTs: a JWKS from a file or a URL, and an HS256 secret. All are read again when they may have changed.

use std::{path::Path, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyOperations, PublicKeyUse},
};
use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use url::Url;

use super::{
    AccessError,
    config::{JwtConfig, KeySource},
    file,
};
use crate::domain::id::Digest;

/// The time limit for reading a URL.
const FETCH_WITHIN: Duration = Duration::from_secs(10);
/// The shortest time between two reads of a URL, however many unknown keys are named.
const FETCH_PAUSE: Duration = Duration::from_secs(10);
/// The longest time until a URL that could not be read is read again.
const FETCH_AGAIN: Duration = Duration::from_secs(30);
/// The largest JWKS, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// RFC 7518, 3.2: a key must have at least the size of the hash.
const MIN_SECRET: usize = 32;

/// A key with its one algorithm. The algorithm that a JWT names must be this one.
pub(super) struct Key {
    kid: Option<String>,
    pub(super) algorithm: Algorithm,
    pub(super) decoding: DecodingKey,
    /// Identifies the key when the set is read again.
    pub(super) digest: Digest,
}

/// All keys at one time.
pub(super) type KeySet = Arc<Vec<Arc<Key>>>;

/// The current keys, and where they come from.
pub(super) struct Keys {
    source: Option<KeySource>,
    secret: Option<Arc<Key>>,
    secret_file: Option<std::path::PathBuf>,
    refresh: Duration,
    max_age: Duration,
    client: Option<Client<HttpsConnector<HttpConnector>, Empty<Bytes>>>,
    now: RwLock<KeySet>,
    /// Notified when a JWT names an unknown key.
    missing: Notify,
}

impl Keys {
    pub(super) async fn open(config: &JwtConfig) -> Result<Self, AccessError> {
        let secret = match &config.hs256_secret {
            Some(path) => Some(Arc::new(secret_key(path)?)),
            None => None,
        };
        let client = match &config.keys {
            Some(KeySource::Url(url)) => {
                if url.starts_with("http://") {
                    tracing::warn!(
                        url = shown(url),
                        "the JWKS URL is not HTTPS: an attacker on the network can replace the keys"
                    );
                }
                Some(client()?)
            }
            _ => None,
        };
        let keys = Self {
            source: config.keys.clone(),
            secret,
            secret_file: config.hs256_secret.clone(),
            refresh: config.refresh,
            max_age: config.keys_max_age,
            client,
            now: RwLock::default(),
            missing: Notify::new(),
        };
        let (read, _) = keys.read().await.map_err(AccessError::Unusable)?;
        // Only at the start: later an empty set may be meant to withdraw all keys.
        if read.is_empty() {
            return Err(AccessError::Unusable("the JWKS has no key for RS256, ES256 or EdDSA".to_owned()));
        }
        keys.set(read);
        Ok(keys)
    }

    /// A fixed secret, which is never read again.
    pub(super) fn of_secret(secret: &[u8]) -> Self {
        Self {
            source: None,
            secret: None,
            secret_file: None,
            refresh: Duration::MAX,
            max_age: Duration::MAX,
            client: None,
            now: RwLock::new(Arc::new(vec![Arc::new(hs256_key(secret))])),
            missing: Notify::new(),
        }
    }

    pub(super) fn now(&self) -> KeySet {
        Arc::clone(&self.now.read())
    }

    fn set(&self, keys: KeySet) {
        *self.now.write() = keys;
    }

    /// The key with this id and algorithm. A JWT without a key id only matches a key without one.
    pub(super) fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Arc<Key>> {
        let keys = self.now();
        let found = keys.iter().find(|key| key.kid.as_deref() == kid && key.algorithm == algorithm);
        if found.is_none() && kid.is_some() {
            self.missing.notify_one();
        }
        found.cloned()
    }

    /// Reads the keys again when they may have changed, and calls `changed` if they have.
    pub(super) async fn watch(&self, mut changed: impl FnMut(&KeySet)) {
        let is_url = matches!(self.source, Some(KeySource::Url(_)));
        let mut read_at = Instant::now();
        // The last successful read; `None` once its keys are too old to be valid.
        let mut good_at = Some(read_at);
        let mut last = None;
        loop {
            let is_failing = good_at != Some(read_at);
            let again = async {
                if is_url {
                    let longest = if is_failing { FETCH_AGAIN } else { self.max_age / 2 };
                    let pause = self.refresh.min(longest);
                    let _ = timeout(pause, self.missing.notified()).await;
                    sleep(FETCH_PAUSE.min(self.max_age / 2).saturating_sub(read_at.elapsed())).await;
                } else {
                    sleep(file::LOOK).await;
                }
            };
            let too_old = async {
                match good_at.filter(|_| self.source.is_some()) {
                    Some(good_at) => sleep(self.max_age.saturating_sub(good_at.elapsed())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = again => {}
                () = too_old => {
                    good_at = None;
                    last = None;
                    tracing::error!("the JWKS could not be read within --jwks-max-age: JWTs signed with its keys are refused");
                    // The secret is local, so an unreachable JWKS says nothing about it.
                    let secret = self.now().iter().filter(|key| key.algorithm == Algorithm::HS256).cloned().collect();
                    self.set(Arc::new(secret));
                    changed(&self.now());
                    continue;
                }
            }
            read_at = Instant::now();
            let read = self.read().await;
            if read.is_ok() {
                good_at = Some(read_at);
            }
            match read {
                Ok((_, digest)) if last == Some(digest) => {}
                Ok((keys, digest)) => {
                    let is_first = last.replace(digest).is_none();
                    let is_new = keys.iter().map(|key| key.digest).ne(self.now().iter().map(|key| key.digest));
                    if is_new {
                        tracing::info!(keys = keys.len(), "the JWT keys have changed");
                        self.set(Arc::clone(&keys));
                        changed(&keys);
                    } else if is_first {
                        tracing::debug!("the keys of JWTs were read again");
                    }
                }
                Err(error) if good_at.is_none() => {
                    tracing::warn!(error, "can't read the JWT keys; only the HS256 secret, if set, stays valid")
                }
                Err(error) => tracing::warn!(error, "can't read the JWT keys; the previous keys stay in use"),
            }
        }
    }

    /// Reads the keys. Returns them with a digest of what was read.
    async fn read(&self) -> Result<(KeySet, Digest), String> {
        let text = match &self.source {
            None => Vec::new(),
            Some(KeySource::File(path)) => {
                file::read_aside(path).await.map_err(|error| format!("can't read {}: {error}", path.display()))?
            }
            Some(KeySource::Url(url)) => {
                let fetched = timeout(FETCH_WITHIN, self.fetch(url)).await;
                fetched
                    .unwrap_or_else(|_| Err("no answer in time".to_owned()))
                    .map_err(|error| format!("{}: {error}", shown(url)))?
            }
        };
        let mut keys = match &self.source {
            None => Vec::new(),
            Some(_) => parse(&text)?,
        };
        let mut digest = Sha256::new();
        digest.update(&text);
        let secret = match &self.secret_file {
            Some(path) => Some(Arc::new(secret_key(path).map_err(|error| error.to_string())?)),
            None => self.secret.clone(),
        };
        if let Some(secret) = secret {
            digest.update(secret.digest.0);
            keys.push(secret);
        }
        Ok((Arc::new(keys), Digest(digest.finalize().into())))
    }

    async fn fetch(&self, url: &str) -> Result<Vec<u8>, String> {
        let client = self.client.as_ref().ok_or("no client")?;
        let url = url.parse().map_err(|error| format!("not a URL: {error}"))?;
        let answer = client.get(url).await.map_err(|error| chain(&error))?;
        if !answer.status().is_success() {
            return Err(format!("HTTP {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await.map_err(|error| error.to_string())?;
        Ok(body.to_bytes().to_vec())
    }
}

/// A URL without the parts that may have secrets: user info, query and fragment.
fn shown(url: &str) -> String {
    let Ok(mut url) = Url::parse(url) else { return "a URL that can't be parsed".to_owned() };
    url.set_query(None);
    url.set_fragment(None);
    // These fail only for URLs that can't have user info.
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url.into()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn client() -> Result<Client<HttpsConnector<HttpConnector>, Empty<Bytes>>, AccessError> {
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
        .map_err(|error| AccessError::Unusable(format!("the system's certificates can't be read: {error}")))?
        .https_or_http()
        .enable_http1()
        .build();
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

fn secret_key(path: &Path) -> Result<Key, AccessError> {
    let shown = || path.display().to_string();
    let mut bytes = file::read(path).map_err(|error| AccessError::File { path: shown(), error })?;
    // Editors end the last line with a newline, which is not part of the secret.
    while bytes.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        bytes.pop();
    }
    if bytes.len() < MIN_SECRET {
        return Err(AccessError::Unusable(format!("{}: an HS256 secret needs at least {MIN_SECRET} bytes", shown())));
    }
    Ok(hs256_key(&bytes))
}

fn hs256_key(secret: &[u8]) -> Key {
    let digest = Digest(Sha256::digest(secret).into());
    Key { kid: None, algorithm: Algorithm::HS256, decoding: DecodingKey::from_secret(secret), digest }
}

/// The usable keys of a JWKS. Others are ignored, as RFC 7517 (5) requires.
fn parse(text: &[u8]) -> Result<Vec<Arc<Key>>, String> {
    let set: JwkSet = serde_json::from_slice(text).map_err(|error| format!("not a JWKS: {error}"))?;
    Ok(set.keys.iter().filter_map(|jwk| key(jwk).map(Arc::new)).collect())
}

fn key(jwk: &Jwk) -> Option<Key> {
    let common = &jwk.common;
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        // Symmetric keys are not accepted in a set of public keys.
        _ => return None,
    };
    let is_named = |name: &str| name.eq_ignore_ascii_case(&format!("{algorithm:?}"));
    let is_for_this = common.key_algorithm.is_none_or(|named| is_named(&named.to_string()));
    let signs = common.public_key_use.as_ref().is_none_or(|purpose| *purpose == PublicKeyUse::Signature)
        && common.key_operations.as_ref().is_none_or(|operations| operations.contains(&KeyOperations::Verify));
    if !is_for_this || !signs {
        return None;
    }
    let decoding = DecodingKey::from_jwk(jwk).ok()?;
    let digest = Digest(Sha256::digest(serde_json::to_vec(jwk).ok()?).into());
    Some(Key { kid: common.key_id.clone(), algorithm, decoding, digest })
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn a_url_is_shown_without_its_secrets() {
        for (url, expected) in [
            ("https://example.com/jwks.json", "https://example.com/jwks.json"),
            ("https://user:pass@example.com:8443/a/b?token=x#y", "https://example.com:8443/a/b"),
            ("http://example.com?token=x/y@z", "http://example.com/"),
            ("no URL", "a URL that can't be parsed"),
        ] {
            assert_eq!(shown(url), expected);
        }
    }
}
