//! Exit codes, and the one place that decides which error ends with which.

use std::borrow::Cow;
use std::fmt;

use crate::screen;

/// How the program ends. The numbers are part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Something failed that is none of the cases below.
    Failed = 1,
    /// A flag, a configuration key or a value is wrong.
    Usage = 2,
    /// An input file or folder is missing or malformed.
    Input = 3,
    /// Training diverged.
    Diverged = 4,
    /// Out of memory.
    OutOfMemory = 5,
    /// Saved and stopped on a signal: the same command continues.
    Stopped = 75,
}

/// An error of the binary's own, with the exit code it stands for.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A flag, key or value.
    #[error("{0}")]
    Usage(String),
    /// A file or folder.
    #[error("{0}")]
    Input(String),
    /// Memory.
    #[error("{0}")]
    OutOfMemory(String),
    /// Training.
    #[error("{0}")]
    Diverged(String),
}

impl Problem {
    /// A usage error as [`anyhow::Error`].
    pub fn usage(text: impl fmt::Display) -> anyhow::Error {
        Self::Usage(text.to_string()).into()
    }

    /// An input error as [`anyhow::Error`].
    pub fn input(text: impl fmt::Display) -> anyhow::Error {
        Self::Input(text.to_string()).into()
    }
}

impl Exit {
    /// The code of an error: the first cause in the chain that knows.
    pub fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(Self::of_cause).unwrap_or(Self::Failed)
    }

    fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Self> {
        if let Some(problem) = cause.downcast_ref::<Problem>() {
            return Some(match problem {
                Problem::Usage(_) => Self::Usage,
                Problem::Input(_) => Self::Input,
                Problem::OutOfMemory(_) => Self::OutOfMemory,
                Problem::Diverged(_) => Self::Diverged,
            });
        }
        if let Some(error) = cause.downcast_ref::<selfie_model::Error>() {
            use selfie_model::ErrorKind;
            return match error.kind() {
                ErrorKind::Usage => Some(Self::Usage),
                ErrorKind::Input => Some(Self::Input),
                ErrorKind::Diverged => Some(Self::Diverged),
                ErrorKind::OutOfMemory => Some(Self::OutOfMemory),
                ErrorKind::Internal => None,
            };
        }
        if let Some(error) = cause.downcast_ref::<selfie_data::Error>() {
            use selfie_data::ErrorKind;
            return match error.kind() {
                ErrorKind::Usage => Some(Self::Usage),
                ErrorKind::Input => Some(Self::Input),
                ErrorKind::Internal => None,
            };
        }
        if let Some(selfie_kernels::Error::OutOfMemory { .. }) = cause.downcast_ref::<selfie_kernels::Error>() {
            return Some(Self::OutOfMemory);
        }
        None
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A text whose control characters, other than ends of lines and tabs, are written out: a name in a file of someone
/// else's must not move a terminal's cursor.
pub fn printable(text: &str) -> Cow<'_, str> {
    let moves = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(moves) {
        return Cow::Borrowed(text);
    }
    let written = |c: char| if moves(c) { c.escape_unicode().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(written).collect())
}

/// Prints an error with its causes, once.
pub fn report(error: &anyhow::Error) {
    screen::end_bar();
    tracing::error!("{error:#}");
    screen::line(format!("error: {}", printable(&error.to_string())));
    let mut said = error.to_string();
    if Exit::of(error) == Exit::OutOfMemory && !said.contains("--batch") {
        screen::line("  lower --batch, or cut it by --accumulate");
    }
    for cause in error.chain().skip(1) {
        // Transparent wrappers repeat their source.
        let text = cause.to_string();
        if !said.contains(&text) {
            screen::line(format!("  because: {}", printable(&text)));
            said = text;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\u{7}\n\tc\u{9b}1m"), "a\\u{1b}[2Jb\\u{7}\n\tc\\u{9b}1m");
        assert!(matches!(printable("± 1.0\n"), Cow::Borrowed(_)));
    }
}
