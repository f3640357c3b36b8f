//! `status.json`: how a run stands.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use selfie_model::durable;
use serde::{Deserialize, Serialize};

use crate::exit::Problem;
use crate::screen;

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Training (or its process was killed).
    Running,
    /// Saved and stopped on a signal.
    Stopped,
    /// All steps are done.
    Finished,
    /// An error ended it.
    Failed,
    /// Its numbers were not finite.
    Diverged,
}

/// `status.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The command, such as `pretrain`.
    pub command: String,
    /// How it stands.
    pub state: State,
    /// Steps done.
    pub step: u64,
    /// Steps in all, where known.
    pub steps: Option<u64>,
    /// Results, once there are any.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub result: serde_json::Value,
    /// The process that wrote this.
    pub process: u32,
    /// When, in seconds since 1970 UTC.
    pub updated_unix: u64,
}

impl Status {
    /// The status of this process's run.
    pub fn new(command: &str, state: State, step: u64, steps: Option<u64>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            command: command.into(),
            state,
            step,
            steps,
            result: serde_json::Value::Null,
            process: std::process::id(),
            updated_unix: now.as_secs(),
        }
    }

    /// Writes it into the run folder `root`.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write(&self, root: &Path) -> anyhow::Result<()> {
        let text = format!("{:#}\n", serde_json::to_value(self)?);
        Ok(durable::write_file(&root.join("status.json"), text.as_bytes())?)
    }

    /// Prints it, for scripts.
    ///
    /// # Errors
    /// Standard output that cannot be written.
    pub fn print(&self) -> anyhow::Result<()> {
        screen::print(&format!("{:#}\n", serde_json::to_value(self)?))
    }

    /// The status of a run folder; none if there is no run.
    ///
    /// # Errors
    /// Input: a file that is none.
    pub fn read(root: &Path) -> anyhow::Result<Option<Self>> {
        let path = root.join("status.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Problem::input(format!("cannot read {}: {error}", path.display()))),
        };
        Self::parse(&path, &text).map(Some)
    }

    /// From the contents of `path`.
    pub(crate) fn parse(path: &Path, text: &str) -> anyhow::Result<Self> {
        serde_json::from_str(text)
            .map_err(|error| Problem::input(format!("{}: expected the status of a run: {error}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_change_of_a_status_is_read_or_refused(at: prop::sample::Index, character: char) {
            let status = Status::new("pretrain", State::Running, 3, Some(5));
            let mut text: Vec<char> = serde_json::to_string(&status).expect("plain values").chars().collect();
            let at = at.index(text.len());
            text[at] = character;
            if let Err(error) = Status::parse(Path::new("status.json"), &text.into_iter().collect::<String>()) {
                prop_assert_eq!(Exit::of(&error), Exit::Input);
            }
        }
    }
}
