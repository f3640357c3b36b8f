//! What a table will be: settled before its first step and kept in `plan.json`, so that it goes on to the same numbers.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use selfie_data::{Dataset, LabelBudget};
use selfie_model::{Fingerprint, PhiloxDraws, durable, fingerprint};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::Fewlabel;
use crate::commands::begin::SCRATCH;
use crate::config::Resolved;
use crate::data::{self, Labelled};
use crate::exit::Problem;

/// Its name in the table's folder.
pub const FILE: &str = "plan.json";
const FORMAT: &str = "selfie fewlabel 1";

/// What is asked for unless something else is: the paper's shares of CIFAR-10's labels.
const LABELS: [&str; 4] = ["5%", "8%", "20%", "100%"];
const SEEDS: u64 = 5;
const VALIDATION: f64 = 0.2;

/// A plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    format: String,
    /// What is compared; gains are over the first.
    pub arms: Vec<Arm>,
    /// Rows of each arm.
    pub budgets: Vec<Budget>,
    /// Runs of each row.
    pub seeds: u64,
    /// Learning rates to choose from, rising.
    pub rates: Vec<f64>,
    /// Part of the labelled images by which the rate is chosen.
    pub validation: f64,
    /// Steps of each run.
    pub steps: u64,
    /// The time from which these were reckoned.
    pub minutes: Option<f64>,
    /// The configuration that all runs share.
    pub config: Value,
    /// The data, as `data.json` describes them.
    pub data: Value,
}

/// Where runs start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// In the table and as a folder.
    pub name: String,
    /// As `--init` takes it.
    pub init: String,
    /// What tells these weights from others; none of random ones.
    pub weights: Option<Fingerprint>,
}

/// How many labels runs may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// As `--labels` takes it.
    pub labels: String,
    /// Its folder.
    pub folder: String,
    /// Labelled images.
    pub images: usize,
}

impl Budget {
    /// The budget of the runs with `seed`: a share without a seed of its own is drawn by theirs.
    pub fn of_seed(&self, seed: u64) -> String {
        match self.labels.parse() {
            Ok(LabelBudget::Percent { .. } | LabelBudget::PerClass { .. }) if !self.labels.contains('@') => {
                format!("{}@{seed}", self.labels)
            }
            _ => self.labels.clone(),
        }
    }
}

/// What was asked for, checked against the data and the weights. Empty and none is what was not.
pub struct Asked<'a> {
    arguments: &'a Fewlabel,
    arms: Vec<Arm>,
    budgets: Vec<Budget>,
    rates: Vec<f64>,
}

