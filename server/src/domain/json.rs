//! JSON that the ledger carries without looking into it.

use std::{fmt, sync::Arc};

/// One well-formed JSON document, as text. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Json(Arc<str>);

impl Json {
    /// Wraps text that is known to be well-formed JSON.
    pub fn from_trusted(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The text's length in bytes; never zero.
    #[allow(clippy::len_without_is_empty, reason = "no JSON document is empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The document's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Payloads and results don't belong into logs: only the size is shown.
impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Json({} bytes)", self.0.len())
    }
}
