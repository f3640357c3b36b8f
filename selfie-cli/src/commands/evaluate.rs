//! `evaluate`: how well a finetuned run classifies.

use std::fmt::Write as _;
use std::path::Path;

use selfie_kernels::{Backend, Element};
use selfie_model::{Build, Classification, Classifier, Images, Purpose, classify, find_weights, load_weights};
use serde_json::{Value, json};

use super::begin::where_they_were;
use super::next::{self, Labelled};
use crate::args::Evaluate;
use crate::config::{Request, Resolved, Task};
use crate::data;
use crate::device::{self, Work};
use crate::exit::{Exit, Problem};
use crate::memory::{self, Beside, Need};
use crate::progress::{Reporter, Voice};
use crate::screen;

/// Confusion matrices of more classes are not printed whole.
const MATRIX_UP_TO: usize = 20;

/// The largest that `data.image_size` takes.
const MAX_IMAGE_SIZE: u64 = 4096;

/// Runs the command.
///
/// # Errors
/// Usage, input, and what the system refuses.
pub fn run(arguments: &Evaluate) -> anyhow::Result<Exit> {
    let run = &arguments.run;
    let Weights { classes, image_size } = Weights::of_run(run)?;
    let typed = &arguments.flags.request;
    let request = Request {
        files: typed.files.clone(),
        set: typed.set.clone(),
        flags: typed.flags.clone(),
        environment: typed.environment.clone(),
        run: Some(run.clone()),
    };
    let resolved = Resolved::new(Task::Evaluate, &request)?;
    let settings = resolved.settings();
    let chosen = device::choose(&settings.run)?;
    let images = data::for_evaluation(&settings.data, run, &classes).map_err(|error| where_they_were(error, &resolved));
    let (images, notes) = images?;
    // The run's own geometry, whatever the data would suggest.
    let model = settings.network(image_size.unwrap_or(settings.data.image_size))?;
    let reporter = Reporter::new(Voice::Full);
    notes.into_iter().for_each(|note| reporter.warn(note));
    if !arguments.json {
        reporter.say(format!("data      {}, {} used", images.dataset.describe(), images.items.len()));
        chosen.notes.iter().for_each(|note| reporter.say(note));
    }
    let batch = settings.train.batch.min(images.items.len());
    let build = Build { config: &model, batch, purpose: Purpose::Evaluate, seed: 0 };
    let workers = settings.data.workers;
    let found = chosen.run(Measurement {
        build,
        classes: classes.len(),
        run,
        images: &images,
        workers,
        reporter: &reporter,
    })?;
    for file in &found.skipped {
        reporter.warn(format!("skipped {}: {}", file.key, file.reason));
    }
    let text = if arguments.json { format!("{:#}\n", as_json(&found, &classes)) } else { as_text(&found, &classes) };
    screen::print(&text)?;
    Ok(Exit::Done)
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

/// Right ones and all of a class.
fn of_class(found: &Classification, class: usize) -> (u64, u64) {
    (found.confusion[class][class], found.confusion[class].iter().sum())
}

fn as_json(found: &Classification, classes: &[String]) -> Value {
    let per_class = classes.iter().enumerate().map(|(class, name)| {
        let (right, all) = of_class(found, class);
        json!({ "class": name, "n": all, "accuracy": (all > 0).then(|| right as f64 / all as f64) })
    });
    json!({
        "top1": found.top1,
        "top5": found.top5,
        "n": found.n,
        "loss": found.loss,
        "per_class": per_class.collect::<Vec<_>>(),
        "confusion": found.confusion,
    })
}

fn as_text(found: &Classification, classes: &[String]) -> String {
    const INFALLIBLE: &str = "writing to a string cannot fail";
    let mut text = format!(
        "top-1 {:.2}%  top-5 {:.2}%  loss {:.4}  n = {}\n\n",
        100.0 * found.top1,
        100.0 * found.top5,
        found.loss,
        found.n
    );
    let width = classes.iter().map(|name| name.chars().count()).max().unwrap_or(0).min(24);
    let name = |class: usize| -> String { classes[class].chars().take(width).collect() };
    if classes.len() <= MATRIX_UP_TO {
        let cell = found.confusion.iter().flatten().map(|count| count.to_string().len()).max().unwrap_or(1).max(3) + 1;
        writeln!(text, "rows: the class; columns: what was predicted, in the same order").expect(INFALLIBLE);
        for class in 0..classes.len() {
            write!(text, "{:<width$} ", name(class)).expect(INFALLIBLE);
            for count in &found.confusion[class] {
                write!(text, "{count:>cell$}").expect(INFALLIBLE);
            }
            let (right, all) = of_class(found, class);
            let share = if all > 0 { format!("{:>7.1}%", 100.0 * right as f64 / all as f64) } else { "      -".into() };
            writeln!(text, " {share}").expect(INFALLIBLE);
        }
        return text;
    }
    writeln!(text, "{:<width$} {:>9} {:>7}", "class", "accuracy", "n").expect(INFALLIBLE);
    for class in 0..classes.len() {
        let (right, all) = of_class(found, class);
        let share = if all > 0 { format!("{:.1}%", 100.0 * right as f64 / all as f64) } else { "-".into() };
        writeln!(text, "{:<width$} {share:>9} {all:>7}", name(class)).expect(INFALLIBLE);
    }
    let mut confused: Vec<_> = (0..classes.len())
        .flat_map(|class| (0..classes.len()).map(move |other| (class, other)))
        .filter(|&(class, other)| class != other && found.confusion[class][other] > 0)
        .collect();
    confused.sort_by_key(|&(class, other)| std::cmp::Reverse(found.confusion[class][other]));
    writeln!(text, "\nmost often confused").expect(INFALLIBLE);
    for &(class, other) in confused.iter().take(10) {
        writeln!(text, "  {} taken for {}: {}", name(class), name(other), found.confusion[class][other])
            .expect(INFALLIBLE);
    }
    text
}
