//! `metrics.jsonl` and `metrics.csv`: a line for every logged step and every evaluation.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use selfie_model::durable::{Appender, write_file};
use serde::{Deserialize, Serialize};

use crate::exit::Problem;

/// A line. Lines of training have no `eval_…`; lines of evaluations have step, epoch, seconds, these, `x_chance` and
/// `feature_std`; lines of probes `knn_accuracy` in place of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Steps done.
    pub step: u64,
    /// Passes over the training images done.
    pub epoch: f64,
    /// Mean over the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Of the batch, between 0 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Accuracy, of the batch or of held-out images, over the accuracy of guessing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_chance: Option<f64>,
    /// Of this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Norm of the whole gradient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Since the line before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images_per_second: Option<f64>,
    /// Part of the time since the line before that was spent waiting for images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_wait: Option<f64>,
    /// The most memory that the process has held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Of training and evaluation, over all processes of the run.
    pub seconds: f64,
    /// Mean over held-out images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Of held-out images, between 0 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
    /// Standard deviation over held-out images of their features; 0 is a collapse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_std: Option<f64>,
    /// Of the probe on labelled images, between 0 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knn_accuracy: Option<f64>,
}

const COLUMNS: [&str; 15] = [
    "step",
    "epoch",
    "loss",
    "accuracy",
    "x_chance",
    "learning_rate",
    "grad_norm",
    "images_per_second",
    "data_wait",
    "memory_bytes",
    "seconds",
    "eval_loss",
    "eval_accuracy",
    "feature_std",
    "knn_accuracy",
];

impl Line {
    pub(crate) fn csv(&self) -> String {
        let real = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
        [
            self.step.to_string(),
            self.epoch.to_string(),
            real(self.loss),
            real(self.accuracy),
            real(self.x_chance),
            real(self.learning_rate),
            real(self.grad_norm),
            real(self.images_per_second),
            real(self.data_wait),
            self.memory_bytes.map(|bytes| bytes.to_string()).unwrap_or_default(),
            self.seconds.to_string(),
            real(self.eval_loss),
            real(self.eval_accuracy),
            real(self.feature_std),
            real(self.knn_accuracy),
        ]
        .join(",")
    }
}

/// The two files, open at their end.
#[derive(Debug)]
pub struct Metrics {
    json: Appender,
    csv: Appender,
    lines: Vec<Line>,
    /// See [`Metrics::best`]: it is asked at every step.
    best: Option<(u64, f64)>,
}

impl Metrics {
    /// Opens the files of a run that stands at `step`: lines after it, and torn or damaged ones, are taken away.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn open(folder: &Path, step: u64) -> anyhow::Result<Self> {
        let (json, csv) = (folder.join("metrics.jsonl"), folder.join("metrics.csv"));
        let lines = match fs::read(&json) {
            Ok(text) => kept(&text, step),
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Problem::input(format!("cannot read {}: {error}", json.display()))),
        };
        let mut rows = vec![COLUMNS.join(",")];
        rows.extend(lines.iter().map(Line::csv));
        write_file(&csv, (rows.join("\n") + "\n").as_bytes())?;
        let text =
            lines.iter().map(|line| Ok(serde_json::to_string(line)? + "\n")).collect::<anyhow::Result<String>>()?;
        write_file(&json, text.as_bytes())?;
        let best = lines.iter().fold(None, better);
        Ok(Self { json: Appender::open(json)?, csv: Appender::open(csv)?, lines, best })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn push(&mut self, line: Line) -> anyhow::Result<()> {
        self.json.push(&(serde_json::to_string(&line)? + "\n"))?;
        self.csv.push(&(line.csv() + "\n"))?;
        self.best = better(self.best, &line);
        self.lines.push(line);
        Ok(())
    }

    /// Flushes both files to the disk: a checkpoint must not be ahead of them when the power fails.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn flush(&self) -> anyhow::Result<()> {
        self.json.flush()?;
        Ok(self.csv.flush()?)
    }

    /// Step and accuracy of the evaluation that found the highest accuracy, the first of equals.
    pub fn best(&self) -> Option<(u64, f64)> {
        self.best
    }

    /// Whether the features were probed at `step`.
    pub fn has_probe(&self, step: u64) -> bool {
        self.lines.iter().any(|line| line.step == step && line.knn_accuracy.is_some())
    }

    /// Whether held-out images were measured at `step`.
    pub fn has_evaluation(&self, step: u64) -> bool {
        self.lines.iter().any(|line| line.step == step && line.eval_loss.is_some())
    }
}

