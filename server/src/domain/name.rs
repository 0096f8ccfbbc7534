//! Which characters names and short texts may contain: jobs, requesters, workers, stages, labels and codes.

/// True for a character that no name may contain: it is invisible, or it changes how a log or a terminal shows the text
/// around it. These are controls (Unicode Cc), line and paragraph separators (Zl, Zp), and the direction marks that
/// embed, override and isolate (UAX #9, 2.1 to 2.4). Implicit direction marks (2.6) are allowed: each stands for one
/// letter and changes nothing around it.
pub fn is_unseen(character: char) -> bool {
    character.is_control() || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// True for a text without such a character.
pub fn is_seen(text: &str) -> bool {
    !text.contains(is_unseen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_and_marks_of_direction_are_unseen_and_all_scripts_are_seen() {
        for text in ["\x1b[31m", "a\r\nb", "\0", "\u{9b}31m", "\u{202e}gpj", "a\u{2066}b", "a\u{2028}b"] {
            assert!(!is_seen(text), "{text:?}");
        }
        for text in ["", "größer", "支払い", "שלום", "🦀", "a b", "क\u{200d}ष", "e\u{301}", "\u{200f}x"]
        {
            assert!(is_seen(text), "{text:?}");
        }
    }
}
