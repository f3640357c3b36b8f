//! The command that comes next, as text that can be pasted.

use std::path::{Path, PathBuf};

use crate::config::saved_data_path;
use crate::run_folder;
use crate::shell;

/// Where the next command finds labelled images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Labelled {
    /// Images with classes.
    At(PathBuf),
    /// Only the reader knows.
    Unknown,
}

impl Labelled {
    /// What was trained on, if it has classes.
    pub fn among(path: &Path, classes: usize) -> Self {
        if classes < 2 { Self::Unknown } else { Self::At(path.into()) }
    }

    /// What the run was trained on that has `path` as its folder or in it, if it has classes and is still there.
    pub fn of_run(path: &Path) -> Self {
        let run = path.ancestors().take(3).find(|folder| folder.join("config.toml").is_file());
        let Some((run, data)) = run.and_then(|run| Some((run, saved_data_path(run)?))) else { return Self::Unknown };
        let classes = run_folder::classes(run);
        let there = data.exists() || data.to_str().is_some_and(|text| text.starts_with("synthetic:"));
        if there { Self::among(&data, classes) } else { Self::Unknown }
    }
}

/// Finetunes from `init` into a folder that is not there yet. A second line, if there is one, says what to fill in.
pub fn finetune(init: &Path, data: &Labelled) -> String {
    let names = std::iter::once("runs/fine".to_string()).chain((2..).map(|number| format!("runs/fine-{number}")));
    let free = names.into_iter().find(|name| !Path::new(name).exists()).expect("one of endlessly many names is free");
    let (data, note) = match data {
        Labelled::At(path) => (shell::path(path), ""),
        Labelled::Unknown => ("PATH".into(), "\n          (PATH stands for images in a folder for each class)"),
    };
    format!("selfie finetune --data {data} --init {} --labels 5% --out {free}{note}", shell::path(init))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_filled_in_is_said() {
        let text = finetune(Path::new("my runs/pre"), &Labelled::among(Path::new("photos"), 1));
        assert!(text.starts_with("selfie finetune --data PATH --init 'my runs/pre' --labels 5%"), "{text}");
        assert!(text.contains("(PATH stands for"), "{text}");
        let text = finetune(Path::new("-pre"), &Labelled::among(Path::new("my photos"), 2));
        assert_eq!(text, "selfie finetune --data 'my photos' --init ./-pre --labels 5% --out runs/fine");
    }
}