/// The best evaluation so far, after one more line.
fn better(best: Option<(u64, f64)>, line: &Line) -> Option<(u64, f64)> {
    match (best, line.eval_accuracy) {
        (Some((_, most)), Some(accuracy)) if accuracy <= most => best,
        (_, Some(accuracy)) => Some((line.step, accuracy)),
        (_, None) => best,
    }
}

/// The lines of `metrics.jsonl` up to `step`. A damaged line costs no other.
pub(crate) fn kept(text: &[u8], step: u64) -> Vec<Line> {
    let lines = text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    lines.filter(|line| line.step <= step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_lines_or_left_out(bytes: Vec<u8>, step: u64, at: prop::sample::Index, byte: u8) {
            let whole = Line { step, loss: Some(0.5), ..Line::default() };
            let text = serde_json::to_string(&whole).expect("plain numbers");
            let lines = kept(&[text.as_bytes(), b"\n", &bytes].concat(), u64::MAX);
            prop_assert_eq!(lines.first(), Some(&whole));
            let mut changed = text.into_bytes();
            let at = at.index(changed.len());
            changed[at] = byte;
            prop_assert!(kept(&changed, step).iter().all(|line| line.step <= step));
        }
    }

    #[test]
    fn a_resumed_run_has_neither_gaps_nor_repeats() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let line = |step| Line { step, loss: Some(1.0 / step as f64), ..Line::default() };
        let mut metrics = Metrics::open(folder.path(), 0).expect("new files");
        for step in [10, 20, 30] {
            metrics.push(line(step)).expect("written");
        }
        // Killed while it wrote line 40; the checkpoint is of step 20.
        metrics.json.push("{\"step\": 40, \"lo").expect("written");
        let mut metrics = Metrics::open(folder.path(), 20).expect("there");
        assert_eq!(metrics.lines, [line(10), line(20)]);
        metrics.push(Line { step: 30, eval_loss: Some(0.5), ..Line::default() }).expect("written");
        assert!(metrics.has_evaluation(30) && !metrics.has_evaluation(20));
        let json = fs::read_to_string(folder.path().join("metrics.jsonl")).expect("there");
        assert_eq!(json.lines().count(), 3);
        let csv = fs::read_to_string(folder.path().join("metrics.csv")).expect("there");
        let rows: Vec<_> = csv.lines().collect();
        assert_eq!(rows.len(), 4);
        assert!(rows.iter().all(|row| row.split(',').count() == COLUMNS.len()), "{csv}");
        assert_eq!(rows[2], "20,0,0.05,,,,,,,,0,,,,");
    }

    #[test]
    fn a_damaged_line_costs_no_other() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut metrics = Metrics::open(folder.path(), 0).expect("new files");
        for step in [1, 2, 3] {
            metrics.push(Line { step, loss: Some(0.5), ..Line::default() }).expect("written");
        }
        let path = folder.path().join("metrics.jsonl");
        let mut bytes = fs::read(&path).expect("there");
        let second = bytes.iter().position(|&byte| byte == b'\n').expect("three lines") + 1;
        for damage in [&b"\xff\xfe"[..], b"{}", b"[]", b"\"\"", b"{\"step\":-1", b"{\"step\":1e400"] {
            bytes[second..second + damage.len()].copy_from_slice(damage);
            fs::write(&path, &bytes).expect("written");
            let steps: Vec<_> =
                Metrics::open(folder.path(), 9).expect("there").lines.iter().map(|line| line.step).collect();
            assert_eq!(steps, [1, 3], "{}", String::from_utf8_lossy(damage));
        }
        fs::remove_file(&path).expect("there");
        fs::create_dir(&path).expect("a folder in its place");
        assert!(Metrics::open(folder.path(), 9).is_err());
    }
}
