//! The table: from the results of runs to rows, and rows as Markdown, CSV, JSON and text.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::plan::Plan;
use crate::statistics::{Interval, Sample};

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// What a run of the table gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Its row's budget, as a place in the plan.
    pub budget: usize,
    /// Its arm, as a place in the plan.
    pub arm: usize,
    /// Its seed.
    pub seed: u64,
    /// Its folder, in the table's.
    pub folder: String,
    /// What it measured on the test part; none where it diverged.
    pub score: Option<Score>,
}

/// A measurement on the test part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Between 0 and 1.
    pub top1: f64,
    /// Between 0 and 1.
    pub top5: f64,
    /// In nats.
    pub loss: f64,
}

/// What a learning rate gave in the search.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// As [`Cell::budget`].
    pub budget: usize,
    /// As [`Cell::arm`].
    pub arm: usize,
    /// The learning rate.
    pub rate: f64,
    /// Its folder, in the table's.
    pub folder: String,
    /// What it measured on the validation part; none where it diverged.
    pub validation: Option<Validation>,
}

/// A measurement on a validation part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Validation {
    /// Between 0 and 1.
    pub accuracy: f64,
    /// In nats.
    pub loss: f64,
    /// Images.
    pub n: u64,
}

/// The trial with the highest accuracy, of equals the one with the lowest loss, then the lowest rate; none where all diverged.
fn best(trials: &[Trial]) -> Option<&Trial> {
    let found = trials.iter().filter_map(|trial| Some((trial, trial.validation?)));
    let order = |(_, one): &(&Trial, Validation), (_, other): &(&Trial, Validation)| {
        one.accuracy.total_cmp(&other.accuracy).reverse().then(one.loss.total_cmp(&other.loss))
    };
    found.min_by(order).map(|(trial, _)| trial)
}

/// The learning rate of a row, by its trials; none before all of them are done, and where all diverged.
pub fn rate(plan: &Plan, trials: &[Trial]) -> Option<f64> {
    match plan.searched() {
        [] => plan.rates.first().copied(),
        rates if trials.len() == rates.len() => best(trials).map(|trial| trial.rate),
        _ => None,
    }
}

/// Whether a search might have gone on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// The chosen rate is the lowest of those tried.
    Lowest,
    /// It is the highest.
    Highest,
}

/// A row: an arm with a budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// As [`Cell::budget`].
    pub budget: usize,
    /// As [`Cell::arm`].
    pub arm: usize,
    /// The learning rate, once it is chosen.
    pub rate: Option<f64>,
    /// Whether the rate lies at the edge of those tried.
    pub edge: Option<Edge>,
    /// Test accuracies by seed, of runs that did not diverge.
    pub accuracies: Vec<f64>,
    /// Runs that diverged.
    pub diverged: usize,
    /// Their mean and spread.
    pub sample: Option<Sample>,
    /// Against the baseline with the same budget; none for itself, for unfinished rows, and where runs diverged.
    pub against: Option<Comparison>,
}

/// A row against the baseline's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Difference of the means.
    pub gain: f64,
    /// Where the true one lies.
    pub interval: Option<Interval>,
    /// Ratio of the standard deviations, with its interval.
    pub spread: Option<(f64, Interval)>,
}

impl Comparison {
    /// Whether the interval of the gain excludes 0; none without an interval.
    pub fn significant(&self) -> Option<bool> {
        self.interval.map(|interval| !interval.contains(0.0))
    }
}

/// Everything that is known so far.
#[derive(Clone, Debug)]
pub struct Table<'a> {
    plan: &'a Plan,
    /// A row for each budget and arm, in the plan's order.
    pub rows: Vec<Row>,
    cells: Vec<Cell>,
    trials: Vec<Trial>,
}

impl<'a> Table<'a> {
    /// From the results that there are, in the plan's order.
    pub fn new(plan: &'a Plan, cells: Vec<Cell>, trials: Vec<Trial>) -> Self {
        let mut rows = Vec::new();
        for budget in 0..plan.budgets.len() {
            let first = rows.len();
            for arm in 0..plan.arms.len() {
                let mut row = row(plan, &cells, &trials, (budget, arm));
                row.against = if arm > 0 { compare(&row, &rows[first], plan.seeds) } else { None };
                rows.push(row);
            }
        }
        Self { plan, rows, cells, trials }
    }

