//! Where an answer goes that is a file: what must hold before the work for it begins.

use std::path::{Path, PathBuf};

use crate::exit::Problem;

/// What becomes of a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the command is refused.
    Keep,
    /// It is replaced.
    Replace,
}

impl Existing {
    /// As `--overwrite` says.
    pub fn new(overwrite: bool) -> Self {
        if overwrite { Self::Replace } else { Self::Keep }
    }
}

/// Refuses `path`, given by the flag `flag`, for which `files` will be written, where one of them is there, unless it is to be replaced, or is a
/// folder, or its own folder is not there.
///
/// # Errors
/// Usage.
pub fn check(flag: &str, path: &Path, files: &[PathBuf], existing: Existing) -> anyhow::Result<()> {
    check_parent(flag, path)?;
    for file in files {
        if file.is_dir() || existing == Existing::Keep && file.exists() {
            let advice = if file.is_dir() { "a folder" } else { "there already, and --overwrite was not given" };
            return Err(Problem::usage(format!("{flag} {}: {} is {advice}", path.display(), file.display())));
        }
    }
    Ok(())
}

/// The same for a folder: one that is there must be empty, unless files in it are to be replaced.
///
/// # Errors
/// Usage.
pub fn check_folder(path: &Path, existing: Existing) -> anyhow::Result<()> {
    check_parent("--out", path)?;
    let is_empty = || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    let wrong = match () {
        () if !path.exists() => return Ok(()),
        () if !path.is_dir() => "is no folder",
        () if existing == Existing::Keep && !is_empty() => "is not empty, and --overwrite was not given",
        () => return Ok(()),
    };
    Err(Problem::usage(format!("--out {} {wrong}", path.display())))
}

fn check_parent(flag: &str, path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() {
        return Ok(());
    }
    Err(Problem::usage(format!("{flag} {}: there is no folder {}", path.display(), folder.display())))
}
