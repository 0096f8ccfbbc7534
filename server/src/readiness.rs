//! What a server finds of itself, for whoever asks for its health.

use std::fmt;

/// Whether a server can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// It can.
    Ready,
    /// The database doesn't answer, or not in time.
    NoDatabase,
    /// Commands wait, and none is decided.
    Stalled,
    /// A newer server has migrated the database: what this one would write there may be wrong.
    Outdated,
    /// It is going away.
    Stopping,
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::NoDatabase => "not ready: the database does not answer in time",
            Self::Stalled => "not ready: commands wait, and none is decided",
            Self::Outdated => "not ready: a newer jobledger has migrated the database",
            Self::Stopping => "not ready: shutting down",
        })
    }
}
