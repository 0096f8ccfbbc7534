//! JSON that the ledger carries without parsing it.

use std::{fmt, sync::Arc};

/// One well-formed JSON document, as text. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Json(Arc<str>);

impl Json {
    /// Wraps text that must already be well-formed JSON; this is not checked.
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

/// Shows only the size: payloads and results don't belong in logs.
impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Json({} bytes)", self.0.len())
    }
}
