//! Roles and API tokens.

use std::{fmt, str::FromStr};

use uuid::Uuid;

use super::{
    clock::Time,
    id::{Digest, OrgId},
};

/// Stands for "no org" where an id is required: the Max UUID of RFC 9562. No org has this id.
pub const NO_ORG: Uuid = Uuid::max();

/// What a caller may do. All roles but [`Role::Operator`] apply within one org.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Creates, cancels and redrives jobs, and reads them.
    Producer,
    /// Claims jobs and reports on them, and reads them.
    Worker,
    /// Reads everything: jobs, all events, statistics.
    Observer,
    /// The same without contents: payloads, results, messages and error messages.
    Auditor,
    /// Everything that the roles above allow.
    Admin,
    /// The same as an admin, in any org; for credentials without an org.
    Operator,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 6] =
        [Self::Producer, Self::Worker, Self::Observer, Self::Auditor, Self::Admin, Self::Operator];

    /// The role's name, in the database and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Producer => "producer",
            Self::Worker => "worker",
            Self::Observer => "observer",
            Self::Auditor => "auditor",
            Self::Admin => "admin",
            Self::Operator => "operator",
        }
    }

    /// The role with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::parse(name).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str).join(", ");
            format!("unknown role {name:?}: expected one of {names}")
        })
    }
}

/// A set of roles.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// The set of these roles.
    pub const fn of(roles: &[Role]) -> Self {
        let mut set = 0;
        let mut n = 0;
        while n < roles.len() {
            set |= 1 << roles[n] as u8;
            n += 1;
        }
        Self(set)
    }

    /// True if the set has this role.
    pub const fn has(self, role: Role) -> bool {
        self.0 & (1 << role as u8) != 0
    }

    /// True if the two sets have a role in common.
    pub const fn meets(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// True if the set has no role.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set without one role.
    #[must_use]
    pub const fn without(self, role: Role) -> Self {
        Self(self.0 & !(1 << role as u8))
    }

    /// The roles of the set, in the order of [`Role::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Role> {
        Role::ALL.into_iter().filter(move |role| self.has(*role))
    }

    /// Parses names that are separated by commas. Unknown names are ignored.
    pub fn parse(names: &str) -> Self {
        names.split(',').filter_map(Role::parse).collect()
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        roles.into_iter().fold(Self::NONE, |set, role| Self(set.0 | Self::of(&[role]).0))
    }
}

/// Writes the names, separated by commas.
impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().map(Role::as_str).collect::<Vec<_>>().join(","))
    }
}

impl fmt::Debug for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

/// An API token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiToken {
    /// The id by which the token is revoked.
    pub id: Uuid,
    /// The org of the token; `None` for an operator's.
    pub org: Option<OrgId>,
    /// The SHA-256 of the secret.
    pub digest: Digest,
    /// The name of the caller in jobs and events: 1 to 240 characters.
    pub name: String,
    /// What the caller may do.
    pub roles: Roles,
    /// When the token was made.
    pub created_at: Time,
    /// When the token expires; `None`: never.
    pub expires_at: Option<Time>,
    /// When the token was revoked.
    pub revoked_at: Option<Time>,
    /// When the token was last used, to within a minute; `None` if never, or if the query did not read it.
    pub used_at: Option<Time>,
}