    /// Whether every run has its result.
    pub fn is_finished(&self) -> bool {
        self.cells.len() as u64 == (self.plan.budgets.len() * self.plan.arms.len()) as u64 * self.plan.seeds
    }

    /// Runs that diverged, of all rows.
    pub fn diverged(&self) -> usize {
        self.rows.iter().map(|row| row.diverged).sum()
    }

    fn baseline(&self) -> &str {
        &self.plan.arms[0].name
    }

    /// Images of the test part.
    fn test_images(&self) -> u64 {
        self.plan.data.pointer("/test/used").and_then(Value::as_u64).unwrap_or(0)
    }

    fn headings(&self) -> [String; 8] {
        let baseline = self.baseline();
        [
            "labels".into(),
            "images".into(),
            "arm".into(),
            "rate".into(),
            "n".into(),
            "accuracy, %".into(),
            format!("gain over {baseline}, points [95%]"),
            "std ratio [95%]".into(),
        ]
    }

    /// A row in words. A gain is never without its interval, or without a word on why there is none.
    fn words(&self, row: &Row) -> [String; 8] {
        let budget = &self.plan.budgets[row.budget];
        let edge = match row.edge {
            Some(Edge::Lowest) => " (lowest)",
            Some(Edge::Highest) => " (highest)",
            None => "",
        };
        let accuracy = row.sample.map_or("-".into(), |Sample { mean, std, .. }| match std {
            Some(std) => format!("{:.2} ± {:.2}", 100.0 * mean, 100.0 * std),
            None => format!("{:.2}", 100.0 * mean),
        });
        let n = match row.diverged {
            0 => row.accuracies.len().to_string(),
            diverged => format!("{} ({diverged} diverged)", row.accuracies.len()),
        };
        let (gain, spread) = match row.against {
            Some(Comparison { gain, interval: Some(Interval { low, high }), spread }) => {
                let verdict = if low <= 0.0 && high >= 0.0 { "not significant" } else { "significant" };
                let ends = format!("[{:+.2}, {:+.2}]", 100.0 * low, 100.0 * high);
                let spread = spread.map(|(ratio, Interval { low, high })| format!("{ratio:.2} [{low:.2}, {high:.2}]"));
                (format!("{:+.2} {ends} {verdict}", 100.0 * gain), spread.unwrap_or("-".into()))
            }
            Some(Comparison { gain, interval: None, .. }) => {
                (format!("{:+.2} [unknown: the seeds show no spread]", 100.0 * gain), "-".into())
            }
            None => ("-".into(), "-".into()),
        };
        [
            budget.labels.clone(),
            budget.images.to_string(),
            self.plan.arms[row.arm].name.clone(),
            row.rate.map_or("-".into(), |rate| format!("{rate}{edge}")),
            n,
            accuracy,
            gain,
            spread,
        ]
    }

    /// For people who read it in a terminal.
    pub fn text(&self) -> String {
        let lines: Vec<_> =
            std::iter::once(self.headings()).chain(self.rows.iter().map(|row| self.words(row))).collect();
        let widths: Vec<usize> =
            (0..8).map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for line in lines {
            let padded = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            let padded = padded.collect::<Vec<_>>().join("  ");
            writeln!(text, "{}", padded.trim_end()).expect(INFALLIBLE);
        }
        text
    }

    /// A few columns, for below a bar.
    pub fn board(&self) -> String {
        let mut text = String::new();
        for row in self.rows.iter().filter(|row| row.rate.is_some()) {
            let [labels, _, arm, rate, n, accuracy, gain, _] = self.words(row);
            let gain = if row.against.is_some() { format!("  gain {gain}") } else { String::new() };
            writeln!(text, "  {labels:<6} {arm:<12} {accuracy:>14}  n = {n}  rate {rate}{gain}").expect(INFALLIBLE);
        }
        text.trim_end().into()
    }

