//! Maps SQLite's result codes (<https://www.sqlite.org/rescode.html>) to [`StoreError`].

use crate::store::StoreError;

const SQLITE_FULL: u32 = 13;
const SQLITE_CORRUPT: u32 = 11;
const SQLITE_TOOBIG: u32 = 18;
const SQLITE_CONSTRAINT: u32 = 19;
const SQLITE_MISMATCH: u32 = 20;
const SQLITE_NOTADB: u32 = 26;

pub(super) fn store_error(error: sqlx::Error) -> StoreError {
    let text = error.to_string();
    match &error {
        sqlx::Error::Database(database) => {
            // The primary code is the low byte of an extended one.
            let code = database.code().and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff);
            match code {
                Some(SQLITE_CONSTRAINT | SQLITE_TOOBIG | SQLITE_MISMATCH) => StoreError::Refused(text),
                Some(SQLITE_FULL) => StoreError::Full(text),
                Some(SQLITE_CORRUPT | SQLITE_NOTADB) => StoreError::Unusable(text),
                _ => StoreError::Unavailable(text),
            }
        }
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnIndexOutOfBounds { .. } | sqlx::Error::Decode(_) => {
            StoreError::Unusable(text)
        }
        _ => StoreError::Unavailable(text),
    }
}
