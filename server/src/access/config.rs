//! What is to let callers in.

use std::{path::PathBuf, time::Duration};

use crate::domain::access::Role;

/// Whether callers have to say who they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Authentication {
    /// Only where a server listens elsewhere than on loopback, or takes JWTs or client certificates.
    #[default]
    Automatic,
    /// They have to.
    Required,
    /// Nobody has to, whoever can reach the server.
    Off,
}

/// What lets callers in, besides API tokens.
#[derive(Debug, Clone, Default)]
pub struct AccessConfig {
    /// Whether they have to say who they are.
    pub authentication: Authentication,
    /// JWTs.
    pub jwt: Option<JwtConfig>,
    /// The file that says who client certificates are.
    pub client_identities: Option<PathBuf>,
    /// Names that callers may call a server by that asks nobody who they are and that only its own machine can reach, beside localhost
    /// and addresses.
    pub allowed_hosts: Vec<String>,
}

impl AccessConfig {
    /// True if callers have to say who they are to a server that listens on loopback, or doesn't.
    pub fn is_on(&self, is_loopback: bool) -> bool {
        match self.authentication {
            Authentication::Required => true,
            Authentication::Off => false,
            Authentication::Automatic => !is_loopback || self.jwt.is_some() || self.client_identities.is_some(),
        }
    }
}

/// Where a set of public keys is (a JWKS, RFC 7517).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file, read again when it changes.
    File(PathBuf),
    /// A URL of http or https, read again now and then, and when a key is named that is not known.
    Url(String),
}

/// Which JWTs are taken, and what they say.
#[derive(Clone)]
pub struct JwtConfig {
    /// The keys of RS256, ES256 and EdDSA.
    pub keys: Option<KeySource>,
    /// The file with the secret of HS256: at least 32 bytes.
    pub hs256_secret: Option<PathBuf>,
    /// What `iss` must be.
    pub issuer: String,
    /// What `aud` must name.
    pub audience: String,
    /// The claims that say whose it is, who it is, and what it may do: names, or JSON pointers where they begin with a slash.
    pub org_claim: String,
    /// See `org_claim`.
    pub subject_claim: String,
    /// See `org_claim`: an array of strings, or one string of words.
    pub roles_claim: String,
    /// What roles are called there; where none is named, as here. Operators are not among them.
    pub roles: Vec<(String, Role)>,
    /// What operators are called there; `None`: no JWT makes one, since an operator is every org's.
    pub operator_role: Option<String>,
    /// For how long a JWT may hold, from when it was issued.
    pub max_lifetime: Duration,
    /// By how much clocks may differ.
    pub leeway: Duration,
    /// How often keys are read from a URL.
    pub refresh: Duration,
    /// How old keys may become that can't be read again: older ones are none.
    pub keys_max_age: Duration,
}

impl std::fmt::Debug for JwtConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JwtConfig")
            .field("issuer", &self.issuer)
            .field("audience", &self.audience)
            .finish_non_exhaustive()
    }
}
