//! What `evaluate` says of runs, for people and for programs.

use std::fmt::Write as _;

use selfie_model::{CALIBRATION_BINS, Classification};
use serde_json::{Value, json};

use super::Measured;
use crate::exit::printable;
use crate::statistics::{Interval, Sample};

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Confusion matrices of more classes are not printed whole.
const MATRIX_UP_TO: usize = 20;

/// Columns of a class's name.
const NAME: usize = 24;

/// Images of each class and what they were taken for, over all runs.
pub(super) fn added(all: &[Measured]) -> Vec<Vec<u64>> {
    let mut sum = all[0].found.confusion.clone();
    for other in &all[1..] {
        for (row, other) in sum.iter_mut().zip(&other.found.confusion) {
            row.iter_mut().zip(other).for_each(|(count, more)| *count += more);
        }
    }
    sum
}

/// Right ones and all of a class.
fn of_class(confusion: &[Vec<u64>], class: usize) -> (u64, u64) {
    (confusion[class][class], confusion[class].iter().sum())
}

fn interval(found: &Classification) -> Interval {
    let right: u64 = (0..found.confusion.len()).map(|class| found.confusion[class][class]).sum();
    Interval::of_share(right as f64, found.n as f64)
}

/// Of one run.
pub(super) fn as_json(Measured { run, classes, found }: &Measured) -> Value {
    let per_class = classes.iter().enumerate().map(|(class, name)| {
        let (right, all) = of_class(&found.confusion, class);
        json!({ "class": name, "n": all, "accuracy": (all > 0).then(|| right as f64 / all as f64) })
    });
    let Interval { low, high } = interval(found);
    json!({
        "run": run,
        "top1": found.top1,
        "top1_low": low,
        "top1_high": high,
        "top5": found.top5,
        "n": found.n,
        "loss": found.loss,
        "calibration_error": found.calibration_error,
        "per_class": per_class.collect::<Vec<_>>(),
        "confusion": found.confusion,
    })
}

/// A measure of a run.
type Measure = (&'static str, fn(&Classification) -> f64);

const MEASURES: [Measure; 4] = [
    ("top1", |found| found.top1),
    ("top5", |found| found.top5),
    ("loss", |found| found.loss),
    ("calibration_error", |found| found.calibration_error),
];

fn sample(all: &[Measured], of: fn(&Classification) -> f64) -> Option<Sample> {
    Sample::of(&all.iter().map(|one| of(&one.found)).collect::<Vec<_>>())
}

/// Of several runs.
pub(super) fn all_as_json(all: &[Measured]) -> Value {
    let of = |(name, of): Measure| {
        let sample = sample(all, of);
        (
            name.to_string(),
            json!({ "mean": sample.map(|sample| sample.mean), "std": sample.and_then(|sample| sample.std) }),
        )
    };
    json!({
        "n": all.len(),
        "over_runs": MEASURES.into_iter().map(of).collect::<serde_json::Map<_, _>>(),
        "runs": all.iter().map(as_json).collect::<Vec<_>>(),
    })
}

/// Accuracies with the interval, loss and calibration.
fn summary(found: &Classification) -> String {
    let Interval { low, high } = interval(found);
    format!(
        "top-1 {:.2}% (95%: {:.2} to {:.2})  top-5 {:.2}%  loss {:.4}  calibration error {:.2}%  n = {}",
        100.0 * found.top1,
        100.0 * low,
        100.0 * high,
        100.0 * found.top5,
        found.loss,
        100.0 * found.calibration_error,
        found.n
    )
}

fn settings() -> String {
    format!(
        "95%: Wilson's interval, of these images as a sample; calibration error: expected, {CALIBRATION_BINS} bins of equal \
         width\n"
    )
}

/// Of one run.
pub(super) fn as_text(Measured { classes, found, .. }: &Measured) -> String {
    format!("{}\n{}\n{}", summary(found), settings(), of_classes(classes, &found.confusion))
}

/// Of several runs: each, and all together.
pub(super) fn all_as_text(all: &[Measured]) -> String {
    let mut text = String::new();
    for Measured { run, found, .. } in all {
        writeln!(text, "{}\n  {}", run.display(), summary(found)).expect(INFALLIBLE);
    }
    let over = |of| match sample(all, of) {
        Some(Sample { mean, std: Some(std), .. }) => format!("{:.2} ± {:.2}%", 100.0 * mean, 100.0 * std),
        _ => "-".into(),
    };
    let [top1, top5, loss, calibration] = MEASURES.map(|(_, of)| of);
    let loss =
        sample(all, loss).map_or(String::new(), |loss| format!("{:.4} ± {:.4}", loss.mean, loss.std.unwrap_or(0.0)));
    writeln!(
        text,
        "mean ± std over {} runs\n  top-1 {}  top-5 {}  loss {loss}  calibration error {}",
        all.len(),
        over(top1),
        over(top5),
        over(calibration)
    )
    .expect(INFALLIBLE);
    text + &settings()
}

/// Of each class: how many were right, and what the others were taken for.
fn of_classes(classes: &[String], confusion: &[Vec<u64>]) -> String {
    let mut text = String::new();
    let width = classes.iter().map(|name| name.chars().count()).max().unwrap_or(0).min(NAME);
    let name = |class: usize| -> String { printable(&classes[class]).chars().take(width).collect() };
    if classes.len() <= MATRIX_UP_TO {
        let cell = confusion.iter().flatten().map(|count| count.to_string().len()).max().unwrap_or(1).max(3) + 1;
        writeln!(text, "rows: the class; columns: what was predicted, in the same order").expect(INFALLIBLE);
        for class in 0..classes.len() {
            write!(text, "{:<width$} ", name(class)).expect(INFALLIBLE);
            for count in &confusion[class] {
                write!(text, "{count:>cell$}").expect(INFALLIBLE);
            }
            let (right, all) = of_class(confusion, class);
            let share = if all > 0 { format!("{:>7.1}%", 100.0 * right as f64 / all as f64) } else { "      -".into() };
            writeln!(text, " {share}").expect(INFALLIBLE);
        }
        return text;
    }
    writeln!(text, "{:<width$} {:>9} {:>7}", "class", "accuracy", "n").expect(INFALLIBLE);
    for class in 0..classes.len() {
        let (right, all) = of_class(confusion, class);
        let share = if all > 0 { format!("{:.1}%", 100.0 * right as f64 / all as f64) } else { "-".into() };
        writeln!(text, "{:<width$} {share:>9} {all:>7}", name(class)).expect(INFALLIBLE);
    }
    let mut confused: Vec<_> = (0..classes.len())
        .flat_map(|class| (0..classes.len()).map(move |other| (class, other)))
        .filter(|&(class, other)| class != other && confusion[class][other] > 0)
        .collect();
    confused.sort_by_key(|&(class, other)| std::cmp::Reverse(confusion[class][other]));
    writeln!(text, "\nmost often confused").expect(INFALLIBLE);
    for &(class, other) in confused.iter().take(10) {
        writeln!(text, "  {} taken for {}: {}", name(class), name(other), confusion[class][other]).expect(INFALLIBLE);
    }
    text
}
