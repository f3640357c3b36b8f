//! `inspect`: what is in a run folder, a checkpoint or a weight file.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use selfie_model::{Checkpoint, CheckpointStore, Description, MODEL_FILE, POOL_FILE, TensorFile};
use serde_json::{Value, json};

use super::next::{self, Labelled};
use crate::args::Inspect;
use crate::exit::{Exit, Problem, printable};
use crate::progress::grouped;
use crate::run_folder::Status;
use crate::screen;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// What a path turned out to be.
struct Findings {
    /// In words.
    kind: &'static str,
    /// Files with tensors.
    files: Vec<Tensors>,
    /// `config.json` beside the weights.
    config: Option<Value>,
    /// How to load the weights elsewhere.
    loading: Option<Loading>,
    /// Of a run.
    status: Option<Status>,
    /// Of a run: its checkpoints.
    checkpoints: Vec<String>,
    /// The one of them that did best on held-out images.
    best: Option<String>,
    /// Of a checkpoint.
    progress: Option<Value>,
}

/// How weights are loaded in Python.
struct Loading {
    /// The lines.
    lines: String,
    /// What the network takes.
    input: String,
}

impl Loading {
    /// None for tensors that timm has no place for.
    fn of(weights: &Path) -> anyhow::Result<Option<Self>> {
        let Ok(description) = Description::of(weights) else { return Ok(None) };
        Ok(Some(Self { lines: description.loading(weights)?, input: description.input() }))
    }
}

struct Tensors {
    path: PathBuf,
    /// Name and shape.
    tensors: Vec<(String, Vec<usize>)>,
    /// Those of another type than numbers, with that.
    others: Vec<(String, Vec<usize>, String)>,
}

impl Tensors {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let file = TensorFile::<f32>::read(path)?;
        let tensors = file.shapes().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect();
        let others = file.others().map(|(name, shape, kind)| (name.to_string(), shape.to_vec(), kind)).collect();
        Ok(Self { path: path.to_path_buf(), tensors, others })
    }

    /// Elements of all tensors that are trained: running statistics are not.
    fn parameters(&self) -> usize {
        let trained = self.tensors.iter().filter(|(name, _)| !name.contains(".running_"));
        trained.map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    fn has(&self, prefix: &str) -> bool {
        self.tensors.iter().any(|(name, _)| name.starts_with(prefix))
    }
}

/// Runs the command.
///
/// # Errors
/// Input: a path that is none of the three, or damaged.
pub fn run(arguments: &Inspect) -> anyhow::Result<Exit> {
    let findings = look(&arguments.path)?;
    let text = if arguments.json {
        format!("{:#}\n", findings.as_json(&arguments.path))
    } else {
        printable(&findings.as_text(&arguments.path)).into_owned()
    };
    screen::print(&text)?;
    Ok(Exit::Done)
}

fn look(path: &Path) -> anyhow::Result<Findings> {
    let mut findings = Findings {
        kind: "a weight file",
        files: Vec::new(),
        config: None,
        loading: None,
        status: None,
        checkpoints: Vec::new(),
        best: None,
        progress: None,
    };
    if path.is_file() {
        findings.files.push(Tensors::read(path)?);
        findings.read_about(path.parent().unwrap_or(Path::new(".")));
        findings.loading = Loading::of(path)?;
    } else if path.join("manifest.json").is_file() {
        findings.kind = "a checkpoint";
        let checkpoint = Checkpoint::<f32>::read(path)?;
        findings.progress = Some(serde_json::to_value(checkpoint.progress)?);
        findings.config = Some(checkpoint.config);
        findings.files.push(Tensors::read(&path.join("weights.safetensors"))?);
        // What the puzzle has beside the network would be refused.
        if !findings.files[0].has("pool.") {
            findings.loading = Loading::of(path)?;
        }
    } else if path.join("config.toml").is_file() || path.join(MODEL_FILE).is_file() {
        let weights = if path.join(MODEL_FILE).is_file() {
            findings.kind = "a weights folder";
            path.to_path_buf()
        } else {
            findings.kind = "a run folder";
            findings.status = Status::read(path)?;
            let names = std::fs::read_dir(path.join("state")).into_iter().flatten().filter_map(Result::ok);
            findings.checkpoints = names.filter_map(|name| name.file_name().into_string().ok()).collect();
            findings.checkpoints.retain(|name| name.starts_with("step-"));
            findings.checkpoints.sort();
            let store = CheckpointStore::new(path.join("state"), 1);
            let folder = store.best().map(|step| store.folder_of(step));
            findings.best = folder.and_then(|folder| Some(folder.file_name()?.to_string_lossy().into_owned()));
            path.join("weights")
        };
        for name in [MODEL_FILE, POOL_FILE] {
            if weights.join(name).is_file() {
                findings.files.push(Tensors::read(&weights.join(name))?);
            }
        }
        findings.read_about(&weights);
        if weights.join(MODEL_FILE).is_file() {
            findings.loading = Loading::of(&weights)?;
        }
    } else {
        let found = if path.exists() { "none of them" } else { "nothing" };
        return Err(Problem::input(format!(
            "{}: expected a run folder (config.toml), a checkpoint (manifest.json) or a .safetensors file, found {found}",
            path.display()
        )));
    }
    Ok(findings)
}

