//! Principals, cached credentials, and reasons for refusal.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use tokio_util::sync::CancellationToken;

use crate::domain::{access::Roles, clock::Time, id::OrgId, name::is_seen};

/// A caller, as authenticated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The actor in jobs and events. The prefix is the kind of credential: `token:importer`, `jwt:alice`, `cert:dns:a.example`.
    pub name: Arc<str>,
    /// The caller's org; `None` for operators, who name an org with each call.
    pub org: Option<OrgId>,
    /// The caller's roles.
    pub roles: Roles,
    /// When the credential expires.
    pub expires_at: Option<Time>,
}

impl Principal {
    /// The longest name, in characters. With its prefix it must fit where jobs and events name an actor (255).
    pub const MAX_NAME_CHARS: usize = 240;

    /// True for 1 to [`Self::MAX_NAME_CHARS`] characters, none of which is invisible or redirects text (control, bidi).
    pub fn is_name(name: &str) -> bool {
        (1..=Self::MAX_NAME_CHARS).contains(&name.chars().count()) && is_seen(name)
    }
}

/// A principal, until its credential ends.
pub struct Credential {
    /// The principal that the credential authenticates.
    pub principal: Principal,
    ended: CancellationToken,
    why: OnceLock<Refusal>,
}

impl Credential {
    pub(super) fn new(principal: Principal) -> Arc<Self> {
        Arc::new(Self { principal, ended: CancellationToken::new(), why: OnceLock::new() })
    }

    /// Ends the credential, and so the long calls made with it.
    pub(super) fn end(&self, why: Refusal) {
        // Only the first reason is kept.
        let _ = self.why.set(why);
        self.ended.cancel();
    }

    /// Why the credential was ended, except for expiry; `None` while it is valid.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.why.get().copied()
    }

    /// Completes with the reason once the credential was ended.
    pub(super) async fn ended(&self) -> Refusal {
        self.ended.cancelled().await;
        self.refusal().unwrap_or(Refusal::Revoked)
    }
}

/// Why a call is refused. No variant reveals anything about the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The call presents no credential.
    Nothing,
    /// The header is malformed, or is neither an API token nor a JWT.
    Malformed,
    /// This server does not accept credentials of this kind.
    NotTaken(&'static str),
    /// The credential is unknown, or no principal is configured for it.
    Unknown,
    /// The credential has expired.
    Expired,
    /// The credential was revoked.
    Revoked,
    /// The JWT is invalid, for this reason.
    Jwt(&'static str),
    /// Too many credentials are waiting to be checked.
    Busy,
    /// The credential can't be checked: the database does not answer.
    Unavailable,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => {
                f.write_str("missing credential: send authorization: Bearer TOKEN, or a client certificate")
            }
            Self::Malformed => f.write_str("malformed authorization header: expected Bearer and an API token or a JWT"),
            Self::NotTaken(kind) => write!(f, "this server does not accept {kind}"),
            Self::Unknown => f.write_str("the credential is unknown"),
            Self::Expired => f.write_str("the credential has expired"),
            Self::Revoked => f.write_str("the credential was revoked"),
            Self::Jwt(why) => write!(f, "invalid JWT: {why}"),
            Self::Busy => f.write_str("too many credentials are being looked up; try again shortly"),
            Self::Unavailable => {
                f.write_str("the database is unavailable, so the credential can't be checked; try again")
            }
        }
    }
}
