//! Pages of lists whose tokens say after what the page begins.

use super::check::Check;

/// Marks tokens that have a name, so that other texts are refused.
const AFTER: &str = "after:";

/// The token of the page that begins after this name.
pub(in super::super) fn token_after(last: &str) -> String {
    format!("{AFTER}{last}")
}

impl Check {
    /// Parses the `next_page_token` of an earlier answer; `None` for the first page.
    pub(super) fn page_after<T>(&mut self, token: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        if token.is_empty() {
            return None;
        }
        let after = parse(token);
        self.that("page_token", after.is_some(), || "is not the next_page_token of an answer".to_owned());
        after
    }

    /// Parses what [`token_after`] made; empty for the first page.
    pub(super) fn page_after_name(&mut self, token: &str) -> String {
        self.page_after(token, |token| token.strip_prefix(AFTER).map(str::to_owned)).unwrap_or_default()
    }
}
