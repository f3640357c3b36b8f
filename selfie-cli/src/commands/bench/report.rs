//! What is printed.

use std::fmt::Write as _;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::ceilings::Ceilings;
use super::measure::{Found, Subject};
use crate::args::Timed;
use crate::progress::grouped;

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Lines of the table of passes, without its head and its sums.
const LINES: usize = 25;

/// Names of passes begin with it where there is no convolution without.
const FUSED: &str = "norm_relu_";

/// What is said of a measurement.
pub struct Report<'a> {
    /// What was measured.
    pub subject: &'a Subject<'a>,
    /// Name of the network.
    pub preset: &'a str,
    /// `cpu` or `cuda`.
    pub device: &'a str,
    /// Type of the activations.
    pub precision: &'a str,
    /// What was found.
    pub found: &'a Found,
}

/// Calls of a step that are one line, and their sums.
#[derive(Clone, Debug)]
pub struct Group {
    /// The pass that was called.
    pub pass: &'static str,
    /// None for all shapes of the pass.
    pub shape: Option<String>,
    calls: usize,
    /// Of a step, the mean.
    pub seconds: f64,
    /// See [`selfie_kernels::Cost`].
    pub flops: u64,
    /// Likewise.
    pub bytes: u64,
    /// Seconds that it takes at the ceilings.
    least: f64,
    /// The part of them, were there no bytes to move.
    of_flops: f64,
    /// And were there nothing to compute.
    of_bytes: f64,
}

impl Group {
    fn add(&mut self, other: &Group) {
        self.calls += other.calls;
        self.seconds += other.seconds;
        self.flops += other.flops;
        self.bytes += other.bytes;
        self.least += other.least;
        self.of_flops += other.of_flops;
        self.of_bytes += other.of_bytes;
    }

    /// What of the ceiling is reached.
    pub fn roofline(&self) -> f64 {
        self.least / self.seconds
    }

    /// Operations or bytes a second, whichever the ceiling is nearer to.
    fn rate(&self) -> String {
        match self.of_flops > self.of_bytes {
            true => quantity(self.flops as f64 / self.seconds, "F/s"),
            false => quantity(self.bytes as f64 / self.seconds, "B/s"),
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "pass": self.pass,
            "shape": self.shape,
            "calls": self.calls,
            "seconds": self.seconds,
            "flops": self.flops,
            "bytes": self.bytes,
            "flops_per_second": self.flops as f64 / self.seconds,
            "bytes_per_second": self.bytes as f64 / self.seconds,
            "roofline": self.roofline(),
        })
    }
}

/// The calls of a step, alike ones together, those that take longest first; and the same by pass alone.
pub fn groups(found: &Found) -> [Vec<Group>; 2] {
    let mut groups: [Vec<Group>; 2] = [Vec::new(), Vec::new()];
    for (call, seconds) in &found.passes.calls {
        let cost = &call.cost;
        let one = Group {
            pass: call.pass,
            shape: Some(cost.shape.clone()),
            calls: 1,
            seconds: *seconds,
            flops: cost.flops,
            bytes: cost.bytes,
            least: found.ceilings.least(cost),
            of_flops: found.ceilings.of_flops(cost),
            of_bytes: found.ceilings.of_bytes(cost),
        };
        for (groups, one) in groups.iter_mut().zip([one.clone(), Group { shape: None, ..one }]) {
            match groups.iter_mut().find(|group| (group.pass, &group.shape) == (one.pass, &one.shape)) {
                Some(group) => group.add(&one),
                None => groups.push(one),
            }
        }
    }
    for groups in &mut groups {
        groups.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    }
    groups
}

