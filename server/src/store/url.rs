//! The URL of the database.

use std::{fmt, str::FromStr};

use super::StoreError;

/// The URL of the database.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// An SQLite file, `sqlite://PATH`.
    Sqlite(String),
    /// A database of a PostgreSQL server, `postgres://USER:PASSWORD@HOST:PORT/NAME`, as a whole URL.
    Postgres(String),
    /// Another URL with a user, and perhaps a password. It is refused when it is opened: an error of the argument parser would
    /// print the whole argument.
    Other,
}

const EXPECTED_URL: &str = "expected sqlite://PATH or postgres://USER@HOST/NAME, for instance sqlite://jobledger.db";

impl DatabaseUrl {
    /// `sqlite` or `postgresql`; empty for a URL that is refused.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "sqlite",
            Self::Postgres(_) => "postgresql",
            Self::Other => "",
        }
    }

    /// The error for [`DatabaseUrl::Other`].
    pub(super) fn refused() -> StoreError {
        StoreError::Unusable(EXPECTED_URL.to_owned())
    }
}

/// Without the password.
impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => f.debug_tuple("Sqlite").field(path).finish(),
            Self::Postgres(_) => f.write_str("Postgres(…)"),
            Self::Other => f.write_str("Other"),
        }
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            // Parsed when it is opened, for the same reason as `Other`.
            return Ok(Self::Postgres(url.to_owned()));
        }
        let Some(path) = url.strip_prefix("sqlite://").or_else(|| url.strip_prefix("sqlite:")) else {
            return if url.contains('@') { Ok(Self::Other) } else { Err(EXPECTED_URL.to_owned()) };
        };
        if path.is_empty() || path == ":memory:" || path == "memory:" {
            return Err("a ledger needs a file: an SQLite database in memory would lose acknowledged jobs".to_owned());
        }
        if path.contains('?') {
            return Err("parameters are not supported in a sqlite:// URL".to_owned());
        }
        Ok(Self::Sqlite(path.to_owned()))
    }
}
