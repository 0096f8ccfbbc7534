//! Who may do what.

use std::{fmt, str::FromStr};

use uuid::Uuid;

use super::{
    clock::Time,
    id::{Digest, OrgId},
};

/// What stands for no org where an id has to be: the Max UUID of RFC 9562, which no org has.
pub const NO_ORG: Uuid = Uuid::max();

/// What a caller may do, within one org.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Creates, cancels and retries jobs, and sees them.
    Producer,
    /// Claims jobs and reports on them, and sees them.
    Worker,
    /// Sees all there is: jobs, every event, statistics.
    Observer,
    /// All of that.
    Admin,
    /// The same in any org: for credentials without one.
    Operator,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 5] = [Self::Producer, Self::Worker, Self::Observer, Self::Admin, Self::Operator];

    /// Its name, in the database and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Producer => "producer",
            Self::Worker => "worker",
            Self::Observer => "observer",
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
            format!("{name:?} is no role: they are {names}")
        })
    }
}

/// A set of roles.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// None.
    pub const NONE: Self = Self(0);

    /// These roles.
    pub const fn of(roles: &[Role]) -> Self {
        let mut set = 0;
        let mut n = 0;
        while n < roles.len() {
            set |= 1 << roles[n] as u8;
            n += 1;
        }
        Self(set)
    }

    /// True if the role is one of them.
    pub const fn has(self, role: Role) -> bool {
        self.0 & (1 << role as u8) != 0
    }

    /// True if they have a role in common.
    pub const fn meets(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// True if there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The same without one.
    #[must_use]
    pub const fn without(self, role: Role) -> Self {
        Self(self.0 & !(1 << role as u8))
    }

    /// Each.
    pub fn iter(self) -> impl Iterator<Item = Role> {
        Role::ALL.into_iter().filter(move |role| self.has(*role))
    }

    /// From their names, separated by commas; those that are unknown are none.
    pub fn parse(names: &str) -> Self {
        names.split(',').filter_map(Role::parse).collect()
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        roles.into_iter().fold(Self::NONE, |set, role| Self(set.0 | Self::of(&[role]).0))
    }
}

/// Their names, separated by commas.
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

/// What is known of an API token: all but its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiToken {
    /// By which it is revoked.
    pub id: Uuid,
    /// Whose it is; `None` for an operator's.
    pub org: Option<OrgId>,
    /// The SHA-256 of its secret.
    pub digest: Digest,
    /// Who calls with it: 1 to 255 characters.
    pub name: String,
    /// What its holder may do.
    pub roles: Roles,
    /// When it was made.
    pub created_at: Time,
    /// From when on it is refused.
    pub expires_at: Option<Time>,
    /// Since when it is refused.
    pub revoked_at: Option<Time>,
    /// When it was last called with, give or take a minute; `None` also where that was not looked up.
    pub used_at: Option<Time>,
}
