//! The same steps in PyTorch, in turns with ours: the project's yardstick, in a process that is asked through pipes.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use selfie_kernels::{Backend, Element};
use selfie_model::{LogitScale, ModelConfig, NamedScale, Network, Positions, Query, Stem, Steps};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::measure::{Subject, median};
use super::report::name;
use crate::args::Timed;
use crate::config::Run;
use crate::device::Chosen;
use crate::exit::Problem;
use crate::system::System;

/// The yardstick, as the repository has it.
const FILES: [(&str, &str); 2] = [
    ("torch_selfie.py", include_str!("../../../../benches/pytorch/torch_selfie.py")),
    ("yardstick.py", include_str!("../../../../benches/gpu/yardstick.py")),
];
/// Turns of each.
const TURNS: usize = 3;
/// Stretches of a turn, of which the median counts, and how long one is at least: the clock is read behind it.
const STRETCHES: usize = 3;
const STRETCH: f64 = 0.2;

/// A Python with PyTorch.
pub struct Yardstick {
    python: String,
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// The words that describe network, device and precision.
    options: Vec<String>,
    /// Where its sources are, and what it complains of.
    folder: TempDir,
}

/// Images a second of both, turn by turn.
#[derive(Debug)]
pub struct Compared {
    peer: String,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

impl Yardstick {
    /// Starts it, and sees that PyTorch is there. `python` names a program; `python` itself is `python3`.
    ///
    /// # Errors
    /// Usage: a network that the yardstick does not have. No Python, no PyTorch.
    pub fn start(python: &str, subject: &Subject<'_>, chosen: &Chosen, run: &Run) -> anyhow::Result<Self> {
        let options = options(subject, chosen, run)?;
        let folder = TempDir::with_prefix("selfie-bench-").context("no folder for PyTorch's side")?;
        for (name, text) in FILES {
            fs::write(folder.path().join(name), text).context("cannot write PyTorch's side")?;
        }
        let program = if python == "python" { "python3" } else { python };
        let threads = if run.threads == 0 { System::here().threads.most } else { run.threads };
        let complaints = fs::File::create(folder.path().join(COMPLAINTS)).context("no file for PyTorch's messages")?;
        let child = Command::new(program)
            .arg(folder.path().join("yardstick.py"))
            // As many threads as ours.
            .env("OMP_NUM_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(complaints)
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("{}", missing(program, "there is no such program"))
            }
            Err(error) => return Err(error).with_context(|| format!("cannot start {program}")),
        };
        let (questions, answers) = match (child.stdin.take(), child.stdout.take()) {
            (Some(questions), Some(answers)) => (questions, BufReader::new(answers)),
            _ => bail!("cannot talk to {program}"),
        };
        let mut yardstick = Self { python: program.into(), child, questions, answers, options, folder };
        yardstick.ask(&["about".into()])?;
        Ok(yardstick)
    }

    /// Ours and theirs in turns, of the same shapes.
    ///
    /// # Errors
    /// Those of the steps, and what PyTorch says.
    pub fn compare<B: Backend<T>, T: Element, N: Network<B, T>>(
        &mut self,
        subject: &Subject<'_>,
        mut steps: Steps<B, T, N>,
        step_seconds: f64,
    ) -> anyhow::Result<Compared> {
        let length = (STRETCH / step_seconds).ceil().clamp(1.0, 1e4) as usize;
        let (mut ours, mut theirs, mut peer) = (Vec::new(), Vec::new(), String::new());
        for turn in 0..TURNS {
            let mut stretch = || -> anyhow::Result<f64> {
                let began = Instant::now();
                (0..length).try_for_each(|_| steps.step())?;
                steps.finish()?;
                Ok(began.elapsed().as_secs_f64() / length as f64)
            };
            if turn == 0 {
                stretch()?;
            }
            let stretches = (0..STRETCHES).map(|_| stretch()).collect::<anyhow::Result<Vec<f64>>>()?;
            ours.push(subject.rate(median(&stretches)));
            let mut words = self.options.clone();
            words.extend(["--steps".into(), length.to_string(), "--repeats".into(), STRETCHES.to_string()]);
            let answer = self.ask(&words)?;
            theirs.push(answer["images_per_second"].as_f64().context("PyTorch's side gives no images_per_second")?);
            peer = answer["peer"].as_str().unwrap_or("pytorch").into();
        }
        Ok(Compared { peer, ours, theirs })
    }

    fn ask(&mut self, words: &[String]) -> anyhow::Result<Value> {
        let mut line = String::new();
        let asked = writeln!(self.questions, "{}", json!(words)).and_then(|()| self.questions.flush());
        let answered = asked.and_then(|()| self.answers.read_line(&mut line));
        if answered.is_err() || line.is_empty() {
            return Err(self.silence());
        }
        let answer: Value = serde_json::from_str(&line).with_context(|| format!("PyTorch's side answered {line}"))?;
        match answer["error"].as_str() {
            Some(error) => Err(anyhow!("PyTorch's side failed: {error}")),
            None => Ok(answer),
        }
    }

