//! Commands as text that a shell takes back: everything we print as a command can be pasted.

use std::ffi::OsStr;
use std::fmt::Write;

/// A word for a POSIX shell. One with bytes that are no text, or that would move a terminal's cursor, is written as
/// `$'..'`, which bash, zsh and POSIX of 2024 know.
pub fn quoted(word: impl AsRef<OsStr>) -> String {
    let bytes = word.as_ref().as_encoded_bytes();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,%@+".contains(c);
    match std::str::from_utf8(bytes) {
        // `=word` is a command's path in zsh.
        Ok(text) if !text.is_empty() && text.chars().all(plain) && !text.starts_with('=') => text.into(),
        Ok(text) if !text.contains(char::is_control) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => escaped(bytes),
    }
}

/// A path as an argument: one that begins with a dash is no flag.
pub fn path(path: impl AsRef<std::path::Path>) -> String {
    let path = path.as_ref();
    if path.as_os_str().as_encoded_bytes().starts_with(b"-") {
        return quoted(std::path::Path::new(".").join(path));
    }
    quoted(path)
}

/// The command as it was typed.
pub fn command_line() -> String {
    std::env::args_os().map(quoted).collect::<Vec<_>>().join(" ")
}

fn escaped(bytes: &[u8]) -> String {
    let mut text = String::from("$'");
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' | '\\' => text.extend(['\\', c]),
                // Three digits of eight, so that a digit that follows is another character.
                c if c.is_control() => {
                    let mut buffer = [0; 4];
                    c.encode_utf8(&mut buffer).bytes().for_each(|byte| octal(&mut text, byte));
                }
                c => text.push(c),
            }
        }
        chunk.invalid().iter().for_each(|&byte| octal(&mut text, byte));
    }
    text.push('\'');
    text
}

fn octal(text: &mut String, byte: u8) {
    write!(text, "\\{byte:03o}").expect("writing to a string cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        for (word, expected) in [
            ("runs/pre-1", "runs/pre-1"),
            ("--steps", "--steps"),
            ("my runs", "'my runs'"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("~x", "'~x'"),
            ("=ls", "'=ls'"),
            ("a{0..3}", "'a{0..3}'"),
            ("schön", "'schön'"),
            ("a\u{1b}1'\\", r"$'a\0331\'\\'"),
            ("a\u{85}b", r"$'a\302\205b'"),
            ("two\nlines", r"$'two\012lines'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
        assert_eq!(path("-c"), "./-c");
        assert_eq!(path("/-c"), "/-c");
    }

    /// bash itself is asked what it reads.
    #[cfg(unix)]
    #[test]
    fn a_shell_reads_the_word_again() {
        use std::os::unix::ffi::OsStrExt;
        let awkward: &[&[u8]] = &[
            b"plain",
            b" ",
            b"a b",
            b"'",
            b"\"$(false)`false`\\",
            b"*?[a]{1,2}",
            b"#!",
            b"-n",
            b"caf\xc3\xa9",
            b"caf\xe9",
            b"\xff1\x80'\\",
            b"\x1b[2J\x7f9",
            b"a\n b\t",
        ];
        for word in awkward {
            let text = format!("printf %s {}", quoted(OsStr::from_bytes(word)));
            let output = std::process::Command::new("bash").args(["-c", &text]).output().expect("bash runs");
            assert_eq!(output.stdout, *word, "{text}");
        }
    }
}
