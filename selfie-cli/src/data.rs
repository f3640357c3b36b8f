//! From `--data` to the images that are trained on and those that are held out.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use selfie_data::{
    Dataset, Error, Geometry, LabelBudget, Matched, Need, Split, match_classes, sample_indices, split_validation,
};
use selfie_model::{Images, PhiloxDraws};
use serde_json::{Value, json};

use crate::config::Data;
use crate::exit::Problem;

/// Side of the images of folders, unless asked otherwise: ImageNet's.
const FOLDER_SIZE: usize = 224;

/// Seed of the choices that must not differ between runs to be compared: held-out part, limit.
const FIXED_SEED: u64 = 0;

/// The images of a run.
pub struct Parts {
    /// To train on.
    pub train: Images,
    /// To measure by on the way: the test part or a held-out part (pretraining), a validation part (finetuning).
    pub held_out: Option<Images>,
    /// The test part, if the data have one.
    pub test: Option<Images>,
    /// Side of the images.
    pub image_size: usize,
    /// What was chosen, in a line each.
    pub notes: Vec<String>,
}

/// The images of a pretraining run.
///
/// # Errors
/// Those of the data; usage: nothing is left to train on.
pub fn for_pretraining(data: &Data) -> anyhow::Result<Parts> {
    let train = open(data, Split::Train, Need::Images)?;
    let test = open_test(data, &*train, Need::Images)?;
    let mut notes = vec![format!("data      {}", train.describe())];
    let all: Vec<usize> = (0..train.len()).collect();
    let (items, held_out) = match &test {
        Some(test) => {
            let held_out = limited((0..test.len()).collect(), data.limit);
            notes.push(format!("held out  {} images of the test part", held_out.len()));
            (all, Some(images(data, test.clone(), held_out)))
        }
        None => {
            let count = (data.holdout * train.len() as f64).round() as usize;
            let held_out = sample_indices(train.len(), count, &*PhiloxDraws::seeded(FIXED_SEED));
            let rest = all.into_iter().filter(|index| held_out.binary_search(index).is_err()).collect();
            if held_out.is_empty() {
                notes.push("held out  none: the data have no test part and data.holdout leaves no image".into());
                (rest, None)
            } else {
                notes.push(format!("held out  {} training images, as the data have no test part", held_out.len()));
                (rest, Some(images(data, train.clone(), held_out)))
            }
        }
    };
    let items = limited(items, data.limit);
    if items.is_empty() {
        return Err(Problem::usage("no image is left to train on: lower --holdout, or give more images"));
    }
    notes.push(format!("training  {} images", items.len()));
    let image_size = image_size(data, &*train);
    Ok(Parts { image_size, train: images(data, train, items), test: None, held_out, notes })
}

/// The images of a finetuning run.
///
/// # Errors
/// Those of the data and of the label budget.
pub fn for_finetuning(data: &Data) -> anyhow::Result<Parts> {
    // A wrong one is said before the data are read.
    data.labels.parse::<LabelBudget>()?;
    Labelled::open(data)?.parts(data, Test::Once)
}

/// Images with labels, opened: one or many finetuning runs take their parts of them.
pub struct Labelled {
    /// To train on, for those that may use their labels.
    pub train: Arc<dyn Dataset>,
    /// The test part, if there is one.
    pub test: Option<Matched>,
}

/// What a finetuning run does with the test part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// It measures there, at the end.
    Once,
    /// Nothing: it serves to choose something, and the test part must not.
    Never,
}

impl Labelled {
    /// Opens what `data` names.
    ///
    /// # Errors
    /// Those of the data; input: fewer than two classes.
    pub fn open(data: &Data) -> anyhow::Result<Self> {
        let train = open(data, Split::Train, Need::Labels)?;
        let test = match open_test(data, &*train, Need::Scoring)? {
            Some(test) => Some(match_classes(test, train.classes(), "the training images")?),
            None => None,
        };
        if train.classes().len() < 2 {
            return Err(Problem::input(format!(
                "{}: expected at least 2 classes, found {}; put the images of each class into a folder of its own",
                train.describe(),
                train.classes().len()
            )));
        }
        Ok(Self { train, test })
    }

