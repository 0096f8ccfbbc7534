//! What the service that jobledger replaces needs: its REST calls, the import and the export of its jobs, its words and
//! formats, and how its unbounded values are fitted to the ledger. What is decided about such jobs is in
//! [`transition`](crate::domain::transition). Nothing else depends on this module but `server`, which serves the REST calls.

pub mod export;
mod fit;
pub mod import;
mod json;
pub(crate) mod rest;
mod words;

pub use self::{
    fit::{MAX_TEXT_BYTES, fit_name, fit_progress, fit_stage, fit_text},
    json::{Unfit, check_json},
    words::{DEFAULT_TYPE, error_text, isoformat, old_word, parse_status},
};
