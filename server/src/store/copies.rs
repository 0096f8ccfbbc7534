//! What a restore is asked to do, and what it did.

use std::path::PathBuf;

use crate::domain::id::LogId;

/// Which API tokens are revoked in a restored database, besides those that are revoked in the copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RevokeTokens {
    /// Tokens that are revoked in the replaced database.
    RevokedSince,
    /// All tokens.
    All,
}

/// What a restore did.
#[derive(Debug)]
pub struct Restored {
    /// The new id of the log.
    pub log_id: LogId,
    /// The replaced file's new name; `None` if there was no file.
    pub replaced: Option<PathBuf>,
    /// How many API tokens were revoked; `None` if the replaced database could not be read for them.
    pub revoked: Option<usize>,
}
