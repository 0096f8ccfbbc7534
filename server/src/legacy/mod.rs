//! What the service that jobledger replaces said and kept: its words, and its freedoms, fitted to what the ledger holds.
//!
//! Pure: the REST calls, the import and the export share it.

mod fit;
mod json;
mod words;

pub use self::{
    fit::{MAX_TEXT_BYTES, fit_name, fit_progress, fit_stage, fit_text},
    json::{Unfit, check_json},
    words::{DEFAULT_TYPE, error_text, isoformat, old_word, parse_status},
};
