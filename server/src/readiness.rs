//! Whether the server is ready, for health checks.

use std::fmt;

/// Whether the server can serve calls, and why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    Ready,
    /// The database doesn't answer, or too late.
    NoDatabase,
    /// Commands wait in the lanes, and none is decided.
    Stalled,
    /// A newer server has migrated the database: what this one would write may be wrong there.
    Outdated,
    /// The server is shutting down.
    Stopping,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::NoDatabase => "not ready: the database does not answer in time",
            Self::Stalled => "not ready: queued commands make no progress",
            Self::Outdated => "not ready: a newer jobledger has migrated the database",
            Self::Stopping => "not ready: shutting down",
        })
    }
}