    /// What a run with the label budget and the validation part of `data` trains on, and is measured by.
    ///
    /// # Errors
    /// Those of the label budget.
    pub fn parts(&self, data: &Data, use_of_test: Test) -> anyhow::Result<Parts> {
        let budget: LabelBudget = data.labels.parse()?;
        let train = &self.train;
        let mut notes = vec![format!("data      {}", train.describe())];
        let seeded = &PhiloxDraws::seeded;
        let labelled = limited(budget.select(&**train, seeded)?, data.limit);
        let share = 100.0 * labelled.len() as f64 / train.len() as f64;
        notes.push(format!("labels    {} of {} images ({share:.1}%), {budget}", labelled.len(), train.len()));
        let draws = PhiloxDraws::seeded(FIXED_SEED);
        let (items, validation) = split_validation(&**train, &labelled, data.validation, &*draws)?;
        let held_out = (!validation.is_empty()).then(|| images(data, train.clone(), validation));
        if let Some(held_out) = &held_out {
            notes.push(format!("held out  {} of these for validation", held_out.items.len()));
        }
        let (test, note) = match (&self.test, use_of_test) {
            (Some(test), Test::Once) => {
                let without = test.missing_text().map(|missing| format!("; {missing}")).unwrap_or_default();
                let items = limited((0..test.dataset.len()).collect(), data.limit);
                let note = format!("test      {} images, touched once, at the end{without}", items.len());
                (Some(images(data, test.dataset.clone(), items)), note)
            }
            (Some(_), Test::Never) => (None, "test      not touched: this run serves to choose a setting".into()),
            (None, _) => {
                let note =
                    "test      none: the data have no test part (val/ or test/), so no test accuracy is measured";
                (None, note.into())
            }
        };
        notes.push(note);
        Ok(Parts {
            image_size: image_size(data, &**train),
            train: images(data, train.clone(), items),
            held_out,
            test,
            notes,
        })
    }
}

/// The images that `evaluate` measures, with their labels among `classes`, those of the run `run`: the test part, or all
/// where there is none; and what is to be said of them.
///
/// # Errors
/// Those of the data; input: a class that the run does not have.
pub fn for_evaluation(data: &Data, run: &Path, classes: &[String]) -> anyhow::Result<(Images, Vec<String>)> {
    let mut notes = Vec::new();
    let dataset = match found(open(data, Split::Test, Need::Scoring))? {
        Some(test) => test,
        None => {
            let all = open(data, Split::Train, Need::Scoring)?;
            notes.push(format!(
                "{} has no test part (val/ or test/): all {} images are used; where the run was trained on them, \
                 this is no test accuracy",
                data.path.display(),
                all.len()
            ));
            all
        }
    };
    let matched = match_classes(dataset, classes, &run.display().to_string())?;
    if let Some(missing) = matched.missing_text() {
        notes.push(format!("the data have {missing}: what is measured says nothing of these"));
    }
    let Matched { dataset, .. } = matched;
    let items = limited((0..dataset.len()).collect(), data.limit);
    Ok((images(data, dataset, items), notes))
}

/// A part of the data, of whatever images it has.
pub struct Part {
    /// Its images.
    pub images: Images,
    /// Of the data set's own labels, places in [`Collected::classes`].
    pub labels: Vec<u32>,
}

/// Images of which no label is needed.
pub struct Collected {
    /// The parts that were asked for.
    pub parts: Vec<Part>,
    /// The classes of all of them.
    pub classes: Vec<String>,
    /// What was chosen, in a line each.
    pub notes: Vec<String>,
}

/// Which images are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// All there are.
    All,
    /// Those to train on, or all where the data have no parts.
    Train,
    /// Those held out.
    Test,
}

