//! The folder of a run: what is written where, and who may write.

mod environment;
mod lock;
mod metrics;
mod status;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use selfie_model::durable::{self, Appender};

use crate::choices::{self, Table};
use crate::config::{Resolved, as_toml};
use crate::exit::Problem;
use crate::shell;
pub use environment::environment;
pub use lock::Lock;
#[cfg(fuzzing)]
pub(crate) use metrics::kept;
pub use metrics::{Line, Metrics};
pub use status::{State, Status};

/// The list of images that were skipped.
pub const SKIPPED: &str = "skipped.txt";

/// Names of the files of steps that were not finite begin so.
pub const NOT_FINITE: &str = "not-finite-";

/// A run folder, locked against a second writer.
#[derive(Debug)]
pub struct RunFolder {
    root: PathBuf,
    /// Held for as long as the folder is.
    _lock: Lock,
}

impl RunFolder {
    /// Creates the folder, or takes over the one that is there.
    ///
    /// # Errors
    /// Usage: the folder lies inside the data, holds something that is no run, or a run of another command. Failed: a
    /// second writer.
    pub fn open(root: &Path, data: &Path, command: &str) -> anyhow::Result<Self> {
        Self::check(root, data, command)?;
        durable::create_folder(root)?;
        let lock = Lock::take(root)?;
        Ok(Self { root: root.to_path_buf(), _lock: lock })
    }

    /// Whether [`RunFolder::open`] may be called, without touching anything.
    ///
    /// # Errors
    /// The usage errors of [`RunFolder::open`].
    pub fn check(root: &Path, data: &Path, command: &str) -> anyhow::Result<()> {
        refuse_inside(root, data)?;
        refuse_foreign(root)?;
        if let Some(status) = Status::read(root)?
            && status.command != command
        {
            return Err(Problem::usage(format!(
                "--out {} is a run of `{}`, not of `{command}`: give another folder",
                root.display(),
                status.command,
            )));
        }
        Ok(())
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Lines of `skipped.txt`, sorted; none where nothing was skipped.
    pub fn skipped(&self) -> BTreeSet<String> {
        let text = fs::read(self.file(SKIPPED)).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().map(String::from).collect()
    }

    /// Where checkpoints go.
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// Where weights go.
    pub fn weights(&self) -> PathBuf {
        self.root.join("weights")
    }

    /// Whether a run was begun here.
    pub fn is_begun(&self) -> bool {
        is_begun(&self.root)
    }

    /// Writes what is known before the first step.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn describe(&self, resolved: &Resolved, data: &serde_json::Value, table: Option<&Table>) -> anyhow::Result<()> {
        // Before what shows that the run is begun.
        if let Some(table) = table {
            self.write(choices::OF_A_RUN, table.as_toml().as_bytes())?;
        }
        let environment = environment(resolved.settings().run.threads, table);
        self.write("config.toml", as_toml(resolved).as_bytes())?;
        self.write("env.json", format!("{environment:#}\n").as_bytes())?;
        self.write("data.json", format!("{data:#}\n").as_bytes())?;
        Ok(Appender::open(self.file("command.txt"))?.push(&(shell::command_line() + "\n"))?)
    }

    /// Writes a file whole: a reader sees the old one or the new one.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(durable::write_file(&self.file(name), bytes)?)
    }
}

/// Whether a run was begun in a folder.
pub fn is_begun(root: &Path) -> bool {
    root.join("config.toml").is_file()
}

/// The files of steps that were not finite in a run folder, oldest first.
///
/// # Errors
/// A folder that cannot be read.
pub fn step_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(root).with_context(|| format!("cannot read {}", root.display()))?;
    let named = |name: &str| name.starts_with(NOT_FINITE) && name.ends_with(".safetensors");
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(named))
        .collect();
    files.sort_unstable();
    Ok(files)
}

/// How many classes the data of a run have, by its `data.json`; 0 where that is not known.
pub fn classes(run: &Path) -> usize {
    let about = fs::read(run.join("data.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
    about.as_ref().and_then(|about: &serde_json::Value| about["classes"].as_array()).map_or(0, Vec::len)
}

/// Nothing is ever written into the data.
///
/// # Errors
/// Usage: `root`, a folder or a file, lies inside `data`.
pub fn refuse_inside(root: &Path, data: &Path) -> anyhow::Result<()> {
    let Ok(data) = data.canonicalize() else { return Ok(()) };
    if data.is_dir() && resolved(root).starts_with(&data) {
        return Err(Problem::usage(format!(
            "--out {} lies inside the data, {}: nothing is written there; give a place outside",
            root.display(),
            data.display()
        )));
    }
    Ok(())
}

/// An absolute path without links, of a folder that need not be there yet.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    for there in path.ancestors() {
        if let Ok(known) = there.canonicalize() {
            let rest = path.strip_prefix(there).expect("ancestors are prefixes");
            // `a/../b` of folders that are not there yet.
            return rest.components().fold(known, |mut known, part| {
                match part {
                    std::path::Component::ParentDir => drop(known.pop()),
                    part => known.push(part),
                }
                known
            });
        }
    }
    path
}

/// Refuses a folder that holds something else.
fn refuse_foreign(root: &Path) -> anyhow::Result<()> {
    if root.is_file() {
        return Err(Problem::usage(format!("--out {} is a file; give a folder", root.display())));
    }
    let Ok(mut entries) = fs::read_dir(root) else { return Ok(()) };
    let ours = root.join("config.toml").is_file() || root.join(lock::NAME).is_file();
    match entries.find_map(Result::ok) {
        Some(entry) if !ours => Err(Problem::usage(format!(
            "--out {} is no run folder: it holds `{}` and no config.toml; give a new or empty folder",
            root.display(),
            entry.file_name().to_string_lossy()
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_inside_the_data_is_seen_through_links_and_dots() {
        let temporary = tempfile::tempdir().expect("a temporary folder");
        let data = temporary.path().join("data");
        fs::create_dir_all(data.join("class")).expect("a folder");
        let refused = |out: &Path| refuse_inside(out, &data).is_err();
        assert!(refused(&data));
        assert!(refused(&data.join("runs/new")));
        assert!(refused(&temporary.path().join("other/../data/x")));
        assert!(!refused(&temporary.path().join("data-runs")));
        assert!(!refused(&data.join("../runs")));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&data, temporary.path().join("link")).expect("a link");
            assert!(refused(&temporary.path().join("link/new")));
        }
    }
}
