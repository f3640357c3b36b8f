//! Doors for the targets in `fuzz/`: what a parser of this crate makes of any bytes.

use std::path::{Path, PathBuf};

use selfie_model::{Build, Purpose, Selfie};

use crate::commands::evaluate::Weights;
use crate::config::{Request, Resolved, Task, as_json, as_table, as_toml};
use crate::data::check_unchanged;
use crate::exit::Exit;
use crate::run_folder::{Line, Status, kept};

/// A file given by `-c`: the network and the training that it describes are planned as `pretrain` would, and what
/// `config.toml` would hold means the same.
pub fn config_toml(path: &Path) {
    let request = Request { files: vec![PathBuf::from(path)], ..Request::default() };
    let resolved = match Resolved::new(Task::Pretrain, &request) {
        Ok(resolved) => resolved,
        Err(error) => {
            assert!([Exit::Usage, Exit::Input].contains(&Exit::of(&error)), "{error:#}");
            assert!(error.to_string().len() < 4096, "{error:#}");
            return;
        }
    };
    let _ = as_table(&resolved);
    let read: toml::Table = as_toml(&resolved).parse().expect("it writes what it reads");
    for entry in resolved.entries() {
        let (section, name) = entry.key.split();
        assert_eq!(entry.key.kind.read_toml(&read[section][name]).as_ref(), Some(&entry.value), "{}", entry.key.name);
    }
    let changes = resolved.check_continues(&resolved.as_json()).expect("the same");
    assert!(changes.allowed.is_empty() && changes.moved.is_empty(), "{changes:?} of {}", as_json(&resolved));
    let (settings, training) = (resolved.settings(), resolved.settings().training());
    let image_size = if settings.data.image_size > 0 { settings.data.image_size } else { 32 };
    let Ok(model) = settings.network(image_size) else { return };
    // Plans of networks of thousands of blocks are sound, but long.
    if training.check().is_err() || model.depths.iter().sum::<usize>() > 32 || model.pool_blocks > 32 {
        return;
    }
    let build = Build { config: &model, batch: training.micro_batch(), purpose: Purpose::Train, seed: training.seed };
    if let Ok(plan) = Selfie::<selfie_kernels::Cpu, f32>::memory_plan(build) {
        assert!(plan.total_bytes() > 0);
    }
}

/// `config.json` beside weights.
pub fn weights_config(text: &[u8]) {
    selfie_model::fuzzing::weights_config(text);
    if let Ok(weights) = Weights::parse(Path::new("config.json"), text) {
        assert!(weights.image_size.is_none_or(|size| (1..=4096).contains(&size)));
        assert!(weights.classes.len() <= text.len());
    }
}

/// `data.json` of a run that is resumed.
pub fn data_json(text: &[u8]) {
    let Ok(before) = serde_json::from_slice(text) else { return };
    check_unchanged(&before, &before).expect("nothing changed");
    let now = serde_json::json!({ "train": { "images": 7, "used": 7 }, "classes": ["a"], "image_size": 32 });
    if let Err(error) = check_unchanged(&before, &now) {
        assert_eq!(Exit::of(&error), Exit::Input);
    }
}

/// `metrics.jsonl` of a run that is resumed at step 1,000.
pub fn metrics(text: &[u8]) {
    let lines = kept(text, 1_000);
    assert!(lines.iter().all(|line| line.step <= 1_000));
    let written: String = lines.iter().map(|line| serde_json::to_string(line).expect("plain numbers") + "\n").collect();
    assert_eq!(kept(written.as_bytes(), 1_000), lines, "reading again changes nothing");
    lines.iter().map(Line::csv).for_each(|row| assert_eq!(row.split(',').count(), 13, "{row}"));
}

/// `status.json` of a run.
pub fn status(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    match Status::parse(Path::new("status.json"), text) {
        Ok(status) => drop(serde_json::to_value(status).expect("plain values")),
        Err(error) => assert_eq!(Exit::of(&error), Exit::Input),
    }
}
