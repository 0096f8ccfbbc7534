//! What PostgreSQL's error codes mean for the ledger (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).

use super::warnings::heard;
use crate::store::StoreError;

/// What an error means for the caller. For the answer to COMMIT use [`commit_error`].
pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    let text = error.to_string();
    if lacks_partition(&error) {
        // The data is not to blame.
        return StoreError::Unavailable(text);
    }
    match &error {
        sqlx::Error::Database(database) => match database.code().as_deref().unwrap_or_default() {
            // Data exceptions, integrity constraints, program limits.
            code if is_class(code, &["22", "23", "54"]) => StoreError::Refused(text),
            code if is_class(code, &["40"]) => StoreError::Conflict(text),
            "53100" => StoreError::Full(text),
            // Authorization, no such database or schema, no such table or no right to it.
            code if is_class(code, &["28", "3D", "3F", "42"]) => StoreError::Unusable(text),
            _ => StoreError::Unavailable(text),
        },
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnIndexOutOfBounds { .. } | sqlx::Error::Decode(_) => {
            StoreError::Unusable(text)
        }
        sqlx::Error::Encode(_) => StoreError::Refused(text),
        _ => StoreError::Unavailable(text),
    }
}

/// True if a row belongs to a partition that doesn't exist: a check violation (23514) that names no constraint.
pub(super) fn lacks_partition(error: &sqlx::Error) -> bool {
    let said = error.as_database_error();
    said.is_some_and(|said| said.code().as_deref() == Some("23514") && said.constraint().is_none())
}

/// What an error in answer to COMMIT means. Only refused data, a conflict or a full disk proves that nothing was committed.
pub(super) fn commit_error(error: sqlx::Error) -> StoreError {
    match store_error(error) {
        definite @ (StoreError::Refused(_) | StoreError::Conflict(_) | StoreError::Full(_)) => definite,
        other => StoreError::OutcomeUnknown(other.to_string()),
    }
}

/// Runs a commit. A warning counts as an error: the commit may be less durable than it has to be (`warnings.rs`).
pub(super) async fn commit<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    match heard(work).await {
        // Any warning counts, since its text may be in any language.
        (Ok(_), Some(warning)) => {
            Err(sqlx::Error::Protocol(format!("the database warned when it committed: {warning}")))
        }
        (ended, _) => ended,
    }
}

/// True if the connection, or the server behind it, is gone. The statement is not to blame. The connection must not be reused.
pub(super) fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        // Connection exceptions, invalid transaction states, and shutdowns.
        sqlx::Error::Database(database) => {
            let code = database.code();
            let code = code.as_deref().unwrap_or_default();
            is_class(code, &["08", "25"]) || code.starts_with("57P")
        }
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::Tls(_) => true,
        _ => false,
    }
}

fn is_class(code: &str, classes: &[&str]) -> bool {
    classes.iter().any(|class| code.starts_with(class))
}