/// Images to encode, labelled or not.
///
/// # Errors
/// Those of the data: also a part that they don't have.
pub fn for_embedding(data: &Data, which: Which) -> anyhow::Result<Collected> {
    let mut datasets = Vec::new();
    if which != Which::Test {
        datasets.push(open_with_labels(data, Split::Train)?);
    }
    if which == Which::Test {
        datasets.push(open_with_labels(data, Split::Test)?);
    } else if which == Which::All
        && let Some(test) = found(open_with_labels(data, Split::Test))?
        && !are_same(&*datasets[0], &*test)
    {
        datasets.push(test);
    }
    let (mut parts, mut classes, mut notes) = (Vec::new(), Vec::<String>::new(), Vec::new());
    for dataset in datasets {
        let place = |name: &String| {
            let known = classes.iter().position(|class| class == name);
            known.unwrap_or_else(|| {
                classes.push(name.clone());
                classes.len() - 1
            }) as u32
        };
        let labels = dataset.classes().iter().map(place).collect();
        let items = limited((0..dataset.len()).collect(), data.limit);
        notes.push(format!("data      {}, {} used", dataset.describe(), items.len()));
        parts.push(Part { images: images(data, dataset, items), labels });
    }
    Ok(Collected { parts, classes, notes })
}

/// The images of a part, with labels where there are some for all of them.
fn open_with_labels(data: &Data, split: Split) -> anyhow::Result<Arc<dyn Dataset>> {
    let whole = open(data, split, Need::Images)?;
    if !whole.classes().is_empty() {
        return Ok(whole);
    }
    // ImageNet's val/ has its labels in a file, which is only looked for where they are needed.
    let labelled = open(data, split, Need::Scoring).ok();
    Ok(labelled.filter(|labelled| labelled.len() == whole.len()).unwrap_or(whole))
}

/// The images of a probe: those of finetuning with this budget of labels and this share of them for validation, and a test
/// part, without which there is no probe.
///
/// # Errors
/// Those of [`for_finetuning`]; input: no test part.
pub fn for_probe(data: &Data, labels: &str, validation: f64) -> anyhow::Result<(Parts, Images)> {
    let mut parts = for_finetuning(&Data { labels: labels.into(), validation, ..data.clone() })?;
    let test = parts.test.take().ok_or_else(|| {
        Problem::input(format!(
            "{}: expected a test part (val/ or test/), found none; a probe is measured on images that it has not seen: \
             give data with both parts",
            data.path.display()
        ))
    })?;
    Ok((parts, test))
}

/// Image files, each by its name.
pub fn of_files(files: Vec<PathBuf>, workers: usize) -> Images {
    let items = (0..files.len()).collect();
    Images { dataset: selfie_data::files(files), items, workers, max_bad: 1.0 }
}

/// All images at a path.
pub struct Whole {
    /// To train on.
    pub train: Arc<dyn Dataset>,
    /// The test part, if there is one beside them.
    pub test: Option<Arc<dyn Dataset>>,
}

/// The images that `data check` looks at.
///
/// # Errors
/// Those of the data.
pub fn for_audit(path: &Path) -> anyhow::Result<Whole> {
    let open = |split| selfie_data::open(path, split, Need::Images, &PhiloxDraws::seeded);
    let train = open(Split::Train)?;
    let test = found(open(Split::Test).map_err(anyhow::Error::from))?;
    let test = test.filter(|test| !are_same(&*train, &**test));
    Ok(Whole { train, test })
}

/// Why finetuning refuses the training images `train` at `path`, which are opened already and have classes.
pub fn refusal_of_labels(path: &Path, train: &dyn Dataset) -> Option<String> {
    // What lies whole in memory has a label for every image.
    match train.geometry() {
        Geometry::Fixed { .. } => None,
        Geometry::Variable => {
            let opened = selfie_data::open(path, Split::Train, Need::Labels, &PhiloxDraws::seeded);
            opened.err().map(|error| error.to_string())
        }
    }
}

/// Whether two parts are the same images: a folder that is itself called `val` is its own test part.
fn are_same(train: &dyn Dataset, test: &dyn Dataset) -> bool {
    // Equal names are the same files.
    train.len() == test.len() && (0..train.len()).all(|index| train.key(index) == test.key(index))
}

