//! Configuration of access.

use std::{path::PathBuf, time::Duration};

use crate::domain::access::Role;

/// Whether callers must present credentials.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Authentication {
    /// Required unless the server listens on loopback only and takes neither JWTs nor client certificates.
    #[default]
    Automatic,
    /// Always required.
    Required,
    /// Never required: whoever can reach the server may call it.
    Off,
}

/// How callers are authenticated, besides API tokens.
#[derive(Debug, Clone, Default)]
pub struct AccessConfig {
    /// Whether callers must present credentials.
    pub authentication: Authentication,
    /// Which JWTs are accepted; `None`: none.
    pub jwt: Option<JwtConfig>,
    /// The file that maps names in client certificates to principals; `None`: certificates are not accepted.
    pub client_identities: Option<PathBuf>,
    /// Host names, besides localhost and addresses, by which callers may address a server that listens on loopback
    /// and requires no credentials.
    pub allowed_hosts: Vec<String>,
}

impl AccessConfig {
    /// True if the server requires credentials. `is_loopback`: it listens on loopback only.
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
    /// An http or https URL, read again every [`JwtConfig::refresh`], and when a JWT names an unknown key.
    Url(String),
}

/// Which JWTs are accepted, and how their claims are read.
#[derive(Clone)]
pub struct JwtConfig {
    /// Where the public keys for RS256, ES256 and EdDSA are.
    pub keys: Option<KeySource>,
    /// The file with the HS256 secret: at least 32 bytes.
    pub hs256_secret: Option<PathBuf>,
    /// The required `iss`.
    pub issuer: String,
    /// The `aud` that a JWT must name.
    pub audience: String,
    /// The claim with the org's id. All three claims are a name, or a JSON pointer, which begins with a slash.
    pub org_claim: String,
    /// The claim with the caller's name.
    pub subject_claim: String,
    /// The claim with the caller's roles: an array of strings, or one string of words.
    pub roles_claim: String,
    /// Role names in the claim, and the role of each. If empty, the claim has jobledger's names. Never the operator role.
    pub roles: Vec<(String, Role)>,
    /// The name of the operator role in the claim. `None`: no JWT makes an operator, because operators may act on every org.
    pub operator_role: Option<String>,
    /// The longest lifetime of a JWT, counted from its `iat`.
    pub max_lifetime: Duration,
    /// By how much clocks may differ.
    pub leeway: Duration,
    /// How often keys are read from a URL.
    pub refresh: Duration,
    /// How long keys that can't be read again remain valid.
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
