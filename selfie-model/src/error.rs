//! What can go wrong in building, training, saving and loading, in words that help.

use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Who has to act on an error: decides the exit code of the binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// An option or its value is wrong.
    Usage,
    /// An input file or folder is missing or malformed.
    Input,
    /// Training met numbers that are not finite, too often.
    Diverged,
    /// The device has no memory left.
    OutOfMemory,
    /// Something of ours failed, or the system refused.
    Internal,
}

/// Errors of this crate; [`Error::kind`] says who has to act.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device or an operation refused.
    #[error(transparent)]
    Kernel(#[from] selfie_kernels::Error),
    /// The data refused.
    #[error(transparent)]
    Data(#[from] selfie_data::Error),
    /// The value of a configuration key is wrong.
    #[error("`{key} = {given}`: expected {expected}")]
    Usage {
        /// The key, such as `train.batch`.
        key: String,
        /// The value as given.
        given: String,
        /// What would have been right.
        expected: String,
    },
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file or folder cannot be written.
    #[error(
        "cannot write {}: {source}; what was saved before is whole, and the same command goes on once this can be written",
        path.display()
    )]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file is not what it has to be, or is damaged.
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
    /// A file is sound, but belongs to another network.
    #[error("{}: `{tensor}`: this network expects {expected}, the file has {found}; {advice}", path.display())]
    OtherNetwork {
        /// The file.
        path: PathBuf,
        /// Name of the first tensor that does not fit.
        tensor: String,
        /// Shape in the network, or "no such tensor".
        expected: String,
        /// Shape in the file, or "no such tensor".
        found: String,
        /// What to do about it.
        advice: String,
    },
    /// Loss or gradient was not finite too many times in a row.
    #[error(
        "training diverged: loss {loss}, gradient norm {gradient_norm} at step {step}, {in_a_row} times in a row; \
         no update of these steps was applied; lower train.lr or lengthen train.warmup"
    )]
    Diverged {
        /// The last step, counted from 1.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        gradient_norm: f64,
        /// Steps in a row that were not finite.
        in_a_row: u32,
    },
}

impl Error {
    /// Who has to act.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Kernel(selfie_kernels::Error::OutOfMemory { .. }) => ErrorKind::OutOfMemory,
            Error::Data(error) => match error.kind() {
                selfie_data::ErrorKind::Usage => ErrorKind::Usage,
                selfie_data::ErrorKind::Input => ErrorKind::Input,
                selfie_data::ErrorKind::Internal => ErrorKind::Internal,
            },
            Error::Usage { .. } => ErrorKind::Usage,
            Error::Read { .. } | Error::Malformed { .. } | Error::OtherNetwork { .. } => ErrorKind::Input,
            Error::Diverged { .. } => ErrorKind::Diverged,
            Error::Kernel(_) | Error::Write { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn usage(key: &str, given: impl std::fmt::Display, expected: impl Into<String>) -> Self {
        Error::Usage { key: key.into(), given: given.to_string(), expected: expected.into() }
    }

    pub(crate) fn malformed(
        path: &Path,
        expected: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Error::Malformed { path: path.into(), expected: expected.into(), found: found.into(), advice: advice.into() }
    }
}

/// Turns a system error into [`Error::Read`] of a path.
pub(crate) fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Read { path, source }
}

/// Turns a system error into [`Error::Write`] of a path.
pub(crate) fn writing(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Write { path, source }
}