impl Report<'_> {
    /// Seconds of a step that belong to no pass.
    fn between(&self) -> f64 {
        let passes = &self.found.passes;
        passes.seconds - passes.calls.iter().map(|(_, seconds)| seconds).sum::<f64>()
    }

    /// Which of the two gives fewer images a second.
    fn bound_by(&self) -> &'static str {
        if self.found.loader < self.found.step { "loader" } else { "step" }
    }

    /// For machines.
    pub fn as_json(&self) -> Value {
        let Self { subject, found, .. } = self;
        let [shapes, passes] = groups(found);
        let all = |groups: &[Group]| groups.iter().map(Group::as_json).collect::<Vec<_>>();
        json!({
            "task": name(subject.task),
            "preset": self.preset,
            "image_size": subject.model.image_size,
            "batch": subject.batch,
            "device": { "kind": self.device, "name": found.device, "precision": self.precision },
            "data": { "description": subject.images.dataset.describe(), "workers": subject.images.workers },
            "images_per_second": { "loader": found.loader, "step": found.step, "run": found.run },
            "bound_by": self.bound_by(),
            "waited_for_loader": found.waited,
            "peak_memory_bytes": found.peak,
            "ceilings": {
                "bytes_per_second": found.ceilings.bytes,
                "flops_per_second": found.ceilings.flops,
                "matrix_side": found.ceilings.side,
            },
            "step": {
                "seconds": found.step_seconds,
                "timed_steps": found.passes.steps,
                "timed_seconds": found.passes.seconds,
                "between_seconds": self.between(),
                "roofline": passes.iter().map(|group| group.least).sum::<f64>() / found.passes.seconds,
            },
            "passes": all(&passes),
            "shapes": all(&shapes),
            "compare": found.compared.as_ref().map(|compared| compared.as_json()),
        })
    }

    /// For people, on 80 columns.
    pub fn as_text(&self) -> String {
        let Self { subject, found, .. } = self;
        let mut text = format!(
            "{} of {}, images of {} pixels, batch {}\non {}, {}\n\n",
            match subject.task {
                Timed::Pretrain => "pretraining",
                Timed::Finetune => "finetuning",
                Timed::Infer => "inference",
            },
            self.preset,
            subject.model.image_size,
            subject.batch,
            found.device,
            self.precision
        );
        let mut line = |name: &str, value: String, about: String| {
            writeln!(text, "{}", format!("{name:<12}{value:>16}   {about}").trim_end()).expect(INFALLIBLE);
        };
        let images = |rate: f64| format!("{} images/s", significant(rate));
        let workers = subject.images.workers;
        let threads = match workers {
            0 => "between the steps (--workers 0)".into(),
            1 => "1 worker, with nothing beside it".into(),
            _ => format!("{workers} workers, with nothing beside them"),
        };
        line("loader", images(found.loader), threads);
        line("step", images(found.step), format!("{} ms", significant(1e3 * found.step_seconds)));
        let waited = found.waited.map(|part| format!("; waits {} for the loader", percent(part))).unwrap_or_default();
        line("whole run", images(found.run), format!("bound by the {}{waited}", self.bound_by()));
        if let Some(compared) = &found.compared {
            line("PyTorch", images(compared.theirs()), compared.as_text());
        }
        if let Some(peak) = found.peak {
            line("memory", format!("{:.1} MiB", peak as f64 / (1 << 20) as f64), "at most".into());
        }
        let Ceilings { bytes, flops, side } = found.ceilings;
        line("ceilings", quantity(bytes, "B/s"), "copying and adding large buffers".into());
        line("", quantity(flops, "F/s"), format!("the product of two matrices of {side}x{side}"));
        self.table(&mut text);
        text
    }

    fn table(&self, text: &mut String) {
        let step = &self.found.passes;
        let [mut shapes, passes] = groups(self.found);
        // A shape that is all of its pass says nothing new.
        shapes.retain(|shape| passes.iter().any(|pass| pass.pass == shape.pass && pass.calls > shape.calls));
        let mut seconds: Vec<f64> = passes.iter().chain(&shapes).map(|group| group.seconds).collect();
        seconds.sort_by(|a, b| b.total_cmp(a));
        let least = seconds.get(LINES - 1).copied().unwrap_or(0.0);
        let is_shown = |group: &&Group| group.seconds >= least;

        let row = |name: &str, calls: String, seconds: f64, rate: String, roofline: String| {
            let (ms, share) = (significant(1e3 * seconds), percent(seconds / step.seconds));
            format!("{name:<28} {calls:>5} {ms:>7} {share:>6} {rate:>10} {roofline:>8}").trim_end().to_owned()
        };
        let group = |name: String, group: &Group| {
            row(&name, group.calls.to_string(), group.seconds, group.rate(), percent(group.roofline()))
        };
        let mut lines = vec![
            String::new(),
            format!("{:<28} {:>5} {:>7} {:>6} {:>10} {:>8}", "pass", "calls", "ms", "share", "rate", "roofline"),
        ];
        for pass in passes.iter().filter(is_shown) {
            lines.push(group(pass.pass.trim_start_matches(FUSED).replace('_', " "), pass));
            for shape in shapes.iter().filter(|shape| shape.pass == pass.pass).filter(is_shown) {
                lines.push(group(format!("  {}", shape.shape.as_deref().unwrap_or_default()), shape));
            }
        }
        let rest: Vec<_> = passes.iter().filter(|pass| !is_shown(pass)).collect();
        if let Some((first, others)) = rest.split_first() {
            let mut sum = (*first).clone();
            others.iter().for_each(|other| sum.add(other));
            lines.push(group(format!("{} other passes", rest.len()), &sum));
        }
        lines.push(row("between the passes", String::new(), self.between(), String::new(), String::new()));
        let least: f64 = passes.iter().map(|pass| pass.least).sum();
        let calls = step.calls.len().to_string();
        lines.push(row("a step, its passes timed", calls, step.seconds, String::new(), percent(least / step.seconds)));
        writeln!(text, "{}", lines.join("\n")).expect(INFALLIBLE);
    }
}

/// The command's word for it.
pub fn name(task: Timed) -> String {
    task.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// A part of a whole.
pub fn percent(part: f64) -> String {
    format!("{:.1}%", 100.0 * part)
}

/// With three or more significant digits.
pub fn significant(number: f64) -> String {
    match number.abs() {
        ..10.0 => format!("{number:.2}"),
        ..100.0 => format!("{number:.1}"),
        ..1000.0 => format!("{number:.0}"),
        _ => grouped(number.round() as usize),
    }
}

/// `1.23 TF/s` and the like.
pub fn quantity(number: f64, unit: &str) -> String {
    let (scaled, prefix) = match number {
        ..1e6 => (number / 1e3, "k"),
        ..1e9 => (number / 1e6, "M"),
        ..1e12 => (number / 1e9, "G"),
        _ => (number / 1e12, "T"),
    };
    format!("{} {prefix}{unit}", significant(scaled))
}
