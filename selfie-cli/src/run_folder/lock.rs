//! One writer per run folder. The system holds the lock, so that a process that dies leaves none behind.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use anyhow::Context;

/// Name of the lock file.
pub(super) const NAME: &str = ".lock";

/// A lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Locks `folder`.
    ///
    /// # Errors
    /// Another process holds it, or the system refuses.
    pub fn take(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(NAME);
        let refused = |source| selfie_model::Error::Write { path: path.clone(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(refused)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Who it is, is a courtesy.
                let _ = file.read_to_string(&mut owner);
                anyhow::bail!(
                    "another process ({}) writes to {}: wait for it, or give another --out",
                    owner.trim(),
                    folder.display()
                );
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let mut sign = || {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "process {}", std::process::id())
        };
        sign().map_err(refused)?;
        Ok(Self { _file: file })
    }
}
