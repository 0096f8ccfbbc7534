//! Positions in a log from which a subscription resumes.

use std::{fmt, str::FromStr};

use crate::Error;

/// A position in an org's log: everything up to it has been seen. The text form `LOG_ID:SEQ` can be stored and parsed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// UUID of the log. It changes when the database is restored from a backup, which makes older cursors invalid. An
    /// empty id is unknown and not checked.
    pub log_id: String,
    /// The last `seq` that was seen; 0 is the beginning of the log.
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
    /// [`Error::Cursor`] if the text is not of the form `LOG_ID:SEQ` with a `seq` of 0 or more.
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
