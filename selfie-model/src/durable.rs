//! Files and folders that are there whole, or not at all: the one place that writes what a run keeps.
//!
//! Builds with debug assertions fail on demand: `SELFIE_FAULT=7` refuses the seventh write, flush, rename or new folder
//! as a full disk would, in the middle of a write. So every one of them is tested, and released binaries have none of it.

use crate::error::{Result, reading, writing};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Names that begin like this are unfinished.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// Writes a file under a name for unfinished things beside it, flushes it to the disk, and gives it its name: a reader
/// sees the old one or the new one.
///
/// # Errors
/// [`crate::Error::Write`]; the old file is then as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = unfinished(path);
    let written = write_flushed(&unfinished, bytes).and_then(|()| rename(&unfinished, path));
    if written.is_err() {
        // On a full disk half a file helps nobody.
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// Writes a folder of files: all of it under a name for unfinished things, which is then its name. In a folder that is there
/// already each file is replaced as a whole, in their order.
///
/// # Errors
/// [`crate::Error::Write`]; a new folder is then not there.
pub fn write_folder(path: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    if path.is_dir() {
        return files.iter().try_for_each(|(name, bytes)| write_file(&path.join(name), bytes));
    }
    let unfinished = unfinished(path);
    let write = || {
        create_folder(&unfinished)?;
        files.iter().try_for_each(|(name, bytes)| write_flushed(&unfinished.join(name), bytes))?;
        flush_folder(&unfinished)?;
        rename(&unfinished, path)
    };
    let written = write();
    if written.is_err() {
        let _ = fs::remove_dir_all(&unfinished);
    }
    written
}

/// A file that grows by whole records.
#[derive(Debug)]
pub struct Appender {
    path: PathBuf,
    file: File,
}

impl Appender {
    /// Opens `path` at its end; it is made if it isn't there.
    ///
    /// # Errors
    /// [`crate::Error::Write`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let open = || {
            attempt()?;
            OpenOptions::new().create(true).append(true).open(&path)
        };
        let file = open().map_err(writing(&path))?;
        Ok(Self { path, file })
    }

    /// Appends a record in one write: a process that is killed tears at most the last.
    ///
    /// # Errors
    /// [`crate::Error::Write`].
    pub fn push(&mut self, record: &str) -> Result<()> {
        write(&mut self.file, record.as_bytes()).map_err(writing(&self.path))
    }

    /// Flushes all records to the disk.
    ///
    /// # Errors
    /// [`crate::Error::Write`].
    pub fn flush(&self) -> Result<()> {
        attempt().and_then(|()| self.file.sync_data()).map_err(writing(&self.path))
    }
}

/// Makes a folder and those above it, if they aren't there.
///
/// # Errors
/// [`crate::Error::Write`].
pub fn create_folder(path: &Path) -> Result<()> {
    attempt().and_then(|()| fs::create_dir_all(path)).map_err(writing(path))
}

/// Writes a file and flushes it to the disk.
pub(crate) fn write_flushed(path: &Path, bytes: &[u8]) -> Result<()> {
    let flushed = || {
        attempt()?;
        let mut file = File::create(path)?;
        write(&mut file, bytes)?;
        attempt()?;
        file.sync_all()
    };
    flushed().map_err(writing(path))
}

/// Gives a finished file or folder its name, and flushes that, too.
pub(crate) fn rename(unfinished: &Path, path: &Path) -> Result<()> {
    attempt().and_then(|()| fs::rename(unfinished, path)).map_err(writing(path))?;
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
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(reading(folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(reading(folder))?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Writes all bytes, or some of them and fails.
fn write(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    if let Err(full) = attempt() {
        file.write_all(&bytes[..bytes.len() / 2])?;
        return Err(full);
    }
    file.write_all(bytes)
}

/// Called before everything that a disk can refuse.
fn attempt() -> io::Result<()> {
    #[cfg(debug_assertions)]
    {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU64, Ordering};
        static REFUSED: LazyLock<Option<u64>> = LazyLock::new(|| std::env::var("SELFIE_FAULT").ok()?.parse().ok());
        static ATTEMPTS: AtomicU64 = AtomicU64::new(0);
        // All later ones, too: a disk stays full.
        if REFUSED.is_some_and(|refused| ATTEMPTS.fetch_add(1, Ordering::Relaxed) + 1 >= refused) {
            return Err(io::ErrorKind::StorageFull.into());
        }
    }
    Ok(())
}