impl Parts {
    /// `data.json`: enough to see later whether the data are the same.
    pub fn as_json(&self) -> Value {
        let part = |images: &Images| {
            json!({
                "description": images.dataset.describe(),
                "images": images.dataset.len(),
                "used": images.items.len(),
            })
        };
        json!({
            "train": part(&self.train),
            "held_out": self.held_out.as_ref().map(part),
            "test": self.test.as_ref().map(part),
            "classes": self.train.dataset.classes(),
            "image_size": self.image_size,
        })
    }
}

/// Reads `data.json`; none where a run has not come so far.
///
/// # Errors
/// Input: a file that is none.
pub fn read_json(path: &Path) -> anyhow::Result<Option<Value>> {
    let wrong = |error: &dyn std::fmt::Display| {
        let advice = "restore it, or remove it, and the data are not compared with those the run began with";
        Problem::input(format!("{}: expected the description of the data: {error}; {advice}", path.display()))
    };
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| wrong(&error)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(wrong(&error)),
    }
}

/// What `data.json` says that must not change while a run goes on: numbers of images, and classes.
///
/// # Errors
/// Input: they changed.
pub fn check_unchanged(before: &Value, now: &Value) -> anyhow::Result<()> {
    match change(before, now) {
        None => Ok(()),
        Some(change) => Err(Problem::input(format!(
            "the data changed since the run began: {change}; restore the data, or give another --out"
        ))),
    }
}

/// The first difference between two descriptions of data that would make another run, in words.
pub fn change(before: &Value, now: &Value) -> Option<String> {
    let pointers = [
        "/train/images",
        "/train/used",
        "/held_out/images",
        "/held_out/used",
        "/test/images",
        "/classes",
        "/image_size",
    ];
    for pointer in pointers {
        let (before, now) = (before.pointer(pointer), now.pointer(pointer));
        if before != now {
            let say = |value: Option<&Value>| value.map_or("none".into(), Value::to_string);
            let name = pointer.trim_start_matches('/').replace('/', ".");
            return Some(format!("{name} was {}, now it is {}", say(before), say(now)));
        }
    }
    None
}

fn open(data: &Data, split: Split, need: Need) -> anyhow::Result<Arc<dyn Dataset>> {
    if data.path.as_os_str().is_empty() {
        return Err(Problem::usage(
            "--data is missing: give a folder or a tar of images, CIFAR, downsampled ImageNet, WebDataset shards, or `synthetic:`",
        ));
    }
    Ok(selfie_data::open(&data.path, split, need, &PhiloxDraws::seeded)?)
}

/// The test part beside the training images; `None` where they are themselves all that is held out, as in `--data val/`.
fn open_test(data: &Data, train: &dyn Dataset, need: Need) -> anyhow::Result<Option<Arc<dyn Dataset>>> {
    Ok(found(open(data, Split::Test, need))?.filter(|test| !are_same(train, &**test)))
}

/// The test part, if the data have one.
fn found(test: anyhow::Result<Arc<dyn Dataset>>) -> anyhow::Result<Option<Arc<dyn Dataset>>> {
    match test {
        Ok(test) => Ok(Some(test)),
        Err(error) => match error.downcast_ref() {
            Some(Error::NoTestPart { .. }) => Ok(None),
            _ => Err(error),
        },
    }
}

fn images(data: &Data, dataset: Arc<dyn Dataset>, items: Vec<usize>) -> Images {
    Images { dataset, items, workers: data.workers, max_bad: data.max_bad }
}

/// At most `limit` of the items; 0 is no limit.
pub fn limited(items: Vec<usize>, limit: usize) -> Vec<usize> {
    if limit == 0 || limit >= items.len() {
        return items;
    }
    let chosen = sample_indices(items.len(), limit, &*PhiloxDraws::seeded(FIXED_SEED));
    chosen.into_iter().map(|place| items[place]).collect()
}

/// The side of the images that the network sees.
fn image_size(data: &Data, dataset: &dyn Dataset) -> usize {
    match dataset.geometry() {
        _ if data.image_size > 0 => data.image_size,
        Geometry::Fixed { height, width } if height == width => height,
        Geometry::Fixed { .. } | Geometry::Variable => FOLDER_SIZE,
    }
}
