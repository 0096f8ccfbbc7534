//! The words and formats of the service that jobledger replaces, and how its unbounded values are fitted to the ledger.
//!
//! Pure code, shared by the REST calls, the import and the export.

mod fit;
mod json;
mod words;

pub use self::{
    fit::{MAX_TEXT_BYTES, fit_name, fit_progress, fit_stage, fit_text},
    json::{Unfit, check_json},
    words::{DEFAULT_TYPE, error_text, isoformat, old_word, parse_status},
};
