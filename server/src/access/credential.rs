//! What was found of a credential.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use tokio_util::sync::CancellationToken;

use crate::domain::{access::Roles, clock::Time, id::OrgId, name::is_seen};

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// By which jobs and events tell who it was, with the kind of its credential: `token:importer`, `jwt:alice`, `cert:dns:a.example`.
    pub name: Arc<str>,
    /// Whose it is; `None` for operators, who name an org with each call.
    pub org: Option<OrgId>,
    /// What it may do.
    pub roles: Roles,
    /// From when on it may not.
    pub expires_at: Option<Time>,
}

impl Principal {
    /// The characters of a name, at most: with the kind of its credential it is a name of a job's.
    pub const MAX_NAME_CHARS: usize = 240;

    /// What a name may be: not too long, and seen whole.
    pub fn is_name(name: &str) -> bool {
        (1..=Self::MAX_NAME_CHARS).contains(&name.chars().count()) && is_seen(name)
    }
}

/// A principal, for as long as its credential holds.
pub struct Credential {
    /// Who it lets in.
    pub principal: Principal,
    ended: CancellationToken,
    why: OnceLock<Refusal>,
}

impl Credential {
    pub(super) fn new(principal: Principal) -> Arc<Self> {
        Arc::new(Self { principal, ended: CancellationToken::new(), why: OnceLock::new() })
    }

    /// It lets nobody in any more.
    pub(super) fn end(&self, why: Refusal) {
        // The first reason counts.
        let _ = self.why.set(why);
        self.ended.cancel();
    }

    /// Why it lets nobody in any more, for another reason than its time; `None` as long as it does.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.why.get().copied()
    }

    /// Done once it was ended: why.
    pub(super) async fn ended(&self) -> Refusal {
        self.ended.cancelled().await;
        self.refusal().unwrap_or(Refusal::Revoked)
    }
}

/// Why a call is not let in. None of it says anything about what is in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It presents nothing.
    Nothing,
    /// What it presents is nothing that lets anybody in.
    Malformed,
    /// This server doesn't take credentials of the kind.
    NotTaken(&'static str),
    /// It is not known, or says it is somebody who is not.
    Unknown,
    /// Its time is over.
    Expired,
    /// It was revoked.
    Revoked,
    /// It is a JWT that does not hold.
    Jwt(&'static str),
    /// Too many unknown ones are being looked up.
    Busy,
    /// Nobody can tell: the database doesn't answer.
    Unavailable,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => {
                f.write_str("credentials are needed: authorization: Bearer TOKEN, or a client certificate")
            }
            Self::Malformed => f.write_str("the authorization header must be: Bearer, and an API token or a JWT"),
            Self::NotTaken(kind) => write!(f, "this server takes no {kind}"),
            Self::Unknown => f.write_str("the credential is unknown"),
            Self::Expired => f.write_str("the credential has expired"),
            Self::Revoked => f.write_str("the credential was revoked"),
            Self::Jwt(why) => write!(f, "the JWT does not hold: {why}"),
            Self::Busy => f.write_str("too many credentials are being looked up; try again shortly"),
            Self::Unavailable => f.write_str("the database is not available to look the credential up; try again"),
        }
    }
}
