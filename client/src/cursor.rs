//! Places in a log, to go on from.

use std::{fmt, str::FromStr};

use crate::Error;

/// A place in an org's log: everything up to it has been seen. As text, `LOG_ID:SEQ`, it can be stored and parsed again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// UUID of the log: another after the database was restored from a backup, when no cursor of before means anything. Empty
    /// if unknown: it is not checked then.
    pub log_id: String,
    /// The last `seq` seen; 0 at the beginning.
    pub seq: i64,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.log_id, self.seq)
    }
}

impl FromStr for Cursor {
    type Err = Error;

    /// # Errors
    ///
    /// [`Error::Cursor`] if it is not the text of a cursor.
    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let (log_id, seq) = text.rsplit_once(':')?;
            Some(Self { log_id: log_id.to_owned(), seq: seq.parse().ok().filter(|seq| *seq >= 0)? })
        };
        parse().ok_or_else(|| Error::Cursor(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_being_stored_as_text() {
        let cursor = Cursor { log_id: "0199d7a0-0000-7000-8000-000000000001".to_owned(), seq: 42 };
        assert_eq!(cursor.to_string(), "0199d7a0-0000-7000-8000-000000000001:42");
        assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        for broken in ["", "42", "x:", "x:-1", "x:y"] {
            assert!(matches!(broken.parse::<Cursor>(), Err(Error::Cursor(text)) if text == broken), "{broken}");
        }
    }
}
