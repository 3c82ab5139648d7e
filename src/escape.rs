//! Text from outside made harmless for a terminal and a log.
//!
//! Names of files, hosts of claims and errors of servers may hold anything. A terminal obeys
//! control characters, a log is read by its lines, and marks of writing direction show a text in
//! another order than it has. They become visible escapes: `\n`, `\x1b`, `\u{202e}`. Everything
//! else, blanks and backslashes included, stays as it is. Pure.

use std::borrow::Cow;
use std::fmt::Write;

/// Put before every line but the first of a text of several lines, so that none of them looks like
/// a text of its own.
const INDENT: &str = "    ";

/// Whether a character can do more on a terminal than be seen.
fn is_unsafe(c: char) -> bool {
    let direction =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let separator = matches!(c, '\u{2028}' | '\u{2029}');
    let invisible_copy_of_ascii = matches!(c, '\u{e0000}'..='\u{e007f}');
    c.is_control() || direction || separator || invisible_copy_of_ascii
}

fn push(out: &mut String, c: char) {
    // Writing to a string does not fail.
    let _ = match c {
        '\n' => out.write_str("\\n"),
        '\r' => out.write_str("\\r"),
        '\t' => out.write_str("\\t"),
        c if (c as u32) < 0x100 => write!(out, "\\x{:02x}", c as u32),
        c => write!(out, "\\u{{{:x}}}", c as u32),
    };
}

fn escaped<'a>(
    text: &'a str,
    is_unsafe: impl Fn(char) -> bool,
    push: impl Fn(&mut String, char),
) -> Cow<'a, str> {
    if !text.contains(&is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) { push(&mut out, c) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// One line: line breaks are escaped too.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, is_unsafe, push)
}

/// Several lines of our own making, each without what is unsafe.
#[must_use]
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_unsafe(c), push)
}

/// A message that may have several lines: all but the first are indented, so that a line break
/// which came from outside cannot begin what looks like another message.
#[must_use]
pub fn message(text: &str) -> Cow<'_, str> {
    let safe = lines(text.trim_end_matches('\n'));
    if safe.contains('\n') { Cow::Owned(safe.replace('\n', &format!("\n{INDENT}"))) } else { safe }
}

/// JSON text that says the same in harmless characters. What JSON itself is made of is never unsafe
/// but for line breaks between values; within strings serde has escaped everything below a blank.
#[must_use]
pub fn json(text: &str) -> Cow<'_, str> {
    let push = |out: &mut String, c: char| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    };
    escaped(text, |c| c != '\n' && is_unsafe(c), push)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Escape, bell, both forms of the control sequence and of the system command, carriage return,
    /// backspace, delete, reversed writing, an isolate, a line separator, and an invisible letter.
    const HOSTILE: &str =
        "a\x1b[2J\x07\u{9b}31m\x1b]0;t\x07\u{9d}\r\x08\x7f\0\u{202e}\u{2066}\u{2028}\u{e0041}z";
    const ESCAPED: &str =
        r"a\x1b[2J\x07\x9b31m\x1b]0;t\x07\x9d\r\x08\x7f\x00\u{202e}\u{2066}\u{2028}\u{e0041}z";

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(line(HOSTILE), ESCAPED);
        assert_eq!(lines(HOSTILE), ESCAPED);
        assert_eq!(message(HOSTILE), ESCAPED);
        for c in (0..=0x10_ffff).filter_map(char::from_u32).filter(|c| c.is_control()) {
            assert!(!line(&c.to_string()).contains(c), "{c:?}");
        }
    }

    #[test]
    fn ordinary_text_stays_as_it_is() {
        for text in ["", "a b", r"back\slash", "é 日本 👩\u{200d}👩 עברית", "~!@#$%^&*()"] {
            assert!(matches!(line(text), Cow::Borrowed(same) if same == text), "{text}");
            assert!(matches!(json(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn line_breaks_are_escaped_kept_or_indented() {
        assert_eq!(line("a\nb\tc"), r"a\nb\tc");
        assert_eq!(lines("a\nb\n"), "a\nb\n");
        assert_eq!(message("a\nmirrorfs: b\n\n"), "a\n    mirrorfs: b");
    }

    #[test]
    fn json_means_the_same() {
        let value = serde_json::json!({ "name": HOSTILE, "list": ["\n", "\u{7f}"] });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let safe = json(&text);
        assert!(!safe.chars().any(|c| c != '\n' && is_unsafe(c)), "{safe}");
        assert!(safe.contains(r"\udb40\udc41"), "beyond 16 bits it is a pair: {safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}