impl<'a> Asked<'a> {
    /// Checks what was asked for.
    ///
    /// # Errors
    /// Usage: fewer images than one of each class, something said twice. Input: weights that are not there.
    pub fn new(arguments: &'a Fewlabel, labelled: &Labelled) -> anyhow::Result<Self> {
        let mut rates = arguments.lr.clone();
        rates.sort_by(f64::total_cmp);
        if let Some(pair) = rates.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Problem::usage(format!("--lr has {} twice: leave one out", pair[0])));
        }
        let arms = if arguments.init.is_empty() { Vec::new() } else { arms(arguments)? };
        Ok(Self { arguments, arms, budgets: budgets(&arguments.labels, &*labelled.train)?, rates })
    }

    /// The plan that this makes, with `steps` still to be reckoned if it is sized by the clock.
    ///
    /// # Errors
    /// Usage: a single arm; a length that is none of a table.
    pub fn plan(&self, resolved: &Resolved, labelled: &Labelled, data: Value) -> anyhow::Result<Plan> {
        let settings = resolved.settings();
        if self.arms.len() < 2 {
            return Err(Problem::usage("a comparison needs two arms: give one more --init, or leave --no-scratch out"));
        }
        let budgets = if self.budgets.is_empty() {
            budgets(&LABELS.map(String::from), &*labelled.train)?
        } else {
            self.budgets.clone()
        };
        let preset = settings.train.lr;
        let rates = match self.rates.is_empty() {
            true => vec![preset * 2.0 / 5.0, preset, preset * 5.0 / 2.0],
            false => self.rates.clone(),
        };
        let plan = Plan {
            format: FORMAT.into(),
            arms: self.arms.clone(),
            budgets,
            seeds: self.arguments.seeds.unwrap_or(SEEDS),
            rates,
            validation: self.arguments.validation.unwrap_or(VALIDATION),
            steps: self.arguments.steps.unwrap_or(settings.train.steps),
            minutes: self.arguments.minutes,
            config: resolved.as_json(),
            data,
        };
        if plan.steps == 0 && plan.minutes.is_none() {
            return Err(Problem::usage(
                "train.epochs and train.minutes are lengths of one run: size a table by --steps (of each run) or \
                 --minutes (for all of it)",
            ));
        }
        Ok(plan)
    }

    /// Refuses to go on with another plan than `plan`, that of `out`.
    ///
    /// # Errors
    /// Usage: both values, of the first that differs.
    pub fn check_continues(&self, plan: &Plan, out: &Path) -> anyhow::Result<()> {
        let arguments = self.arguments;
        let names = |list: &[Budget]| list.iter().map(|budget| budget.labels.clone()).collect::<Vec<_>>().join(",");
        let numbers = |list: &[f64]| list.iter().map(f64::to_string).collect::<Vec<_>>().join(",");
        let given = |list: &[f64]| (!list.is_empty()).then(|| numbers(list));
        let minutes = plan.minutes.map_or("none".into(), |minutes| minutes.to_string());
        let compared = [
            ("--labels", (!self.budgets.is_empty()).then(|| names(&self.budgets)), names(&plan.budgets)),
            ("--lr", given(&self.rates), numbers(&plan.rates)),
            ("--seeds", arguments.seeds.map(|seeds| seeds.to_string()), plan.seeds.to_string()),
            ("--steps", arguments.steps.map(|steps| steps.to_string()), plan.steps.to_string()),
            ("--minutes", arguments.minutes.map(|minutes| minutes.to_string()), minutes),
            ("--validation", arguments.validation.map(|part| part.to_string()), plan.validation.to_string()),
        ];
        for (flag, asked, planned) in compared {
            if let Some(asked) = asked.filter(|asked| *asked != planned) {
                return Err(refused(&format!("{flag} {asked} where the table has {planned}"), out));
            }
        }
        if arguments.no_scratch && plan.arms.iter().any(|arm| arm.init == SCRATCH) {
            return Err(refused("--no-scratch where the table has an arm from scratch", out));
        }
        if !self.arms.is_empty() {
            self.check_arms(plan, out)?;
        }
        Ok(())
    }

    /// The same weights may lie in another place now.
    fn check_arms(&self, plan: &Plan, out: &Path) -> anyhow::Result<()> {
        let list = |arms: &[Arm]| arms.iter().map(|arm| arm.init.clone()).collect::<Vec<_>>().join(", ");
        if self.arms.len() != plan.arms.len() {
            let text = format!("--init for the arms {} where the table has {}", list(&self.arms), list(&plan.arms));
            return Err(refused(&text, out));
        }
        for (asked, planned) in self.arms.iter().zip(&plan.arms) {
            if asked.weights != planned.weights {
                return Err(other_weights(&asked.init, asked.weights, planned, out));
            }
        }
        Ok(())
    }

    /// Where the weights of the plan's arms lie now.
    pub fn inits(&self, plan: &Plan) -> Vec<String> {
        let arms = if self.arms.is_empty() { &plan.arms } else { &self.arms };
        arms.iter().map(|arm| arm.init.clone()).collect()
    }
}

