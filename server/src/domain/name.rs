//! What names and short texts may consist of: of jobs and who asks for them, of workers, stages, labels and codes.

/// True of a character that no name may have: it is not seen, or changes how what is around it is seen, in a log or on a terminal.
/// Controls are those of Unicode (Cc), separators those of lines (Zl, Zp), and marks those that embed, override and isolate directions
/// (UAX #9, 2.1 to 2.4); those that stand for one letter of a direction (2.6) change nothing around them.
pub fn is_unseen(character: char) -> bool {
    character.is_control() || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// True of a text that has no such character.
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