impl Findings {
    /// What lies beside the weights.
    fn read_about(&mut self, folder: &Path) {
        let text = std::fs::read_to_string(folder.join("config.json")).ok();
        self.config = text.and_then(|text| serde_json::from_str(&text).ok());
    }

    /// What a classifier that starts from these weights would have to learn from random values.
    fn not_pretrained(&self) -> Option<String> {
        let model = self.files.iter().find(|file| file.has("stem."))?;
        let mut missing: Vec<_> =
            (0..4).map(|stage| format!("stages.{stage}")).filter(|stage| !model.has(&format!("{stage}."))).collect();
        // The norm of a network of fewer stages belongs to its last one.
        if !missing.is_empty() {
            missing.push("norm".into());
        }
        if !model.has("head.fc.") {
            missing.push("head".into());
        }
        // Its classes stand behind an attention pooling, and so do those of what starts from it.
        if self.files.iter().any(|file| file.has("pool.") && file.has("head.fc.")) {
            missing.clear();
        }
        Some(if missing.is_empty() { "nothing, for the same classes".into() } else { missing.join(", ") })
    }

    fn as_json(&self, path: &Path) -> Value {
        let files: Vec<_> = self
            .files
            .iter()
            .map(|file| {
                let tensors: serde_json::Map<_, _> =
                    file.tensors.iter().map(|(name, shape)| (name.clone(), json!(shape))).collect();
                let others: serde_json::Map<_, _> =
                    file.others.iter().map(|(name, shape, kind)| (name.clone(), json!([kind, shape]))).collect();
                json!({ "path": file.path, "parameters": file.parameters(), "tensors": tensors, "not_used": others })
            })
            .collect();
        json!({
            "path": path,
            "kind": self.kind,
            "status": self.status,
            "progress": self.progress,
            "checkpoints": self.checkpoints,
            "best": self.best,
            "config": self.config,
            "not_pretrained": self.not_pretrained(),
            "input": self.loading.as_ref().map(|loading| &loading.input),
            "loading": self.loading.as_ref().map(|loading| &loading.lines),
            "files": files,
        })
    }

    fn as_text(&self, path: &Path) -> String {
        let labelled = Labelled::of_run(path);
        let mut text = String::new();
        for file in &self.files {
            writeln!(text, "{}", file.path.display()).expect(INFALLIBLE);
            let names = file.tensors.iter().map(|(name, _)| name).chain(file.others.iter().map(|(name, ..)| name));
            let width = names.map(String::len).max().unwrap_or(0);
            for (name, shape) in &file.tensors {
                writeln!(text, "  {name:<width$}  {shape:?}").expect(INFALLIBLE);
            }
            for (name, shape, kind) in &file.others {
                writeln!(text, "  {name:<width$}  {shape:?}  {kind}, not used").expect(INFALLIBLE);
            }
            writeln!(text, "  {} tensors, {} parameters\n", file.tensors.len(), grouped(file.parameters()))
                .expect(INFALLIBLE);
        }
        writeln!(text, "{} is {}", path.display(), self.kind).expect(INFALLIBLE);
        if let Some(status) = &self.status {
            let state = serde_json::to_value(status.state).unwrap_or_default();
            let of = status.steps.map(|steps| format!(" of {steps}")).unwrap_or_default();
            writeln!(text, "  {}: {} at step {}{of}", status.command, state.as_str().unwrap_or("?"), status.step)
                .expect(INFALLIBLE);
            if !status.result.is_null() {
                writeln!(text, "  result: {}", status.result).expect(INFALLIBLE);
            }
        }
        if let Some(progress) = &self.progress {
            writeln!(text, "  progress: {progress}").expect(INFALLIBLE);
        }
        if self.kind == "a run folder" {
            let list = if self.checkpoints.is_empty() { "none".into() } else { self.checkpoints.join(", ") };
            writeln!(text, "  checkpoints: {list}").expect(INFALLIBLE);
            if let Some(best) = &self.best {
                writeln!(text, "  best:        {best} ({})", next::finetune(&path.join("state").join(best), &labelled))
                    .expect(INFALLIBLE);
            }
            if self.files.is_empty() {
                writeln!(text, "  no weights yet").expect(INFALLIBLE);
            }
        }
        if let Some(config) = &self.config {
            for (name, value) in config.as_object().into_iter().flatten() {
                writeln!(text, "  {name}: {value}").expect(INFALLIBLE);
            }
        }
        if let Some(missing) = self.not_pretrained() {
            writeln!(text, "  a classifier that starts from it begins afresh: {missing}").expect(INFALLIBLE);
            writeln!(text, "\nto finetune from it:\n  {}", next::finetune(path, &labelled)).expect(INFALLIBLE);
        }
        if let Some(Loading { lines, input }) = &self.loading {
            writeln!(text, "\nto load it in Python (input: {input}):").expect(INFALLIBLE);
            lines.lines().for_each(|line| writeln!(text, "  {line}").expect(INFALLIBLE));
        }
        text
    }
}