    /// `table.md`.
    pub fn markdown(&self) -> String {
        let plan = self.plan;
        let mut text = String::from("# Test accuracy with few labels\n\n");
        if !self.is_finished() {
            let all = (plan.budgets.len() * plan.arms.len()) as u64 * plan.seeds;
            writeln!(text, "Unfinished: {} of {all} runs.\n", self.cells.len()).expect(INFALLIBLE);
        }
        let line = |cells: &[String; 8]| {
            format!("| {} |\n", cells.each_ref().map(|cell| cell.replace('|', "\\|")).join(" | "))
        };
        text += &line(&self.headings());
        text += "|---|--:|---|---|--:|--:|---|---|\n";
        self.rows.iter().for_each(|row| text += &line(&self.words(row)));
        text += "\n";
        for note in self.notes() {
            writeln!(text, "- {note}").expect(INFALLIBLE);
        }
        writeln!(text, "\n![accuracy and gain](plot.svg)").expect(INFALLIBLE);
        text
    }

    /// What the numbers are, and are not.
    pub fn notes(&self) -> Vec<String> {
        let plan = self.plan;
        let data = plan.data.pointer("/train/description").and_then(Value::as_str).unwrap_or("unknown");
        let mut notes = vec![
            format!("Data: {data}. Each run is measured once, on all {} images of the test part.", self.test_images()),
            format!(
                "n runs with the seeds 0 to {}: the seed draws the labelled images (the same for all arms), the fresh weights, \
                 the order and the crops. Mean ± standard deviation (n - 1). {} steps each.",
                plan.seeds - 1,
                plan.steps
            ),
            match &plan.rates[..] {
                [rate] => format!("Learning rate {rate} for all, not searched for."),
                rates => format!(
                    "Learning rate chosen for each row from {}, with seed 0, by accuracy on {}% of its labelled images, which \
                     were not trained on then; (lowest) and (highest) are at the edge of these.",
                    rates.iter().map(f64::to_string).collect::<Vec<_>>().join(", "),
                    100.0 * plan.validation
                ),
            },
            "Gain: difference of the means, with its 95% interval by Welch's t; significant if it excludes 0. Each row stands \
             for itself: of twenty without a true gain one is significant by chance."
                .into(),
            format!(
                "Std ratio: standard deviation over that of {}, below 1 is steadier; the 95% interval, by the F distribution, \
                 takes accuracies for normally distributed.",
                self.baseline()
            ),
        ];
        let origins = plan.arms.iter().filter_map(|arm| {
            let weights = arm.weights?;
            Some(format!("{} = {} (CRC-32 {:08x})", arm.name, arm.init, weights.crc32))
        });
        notes.push(format!("Weights: {}.", origins.collect::<Vec<_>>().join(", ")));
        if self.diverged() > 0 {
            notes.push("Where a run diverged no gain is given: those that are left are no fair sample.".into());
        }
        notes
    }

    /// `table.csv`: a line for each row, accuracies between 0 and 1.
    pub fn csv(&self) -> String {
        let mut text = String::from(
            "labels,images,arm,learning_rate,n,diverged,mean,std,baseline,gain,gain_low,gain_high,significant,std_ratio,\
             std_ratio_low,std_ratio_high\n",
        );
        for row in self.rows.iter().map(|row| self.row_as_json(row)) {
            let keys = [
                "labels",
                "images",
                "arm",
                "learning_rate",
                "n",
                "diverged",
                "mean",
                "std",
                "baseline",
                "gain",
                "gain_low",
                "gain_high",
                "significant",
                "std_ratio",
                "std_ratio_low",
                "std_ratio_high",
            ];
            text +=
                &csv_line(keys.map(|key| if key == "baseline" { self.baseline().into() } else { row[key].clone() }));
        }
        text
    }

    /// `cells.csv`: a line for each run.
    pub fn cells_csv(&self) -> String {
        let mut text = String::from("labels,arm,seed,learning_rate,top1,top5,loss,run\n");
        for cell in self.cells.iter().map(|cell| self.cell_as_json(cell)) {
            let keys = ["labels", "arm", "seed", "learning_rate", "top1", "top5", "loss", "run"];
            text += &csv_line(keys.map(|key| cell[key].clone()));
        }
        text
    }

    /// `table.json`.
    pub fn json(&self) -> Value {
        let plan = self.plan;
        json!({
            "finished": self.is_finished(),
            "baseline": self.baseline(),
            "steps": plan.steps,
            "seeds": plan.seeds,
            "learning_rates": plan.rates,
            "validation": plan.validation,
            "test_images": self.test_images(),
            "rows": self.rows.iter().map(|row| self.row_as_json(row)).collect::<Vec<_>>(),
            "cells": self.cells.iter().map(|cell| self.cell_as_json(cell)).collect::<Vec<_>>(),
            "search": self.trials.iter().map(|trial| self.trial_as_json(trial)).collect::<Vec<_>>(),
        })
    }

