//! A job's status.

use std::fmt;

/// The status of a job. The names are those of the database's CHECK constraint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobStatus {
    /// Waiting to be worked on.
    Queued,
    /// Being worked on.
    Running,
    /// Ended with success. Final.
    Succeeded,
    /// Ended with an error; no retry follows by itself.
    Failed,
    /// Ended because somebody asked for it.
    Canceled,
    /// Failed `max_attempts` times, where that is more than one.
    DeadLetter,
}

impl JobStatus {
    /// Every status, in the order of the contract.
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Canceled, Self::DeadLetter];

    /// The name in the database.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
            Self::DeadLetter => "dead_letter",
        }
    }

    /// The status with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }

    /// True for a status that a job leaves only on request, if at all.
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Queued | Self::Running => false,
            Self::Succeeded | Self::Failed | Self::Canceled | Self::DeadLetter => true,
        }
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
