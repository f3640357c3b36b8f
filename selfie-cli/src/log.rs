//! `log.txt`: what was said, with times. One subscriber for the process, whose file follows the run.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

static FILE: Mutex<Option<File>> = Mutex::new(None);

/// Writes to the present file, if there is one.
struct ToFile;

impl Write for ToFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match FILE.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(file) => file.write(bytes),
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging; nothing is kept until [`to`] names a file.
pub fn start() {
    let subscriber = tracing_subscriber::fmt().with_writer(|| ToFile).with_ansi(false).with_target(false);
    // A log that cannot be written ends no run: whatever else cannot be written says why.
    let subscriber = subscriber.log_internal_errors(false);
    // It fails only where there is a subscriber already, which then logs.
    let _ = subscriber.try_init();
}

/// Appends to `path` from now on.
///
/// # Errors
/// A file that cannot be opened.
pub fn to(path: &Path) -> anyhow::Result<()> {
    let refused = |source| selfie_model::Error::Write { path: path.to_path_buf(), source };
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(refused)?;
    *FILE.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    Ok(())
}
