//! What PostgreSQL's codes mean to the ledger (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).

use super::warnings::heard;
use crate::store::StoreError;

/// What an error of the database means.
pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    let text = error.to_string();
    if lacks_partition(&error) {
        // Not the data's fault.
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

/// True if rows belong into a partition that isn't there.
pub(super) fn lacks_partition(error: &sqlx::Error) -> bool {
    let said = error.as_database_error();
    said.is_some_and(|said| said.code().as_deref() == Some("23514") && said.constraint().is_none())
}

/// What an error in answer to COMMIT means: that nothing was committed is certain only where the server says why.
pub(super) fn commit_error(error: sqlx::Error) -> StoreError {
    match store_error(error) {
        definite @ (StoreError::Refused(_) | StoreError::Conflict(_) | StoreError::Full(_)) => definite,
        other => StoreError::OutcomeUnknown(other.to_string()),
    }
}

/// Commits: an error unless what was committed is as durable as it shall be.
pub(super) async fn commit<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    match heard(work).await {
        // Whatever it is, in whichever language.
        (Ok(_), Some(warning)) => {
            Err(sqlx::Error::Protocol(format!("the database warned when it committed: {warning}")))
        }
        (ended, _) => ended,
    }
}

/// True if the connection is gone, or the server behind it: not the statement's fault, and not to be used again.
pub(super) fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        // Connection exceptions, and shutdowns.
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
