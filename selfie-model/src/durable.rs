//! Files and folders that are there whole, or not at all.

use crate::error::{Result, reading, writing};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Names that begin like this are unfinished.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// Writes a file under a name for unfinished things beside it, flushes it to the disk, and gives it its name.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = unfinished(path);
    write_flushed(&unfinished, bytes)?;
    rename(&unfinished, path)
}

/// Writes a file and flushes it to the disk.
pub(crate) fn write_flushed(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(writing(path))
}

/// Gives a finished file or folder its name, and flushes that, too.
pub(crate) fn rename(unfinished: &Path, path: &Path) -> Result<()> {
    fs::rename(unfinished, path).map_err(writing(path))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    flush_folder(folder.unwrap_or(Path::new(".")))
}

/// Flushes the names in a folder.
pub(crate) fn flush_folder(folder: &Path) -> Result<()> {
    // Elsewhere a folder cannot be opened as a file, and its names need no flush.
    if cfg!(unix) { File::open(folder).and_then(|folder| folder.sync_all()).map_err(writing(folder)) } else { Ok(()) }
}

/// The name of `path` while it is being written.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    let mut name = OsString::from(UNFINISHED);
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Names in a folder, sorted; none when there is no folder.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(reading(folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(reading(folder))?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}
