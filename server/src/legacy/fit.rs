//! Cuts values that the old service did not bound to the ledger's bounds. Each change adds a note.

use std::sync::Arc;

use crate::domain::{
    job::MAX_STAGE_CHARS,
    name::{is_seen, is_unseen},
};

/// Bytes of an error or a message: room for a long traceback, but small enough for pages of events.
pub const MAX_TEXT_BYTES: usize = 64 << 10;

/// Rounds a progress to a whole percentage, 0 to 100.
pub fn fit_progress(progress: f64, notes: &mut Vec<String>) -> u8 {
    let fitted = progress.round().clamp(0.0, 100.0);
    if fitted != progress {
        notes.push(format!("progress was {progress}"));
    }
    // NaN becomes 0.
    fitted as u8
}

/// Replaces each character of a name that can't be seen.
pub fn fit_name(name: &str, text: &str, notes: &mut Vec<String>) -> Arc<str> {
    if is_seen(text) {
        return text.into();
    }
    notes.push(format!("{name} had control or bidirectional formatting characters"));
    text.replace(is_unseen, "\u{fffd}").into()
}

/// Cuts a stage to [`MAX_STAGE_CHARS`] and replaces characters that can't be seen.
pub fn fit_stage(stage: &str, notes: &mut Vec<String>) -> Arc<str> {
    let stage = &*fit_name("stage", stage, notes);
    match stage.char_indices().nth(MAX_STAGE_CHARS) {
        None => stage.into(),
        Some((end, _)) => {
            notes.push(format!("stage of {} characters was cut", stage.chars().count()));
            stage[..end].into()
        }
    }
}

/// Cuts a text to [`MAX_TEXT_BYTES`], at a character boundary.
pub fn fit_text(name: &str, text: &str, notes: &mut Vec<String>) -> Arc<str> {
    if text.len() <= MAX_TEXT_BYTES {
        return text.into();
    }
    notes.push(format!("{name} of {} bytes was cut", text.len()));
    text[..text.floor_char_boundary(MAX_TEXT_BYTES)].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_left_alone_and_what_does_not_is_noted() {
        let mut notes = Vec::new();
        assert_eq!(fit_progress(0.0, &mut notes), 0);
        assert_eq!(fit_progress(100.0, &mut notes), 100);
        assert_eq!(&*fit_stage(&"ü".repeat(100), &mut notes), "ü".repeat(100));
        assert_eq!(fit_text("error", &"x".repeat(64 << 10), &mut notes).len(), 64 << 10);
        assert_eq!(notes, [] as [&str; 0]);

        assert_eq!(fit_progress(250.0, &mut notes), 100);
        assert_eq!(fit_progress(-1.0, &mut notes), 0);
        assert_eq!(fit_progress(33.4, &mut notes), 33);
        assert_eq!(fit_progress(f64::NAN, &mut notes), 0);
        assert_eq!(&*fit_stage(&"ü".repeat(101), &mut notes), "ü".repeat(100));
        assert_eq!(&*fit_name("requested_by", "a\r\u{202e}b", &mut notes), "a\u{fffd}\u{fffd}b");
        assert_eq!(fit_text("error", &"ü".repeat(40 << 10), &mut notes).len(), 64 << 10);
        assert_eq!(
            notes,
            [
                "progress was 250",
                "progress was -1",
                "progress was 33.4",
                "progress was NaN",
                "stage of 101 characters was cut",
                "requested_by had control or bidirectional formatting characters",
                "error of 81920 bytes was cut"
            ]
        );
    }
}
