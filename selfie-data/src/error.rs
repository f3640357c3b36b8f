//! What can go wrong, in words that help.

use std::fmt;
use std::path::PathBuf;

use crate::dataset::Dataset;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An image that was skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFile {
    /// Its index in the dataset.
    pub index: usize,
    /// Its key ([`crate::Dataset::key`]).
    pub key: String,
    /// Why it could not be read.
    pub reason: String,
}

impl BadFile {
    /// Image `index` of `dataset`, that `error` kept from being read.
    pub(crate) fn new(dataset: &dyn Dataset, index: usize, error: Error) -> Self {
        let reason = match error {
            Error::BadImage { reason, .. } => reason,
            other => other.to_string(),
        };
        Self { index, key: dataset.key(index), reason }
    }
}

impl fmt::Display for BadFile {
    /// A line of `skipped.txt`: key, tab, reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\t{}", self.key, self.reason)
    }
}

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// An option or its value is wrong.
    Usage,
    /// An input file or folder is missing or malformed.
    Input,
    /// Something of ours failed.
    Internal,
}

/// Errors of this crate; [`Error::kind`] says who has to act.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that was typed is wrong.
    #[error("{what} `{given}`: expected {expected}")]
    Usage {
        /// What was given, such as "labels".
        what: String,
        /// The text as given.
        given: String,
        /// What would have been right.
        expected: String,
    },
    /// Nothing lies at a path, or it cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file or folder is not what it has to be.
    #[error("{}: expected {expected}, found {found}; {advice}", path.display())]
    Malformed {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, and where in the file.
        expected: String,
        /// What was found instead.
        found: String,
        /// What to do about it.
        advice: String,
    },
    /// The data have no held-out part.
    #[error(
        "{}: expected val/ or test/ with held-out images, found {found}; give a folder with train/ and val/ (or test/) inside",
        path.display()
    )]
    NoTestPart {
        /// The folder or archive.
        path: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// One image cannot be used; the others may.
    #[error("{key}: {reason}")]
    BadImage {
        /// The image's key.
        key: String,
        /// Why.
        reason: String,
    },
    /// More images are bad than allowed.
    #[error(
        "{bad} of {total} images cannot be used, more than the {} % that are allowed (max-bad); the first: {}: {}",
        max_bad * 100.0, first.key, first.reason
    )]
    TooManyBad {
        /// Bad images so far.
        bad: usize,
        /// Images in the dataset.
        total: usize,
        /// The fraction that is allowed.
        max_bad: f64,
        /// The first bad one.
        first: BadFile,
    },
    /// A thread that reads images stopped.
    #[error("a thread that reads images stopped: {message}")]
    Worker {
        /// Its panic message, if it had one.
        message: String,
    },
}

impl Error {
    /// Who has to act: decides the exit code of the binary.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Usage { .. } => ErrorKind::Usage,
            Error::Read { .. }
            | Error::Malformed { .. }
            | Error::NoTestPart { .. }
            | Error::BadImage { .. }
            | Error::TooManyBad { .. } => ErrorKind::Input,
            Error::Worker { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn usage(what: &str, given: impl fmt::Display, expected: impl Into<String>) -> Self {
        Error::Usage { what: what.into(), given: given.to_string(), expected: expected.into() }
    }

    pub(crate) fn malformed(
        path: impl Into<PathBuf>,
        expected: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Error::Malformed { path: path.into(), expected: expected.into(), found: found.into(), advice: advice.into() }
    }
}

/// Turns a system error into [`Error::Read`] of a path.
pub(crate) fn reading(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Read { path, source }
}