    /// Why it does not answer.
    fn silence(&mut self) -> anyhow::Error {
        // It ended, or will never say what is asked.
        drop(self.child.kill());
        drop(self.child.wait());
        let complaints = fs::read_to_string(self.folder.path().join(COMPLAINTS)).unwrap_or_default();
        let last = complaints.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it ended without a word");
        match last.starts_with("ModuleNotFoundError") || last.starts_with("ImportError") {
            true => anyhow!("{}", missing(&self.python, last)),
            false => anyhow!("PyTorch's side ended: {last}"),
        }
    }
}

/// What it complains of, in its folder.
const COMPLAINTS: &str = "stderr.txt";

impl Drop for Yardstick {
    fn drop(&mut self) {
        // An end that fails has happened already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn missing(program: &str, why: &str) -> String {
    format!(
        "--compare: {program} cannot run PyTorch: {why}; install it, as by `python3 -m venv venv && venv/bin/pip install \
         torch numpy`, and name that Python: --compare venv/bin/python"
    )
}

/// The yardstick's words for what is compared.
fn options(subject: &Subject<'_>, chosen: &Chosen, run: &Run) -> anyhow::Result<Vec<String>> {
    let Subject { model, batch, classes, .. } = subject;
    let [kind, precision] = chosen.names();
    // Its words for a device are ours, but for `auto`.
    let device = if run.device.starts_with(kind) { &run.device } else { kind };
    let depths = model.depths.map(|depth| depth.to_string()).join(",");
    let mut words: Vec<String> = vec!["bench".into()];
    let mut word = |flag: &str, value: String| words.extend([flag.into(), value]);
    word("--task", name(subject.task));
    word("--image-size", model.image_size.to_string());
    word("--batch", batch.to_string());
    word("--classes", classes.to_string());
    word("--depths", depths);
    word("--width", model.stem_width.to_string());
    word("--device", device.to_string());
    word("--dtype", precision.into());
    if kind == "cpu" {
        // glibc gives every large block back to the kernel, which zeroes it again; PyTorch is faster without.
        word("--malloc", "retain".into());
    }
    word("--warmup", if kind == "cpu" { "1" } else { "5" }.into());
    if subject.task == Timed::Pretrain {
        word("--pool-blocks", model.pool_blocks.to_string());
        word("--dropout", model.dropout.to_string());
        let query = match model.query {
            Query::Summary => "summary",
            Query::Places => "places",
        };
        word("--query", query.into());
        let scale = match model.logit_scale {
            LogitScale::Named(NamedScale::None) => 1.0,
            LogitScale::Named(NamedScale::InverseSqrt) => 1.0 / (model.pool_width() as f64).sqrt(),
            LogitScale::Factor(factor) => factor,
        };
        word("--logit-scale", scale.to_string());
        if !model.encoder_positions {
            words.push("--no-encoder-positions".into());
        }
    }
    check_network(subject.task, model)?;
    Ok(words)
}

/// Refuses a network that the yardstick cannot be told to build.
fn check_network(task: Timed, model: &ModelConfig) -> anyhow::Result<()> {
    let theirs = ModelConfig {
        patch_size: None,
        stem: Stem::Auto,
        heads: (model.stem_width / 2).max(1),
        ffn: 10 * model.stem_width,
        hidden_fraction: 0.25,
        positions: Positions::Auto,
        ..model.clone()
    };
    let same = match task {
        Timed::Pretrain => theirs == *model,
        Timed::Finetune | Timed::Infer => theirs.stem == model.stem,
    };
    if same {
        return Ok(());
    }
    Err(Problem::usage(
        "--compare: PyTorch's side has the presets' networks only: leave model.stem, patch_size, heads, ffn, \
         hidden_fraction and positions as they are",
    ))
}

impl Compared {
    /// Images a second of PyTorch.
    pub fn theirs(&self) -> f64 {
        median(&self.theirs)
    }

    /// How much faster ours is, in each turn, lowest first.
    fn ratios(&self) -> Vec<f64> {
        let mut ratios: Vec<f64> = self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours / theirs).collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }

    /// For people.
    pub fn as_text(&self) -> String {
        let ratios = self.ratios();
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let version = self.peer.trim_start_matches("pytorch ");
        format!("{version}; ours {:.2}x as fast ({least:.2} to {most:.2})", median(&ratios))
    }

    /// For machines.
    pub fn as_json(&self) -> Value {
        let ratios = self.ratios();
        json!({
            "peer": self.peer,
            "turns": ratios.len(),
            "ours_images_per_second": median(&self.ours),
            "peer_images_per_second": self.theirs(),
            "speed_ratio": median(&ratios),
            "speed_ratio_min": ratios[0],
            "speed_ratio_max": ratios[ratios.len() - 1],
        })
    }
}
