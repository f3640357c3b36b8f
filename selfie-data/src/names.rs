//! Names of files and folders as text: classes, keys and lists are made of it.
//!
//! A name is bytes, and need not be UTF-8. Its text is what can be read of it, with `\xF6` for every byte that cannot
//! and for control characters, which would break a list of names into other lines. No two names have one text: a
//! backslash before what would read as such an escape is itself written `\x5C`.

use std::fmt::Write as _;
use std::path::Path;

use unicode_normalization::UnicodeNormalization;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// The text of one name, or of a line of a list.
pub(crate) fn text(name: &[u8]) -> String {
    let mut out = String::new();
    for chunk in name.utf8_chunks() {
        let valid = chunk.valid();
        for (at, char) in valid.char_indices() {
            match char {
                '\\' if is_escape(&valid[at..]) => out.push_str("\\x5C"),
                char if char.is_control() => {
                    let mut bytes = [0; 4];
                    char.encode_utf8(&mut bytes).bytes().for_each(|byte| escape(&mut out, byte));
                }
                char => out.push(char),
            }
        }
        chunk.invalid().iter().for_each(|byte| escape(&mut out, *byte));
    }
    out
}

fn escape(out: &mut String, byte: u8) {
    write!(out, "\\x{byte:02X}").expect(INFALLIBLE);
}

/// Whether text begins with what [`text`] writes for a byte.
fn is_escape(text: &str) -> bool {
    matches!(text.as_bytes(), [b'\\', b'x', high, low, ..] if is_digit(*high) && is_digit(*low))
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'A'..=b'F')
}

/// The text of a relative path, with `/` between its names.
pub(crate) fn key(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|part| text(part.as_encoded_bytes())).collect();
    parts.join("/")
}

/// What names have in common that a reader takes for one: accents composed or not, capitals or not, and spaces around.
pub(crate) fn alike(name: &str) -> String {
    name.trim().nfkc().flat_map(char::to_lowercase).nfkc().collect()
}

/// A name with accents composed, as most systems write it.
pub(crate) fn composed(name: &str) -> String {
    name.nfc().collect()
}

/// In what two names differ that are [`alike`], for messages.
pub(crate) fn difference(one: &str, other: &str) -> &'static str {
    if composed(one) == composed(other) {
        "composed and decomposed accents"
    } else if composed(one).to_lowercase() == composed(other).to_lowercase() {
        "capitals"
    } else {
        "spaces, capitals or letters that look the same"
    }
}

/// A name with all that is not plain written out, where what it looks like does not tell it from another.
pub(crate) fn spelled(name: &str) -> String {
    name.chars().flat_map(|char| if char.is_ascii() { vec![char] } else { char.escape_unicode().collect() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes that a text was made of.
    fn bytes(text: &str) -> Vec<u8> {
        let (mut out, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let rest = &text.as_bytes()[at..];
            match text.get(at..at + 4).filter(|four| is_escape(four)) {
                Some(four) => {
                    out.push(u8::from_str_radix(&four[2..], 16).expect("two digits"));
                    at += 4;
                }
                None => {
                    out.push(rest[0]);
                    at += 1;
                }
            }
        }
        out
    }

    proptest! {
        #[test]
        fn no_two_names_have_one_text(
            parts in prop::collection::vec(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..4),
                prop::sample::select(vec![b"\\".to_vec(), b"x".to_vec(), b"F6".to_vec(), b"\xf6".to_vec(), b"\n".to_vec()]),
            ], 0..8),
        ) {
            let name = parts.concat();
            let shown = text(&name);
            prop_assert!(!shown.chars().any(char::is_control));
            prop_assert_eq!(bytes(&shown), name);
        }
    }

    #[test]
    fn readable_names_stay_as_they_are() {
        for name in ["cat", "H\u{f6}he", "a\\b", "\u{732b}", "\\x5", "x41", "two words"] {
            assert_eq!(text(name.as_bytes()), name);
        }
        assert_eq!(text(b"H\xf6he"), "H\\xF6he");
        assert_eq!(text(b"H\\xF6he"), "H\\x5CxF6he");
        assert_eq!(text(b"a\tb\n"), "a\\x09b\\x0A");
        assert_eq!(text("a\u{85}".as_bytes()), "a\\xC2\\x85");
    }

    #[test]
    fn spellings_of_one_name_are_told() {
        for (one, other, how) in [
            ("caf\u{e9}", "cafe\u{301}", "composed and decomposed accents"),
            ("Cat", "cat", "capitals"),
            ("cat ", "cat", "spaces, capitals or letters that look the same"),
            ("\u{ff21}", "A", "spaces, capitals or letters that look the same"),
        ] {
            assert_eq!(alike(one), alike(other));
            assert_eq!(difference(one, other), how);
        }
        assert_ne!(alike("cat"), alike("car"));
        assert_eq!((spelled("caf\u{e9}").as_str(), spelled("cafe\u{301}").as_str()), ("caf\\u{e9}", "cafe\\u{301}"));
    }
}