    fn row_as_json(&self, row: &Row) -> Value {
        let against = row.against;
        let (interval, spread) = (against.and_then(|it| it.interval), against.and_then(|it| it.spread));
        json!({
            "labels": self.plan.budgets[row.budget].labels,
            "images": self.plan.budgets[row.budget].images,
            "arm": self.plan.arms[row.arm].name,
            "learning_rate": row.rate,
            "n": row.accuracies.len(),
            "diverged": row.diverged,
            "mean": row.sample.map(|sample| sample.mean),
            "std": row.sample.and_then(|sample| sample.std),
            "gain": against.map(|it| it.gain),
            "gain_low": interval.map(|interval| interval.low),
            "gain_high": interval.map(|interval| interval.high),
            "significant": against.and_then(|it| it.significant()),
            "std_ratio": spread.map(|(ratio, _)| ratio),
            "std_ratio_low": spread.map(|(_, interval)| interval.low),
            "std_ratio_high": spread.map(|(_, interval)| interval.high),
        })
    }

    fn cell_as_json(&self, cell: &Cell) -> Value {
        json!({
            "labels": self.plan.budgets[cell.budget].labels,
            "arm": self.plan.arms[cell.arm].name,
            "seed": cell.seed,
            "learning_rate": self.rows[cell.budget * self.plan.arms.len() + cell.arm].rate,
            "top1": cell.score.map(|score| score.top1),
            "top5": cell.score.map(|score| score.top5),
            "loss": cell.score.map(|score| score.loss),
            "run": cell.folder,
        })
    }

    fn trial_as_json(&self, trial: &Trial) -> Value {
        json!({
            "labels": self.plan.budgets[trial.budget].labels,
            "arm": self.plan.arms[trial.arm].name,
            "learning_rate": trial.rate,
            "accuracy": trial.validation.map(|found| found.accuracy),
            "loss": trial.validation.map(|found| found.loss),
            "images": trial.validation.map(|found| found.n),
            "run": trial.folder,
        })
    }

    /// The plan behind it.
    pub fn plan(&self) -> &Plan {
        self.plan
    }
}

fn row(plan: &Plan, cells: &[Cell], trials: &[Trial], (budget, arm): (usize, usize)) -> Row {
    let cells: Vec<_> = cells.iter().filter(|cell| (cell.budget, cell.arm) == (budget, arm)).collect();
    let trials: Vec<_> = trials.iter().filter(|trial| (trial.budget, trial.arm) == (budget, arm)).cloned().collect();
    let accuracies: Vec<f64> = cells.iter().filter_map(|cell| Some(cell.score?.top1)).collect();
    let rate = rate(plan, &trials);
    let edge = match (rate, &plan.rates[..]) {
        (Some(rate), [lowest, .., _]) if rate == *lowest => Some(Edge::Lowest),
        (Some(rate), [_, .., highest]) if rate == *highest => Some(Edge::Highest),
        _ => None,
    };
    Row {
        budget,
        arm,
        rate,
        edge,
        diverged: cells.len() - accuracies.len(),
        sample: Sample::of(&accuracies),
        accuracies,
        against: None,
    }
}

/// Of whole rows only: a comparison of some seeds with others would be one of subsets.
fn compare(row: &Row, baseline: &Row, seeds: u64) -> Option<Comparison> {
    let whole = |row: &Row| row.accuracies.len() as u64 == seeds;
    let (one, other) = (row.sample?, baseline.sample?);
    (whole(row) && whole(baseline)).then(|| Comparison {
        gain: one.mean - other.mean,
        interval: one.minus(&other),
        spread: one.spread_over(&other),
    })
}

/// A line of values; nothing where there is none.
fn csv_line<const N: usize>(values: [Value; N]) -> String {
    let quoted = values.map(|value| match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains([',', '"', '\n', '\r']) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::String(text) => text,
        other => other.to_string(),
    });
    quoted.join(",") + "\n"
}
