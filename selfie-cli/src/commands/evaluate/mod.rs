//! `evaluate`: how well finetuned runs classify.

mod matrix;
mod report;

use std::path::{Path, PathBuf};

use selfie_kernels::{Backend, Element};
use selfie_model::{Build, Classification, Classifier, Images, Purpose, classify, find_weights, load_weights};
use serde_json::Value;

use self::matrix::Matrix;
use super::begin::where_they_were;
use super::next::{self, Labelled};
use crate::args::Evaluate;
use crate::config::{Request, Resolved, Task};
use crate::data;
use crate::destination::Existing;
use crate::device::{self, Work};
use crate::exit::{Exit, Problem};
use crate::memory::{self, Beside, Need};
use crate::progress::{Reporter, Voice};
use crate::screen;

/// The largest that `data.image_size` takes.
const MAX_IMAGE_SIZE: u64 = 4096;

/// A run, measured.
struct Measured {
    run: PathBuf,
    classes: Vec<String>,
    found: Classification,
}

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Evaluate) -> anyhow::Result<Exit> {
    let Evaluate { runs, matrix, overwrite, json, flags } = arguments;
    let matrix = matrix.as_deref().map(|path| Matrix::new(path, Existing::new(*overwrite))).transpose()?;
    let weights = runs.iter().map(|run| Weights::of_run(run)).collect::<anyhow::Result<Vec<_>>>()?;
    let others = weights.iter().position(|other| other.classes != weights[0].classes);
    if let (Some(_), Some(other)) = (&matrix, others) {
        return Err(Problem::usage(format!(
            "--matrix: {} and {} have other classes, so that there is no matrix of both; give it for one of them",
            runs[0].display(),
            runs[other].display()
        )));
    }
    let reporter = Reporter::new(Voice::Full);
    let mut all = Vec::new();
    for (run, weights) in runs.iter().zip(weights) {
        let classes = weights.classes.clone();
        let found = measure(run, weights, &flags.request, &reporter, *json || !all.is_empty())?;
        all.push(Measured { run: run.clone(), classes, found });
    }
    let text = match (*json, &all[..]) {
        (true, [one]) => format!("{:#}\n", report::as_json(one)),
        (true, all) => format!("{:#}\n", report::all_as_json(all)),
        (false, [one]) => report::as_text(one),
        (false, all) => report::all_as_text(all),
    };
    if let Some(matrix) = matrix {
        let confusion = report::added(&all);
        matrix.write(&all[0].classes, &confusion)?;
        reporter.say(format!("wrote     {}", matrix.path().display()));
    }
    screen::print(&text)?;
    Ok(Exit::Done)
}

/// Measures a run. What it does is said where the person does not know it yet.
fn measure(
    run: &Path,
    weights: Weights,
    typed: &Request,
    reporter: &Reporter,
    is_known: bool,
) -> anyhow::Result<Classification> {
    let Weights { classes, image_size } = weights;
    let request = Request { run: Some(run.into()), ..typed.clone() };
    let resolved = Resolved::new(Task::Evaluate, &request)?;
    let settings = resolved.settings();
    let chosen = device::choose(&settings.run)?;
    let images = data::for_evaluation(&settings.data, run, &classes).map_err(|error| where_they_were(error, &resolved));
    let (images, notes) = images?;
    // The run's own geometry, whatever the data would suggest.
    let model = settings.network(image_size.unwrap_or(settings.data.image_size))?;
    notes.into_iter().for_each(|note| reporter.warn(note));
    if !is_known {
        reporter.say(format!("data      {}, {} used", images.dataset.describe(), images.items.len()));
        chosen.notes().for_each(|note| reporter.say(note));
    }
    let batch = settings.train.batch.min(images.items.len());
    let build = Build { config: &model, batch, purpose: Purpose::Evaluate, seed: 0 };
    let workers = settings.data.workers;
    let found = chosen.run(Measurement { build, classes: classes.len(), run, images: &images, workers, reporter })?;
    for file in &found.skipped {
        reporter.warn(format!("skipped {}: {}", file.key, file.reason));
    }
    Ok(found)
}

/// The measurement, on whatever device was chosen.
struct Measurement<'a> {
    build: Build<'a>,
    classes: usize,
    run: &'a Path,
    images: &'a Images,
    workers: usize,
    reporter: &'a Reporter,
}

impl Work for Measurement<'_> {
    type Output = Classification;
    fn run<B: Backend<T>, T: Element>(self, device: B) -> anyhow::Result<Classification> {
        let Self { build, classes, run, images, workers, reporter } = self;
        let plan = Classifier::<B, T>::memory_plan(build, classes)?.with_workspace(&device);
        let (image_size, beside) = (build.config.image_size, Beside::Evaluation { workers });
        memory::check(&Need { plan: &plan, batch: build.batch, image_size, beside }, &device, reporter)?;
        let mut network = Classifier::<B, T>::new(device, build, classes)?;
        for name in load_weights(&mut network, run)?.unused {
            reporter.warn(format!("the weights of {} have `{name}`, which is not used", run.display()));
        }
        Ok(classify(&mut network, images, |_, _| ())?)
    }
}

/// What `config.json` beside the weights says of a classifier.
#[derive(Debug)]
pub(crate) struct Weights {
    /// Names of the classes.
    pub(crate) classes: Vec<String>,
    /// Side of the images.
    pub(crate) image_size: Option<usize>,
}

impl Weights {
    /// Those of any run.
    pub(super) fn of_any_run(run: &Path) -> anyhow::Result<Self> {
        if !run.join("config.toml").is_file() {
            return Err(Problem::input(format!(
                "{}: expected the folder of a run, with config.toml and weights/, found none; `selfie pretrain` or \
                 `selfie finetune` makes one",
                run.display()
            )));
        }
        let path = find_weights(run)?.with_file_name("config.json");
        let text = std::fs::read(&path).map_err(|error| wrong(&path, error))?;
        Self::parse(&path, &text)
    }

    /// Those of a finetuned run.
    pub(super) fn of_run(run: &Path) -> anyhow::Result<Self> {
        let weights = Self::of_any_run(run)?;
        if weights.classes.is_empty() {
            return Err(Problem::input(format!(
                "{} has no classes: it is a pretraining run; finetune from it first: \
                 {}",
                run.display(),
                next::finetune(run, &Labelled::of_run(run))
            )));
        }
        Ok(weights)
    }

    /// From the contents of `path`.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> anyhow::Result<Self> {
        let config: Value = serde_json::from_slice(text).map_err(|error| wrong(path, error))?;
        let names = config["label_names"].as_array().map(Vec::as_slice).unwrap_or_default();
        let classes = names.iter().filter_map(|name| Some(name.as_str()?.to_string())).collect();
        let image_size = match config.pointer("/pretrained_cfg/input_size/1") {
            None => None,
            Some(size) => {
                let possible = size.as_u64().filter(|size| (1..=MAX_IMAGE_SIZE).contains(size));
                let size = possible.ok_or_else(|| {
                    wrong(path, format!("input_size of {size}, which is not 1 to {MAX_IMAGE_SIZE} pixels"))
                })?;
                Some(size as usize)
            }
        };
        Ok(Self { classes, image_size })
    }
}

fn wrong(path: &Path, found: impl std::fmt::Display) -> anyhow::Error {
    Problem::input(format!("{}: expected the description of the weights: {found}", path.display()))
}