impl Plan {
    /// The plan in the folder `out`, if there is one.
    ///
    /// # Errors
    /// Input: a file that is none.
    pub fn read(out: &Path) -> anyhow::Result<Option<Self>> {
        let path = out.join(FILE);
        let wrong = |error: &dyn std::fmt::Display| {
            Problem::input(format!(
                "{}: expected the plan of a table: {error}; restore it, or give another --out",
                path.display()
            ))
        };
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| wrong(&error))?,
        };
        let plan: Self = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
        let names = plan.arms.iter().map(|arm| &arm.name).chain(plan.budgets.iter().map(|budget| &budget.folder));
        let sound = plan.format == FORMAT
            && !plan.arms.is_empty()
            && !plan.rates.is_empty()
            && names.into_iter().all(|name| *name == plain(name))
            && plan.budgets.iter().all(|budget| budget.labels.parse::<LabelBudget>().is_ok());
        if sound { Ok(Some(plan)) } else { Err(wrong(&format!("what it has is none of `{FORMAT}`"))) }
    }

    /// Writes it into the folder `out`.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write(&self, out: &Path) -> anyhow::Result<()> {
        let text = format!("{:#}\n", serde_json::to_value(self)?);
        Ok(durable::write_file(&out.join(FILE), text.as_bytes())?)
    }

    /// The learning rates that are tried for each row: none where there is one only.
    pub fn searched(&self) -> &[f64] {
        if self.rates.len() > 1 { &self.rates } else { &[] }
    }

    /// Whether the weights at `inits` are those that the arms began with.
    ///
    /// # Errors
    /// Usage: others. Input: none.
    pub fn check_weights(&self, inits: &[String], out: &Path) -> anyhow::Result<()> {
        for (arm, init) in self.arms.iter().zip(inits) {
            let now = weights(init)?;
            if now != arm.weights {
                return Err(other_weights(init, now, arm, out));
            }
        }
        Ok(())
    }

    /// Whether the configuration and the data are those that the table began with. Gives notes of what changed, and may.
    ///
    /// # Errors
    /// Usage and input: what may not change.
    pub fn check_unchanged(&self, resolved: &Resolved, data: &Value) -> anyhow::Result<Vec<String>> {
        let changes = resolved.check_continues(&self.config)?;
        data::check_unchanged(&self.data, data)?;
        // That the data are the same was just seen, that the weights are, is seen where they are used.
        let moved = changes.moved.iter().map(|change| format!("{}: the same, in another place", change.text));
        Ok(changes.allowed.iter().cloned().chain(moved).collect())
    }
}

fn refused(text: &str, out: &Path) -> anyhow::Error {
    Problem::usage(format!(
        "{text}: {} goes on with the plan it began with; leave this out, or give another --out",
        out.display()
    ))
}

fn other_weights(init: &str, now: Option<Fingerprint>, arm: &Arm, out: &Path) -> anyhow::Error {
    let say = |weights: Option<Fingerprint>| match weights {
        Some(Fingerprint { bytes, crc32 }) => format!("{bytes} bytes of CRC-32 {crc32:08x}"),
        None => "random".into(),
    };
    let text = format!(
        "--init {init} has other weights ({}) than the arm {} began with ({})",
        say(now),
        arm.name,
        say(arm.weights)
    );
    refused(&text, out)
}

/// What tells the weights of `--init` from others.
fn weights(init: &str) -> anyhow::Result<Option<Fingerprint>> {
    if init == SCRATCH { Ok(None) } else { Ok(Some(fingerprint(Path::new(init))?)) }
}

/// The arms that were asked for.
fn arms(arguments: &Fewlabel) -> anyhow::Result<Vec<Arm>> {
    let scratch = (!arguments.no_scratch).then(|| SCRATCH.to_string());
    let inits = scratch.into_iter().chain(arguments.init.iter().filter(|init| *init != SCRATCH).cloned());
    let mut arms: Vec<Arm> = Vec::new();
    for init in inits {
        let weights = weights(&init)?;
        if let Some(same) = arms.iter().find(|arm| arm.weights == weights) {
            return Err(Problem::usage(format!(
                "--init {init} and --init {} are the same weights: give one of them",
                same.init
            )));
        }
        let name = unused(&name_of(&init), arms.iter().map(|arm| &arm.name));
        arms.push(Arm { name, init, weights });
    }
    Ok(arms)
}

/// What a row is called: `runs/pre` is `pre`.
fn name_of(init: &str) -> String {
    if init == SCRATCH {
        return init.into();
    }
    // A folder may be given as `.`, or through a link.
    let path = Path::new(init).canonicalize().unwrap_or_else(|_| PathBuf::from(init));
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    plain(&name.unwrap_or_default().to_string_lossy())
}

/// A name for a folder and for a table's cell, of letters, digits and `.-_%@`.
fn plain(name: &str) -> String {
    let kept = |c: char| if c.is_alphanumeric() || ".-_%@".contains(c) { c } else { '-' };
    let name: String = name.chars().map(kept).take(60).collect();
    if name.trim_start_matches('.').is_empty() { "unnamed".into() } else { name }
}

/// The name, or the name with a number, that no other has.
fn unused<'a>(name: &str, others: impl Iterator<Item = &'a String> + Clone) -> String {
    let numbered = std::iter::once(name.to_string()).chain((2..).map(|number| format!("{name}-{number}")));
    let mut free = numbered.filter(|name| others.clone().all(|other| other != name));
    free.next().expect("one of endlessly many names is free")
}

/// The budgets `labels`, each of which leaves an image of each class.
fn budgets(labels: &[String], train: &dyn Dataset) -> anyhow::Result<Vec<Budget>> {
    let mut sizes = vec![0usize; train.classes().len()];
    (0..train.len()).filter_map(|index| train.label(index)).for_each(|label| sizes[label as usize] += 1);
    let smallest = (0..sizes.len()).min_by_key(|&class| sizes[class]).unwrap_or(0);
    let mut budgets: Vec<Budget> = Vec::new();
    for text in labels {
        if budgets.iter().any(|budget| budget.labels == *text) {
            return Err(Problem::usage(format!("--labels has {text} twice: leave one out")));
        }
        let budget: LabelBudget = text.parse()?;
        if let LabelBudget::Percent { percent, .. } = budget
            && percent * (sizes[smallest] as f64) < 100.0
        {
            return Err(Problem::usage(format!(
                "--labels {text}: less than one image of class {}, which has {}; give {:.3}% or more, or a number of \
                 images per class",
                train.classes()[smallest],
                sizes[smallest],
                (1e5 / sizes[smallest] as f64).ceil() / 1e3
            )));
        }
        let images = budget.select(train, &PhiloxDraws::seeded)?.len();
        let name = match &budget {
            LabelBudget::Named(path) => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            _ => text.clone(),
        };
        let folder = unused(&plain(&name), budgets.iter().map(|budget| &budget.folder));
        budgets.push(Budget { labels: text.clone(), folder, images });
    }
    Ok(budgets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_folders() {
        for (init, name) in [
            ("scratch", "scratch"),
            ("runs/pre", "pre"),
            ("my runs/a b.safetensors", "a-b"),
            ("..", "unnamed"),
            ("/", "unnamed"),
        ] {
            let found = if init == ".." { plain("..") } else { name_of(init) };
            assert_eq!(found, name, "{init}");
        }
        let taken = ["pre".to_string(), "pre-2".to_string()];
        assert_eq!(unused("pre", taken.iter()), "pre-3");
        assert_eq!(unused("new", taken.iter()), "new");
    }

    #[test]
    fn shares_are_drawn_by_the_runs_seed() {
        let of = |labels: &str| Budget { labels: labels.into(), folder: String::new(), images: 0 }.of_seed(3);
        assert_eq!(
            ["5%", "5%@7", "40", "all", "lists/some.txt"].map(of),
            ["5%@3", "5%@7", "40@3", "all", "lists/some.txt"]
        );
    }
}
