//! Downsampled ImageNet (Chrabaszcz, Loshchilov, Hutter 2017, <https://arxiv.org/abs/1707.08819>):
//! `train_data_batch_1` .. `train_data_batch_10` and `val_data`, as pickles or .npz, of 8, 16, 32 or
//! 64 pixels.
//!
//! A file is a dict of `data`, u8 [n, 3 * side * side], planes R, G, B, and `labels`, from 1 to
//! 1000. Its `mean` is not subtracted: normalisation is the business of whoever trains, and must
//! be the same for all data. The images are whole in memory, at 32 x 32 the 1,281,167 of training take
//! 3.9 GB; while a file is read, its pickle (400 MB) lies beside them, an .npz is unpacked as it
//! goes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::dataset::Split;
use crate::error::{Error, Result, reading};
use crate::npz::Npz;
use crate::records::{Batch, Layout, Records};

const LAYOUT: Layout = Layout { labels: "labels", first_label: 1, classes: 1000, sides: &[8, 16, 32, 64] };

/// Lines such as `n02119789 1 kit_fox`.
const NAMES: &str = "map_clsloc.txt";

/// The files of a folder, and of folders in it that are called `Imagenet32_train` and the like.
pub(crate) struct Found {
    root: PathBuf,
    /// `train_data_batch_1`, `_2`, ...
    train: Vec<PathBuf>,
    val: Option<PathBuf>,
    names: Option<PathBuf>,
}

/// The data in a folder, if there are any.
///
/// # Errors
/// [`Error::Malformed`] when they are there twice, or a batch is missing between others.
pub(crate) fn in_folder(root: &Path) -> Result<Option<Found>> {
    let mut folders = vec![root.to_path_buf()];
    for entry in fs::read_dir(root).map_err(reading(root))? {
        let entry = entry.map_err(reading(root))?;
        let name = entry.file_name().to_string_lossy().to_lowercase();
        if name.starts_with("imagenet") && entry.path().is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort();
    let train = one(root, &folders, "train_data_batch_1")?;
    let val = one(root, &folders, "val_data")?;
    let mut batches = Vec::new();
    let mut missing = None;
    if let Some(first) = train.as_deref().and_then(Path::parent) {
        // There are 10; one more is looked for than anyone has.
        for number in 1..=11 {
            match (file(first, &format!("train_data_batch_{number}")), missing) {
                (Some(path), None) => batches.push(path),
                (Some(path), Some(gap)) => {
                    return Err(Error::malformed(
                        first,
                        format!("train_data_batch_{gap} before {}", path.display()),
                        "none",
                        "download the missing batch",
                    ));
                }
                (None, gap) => missing = gap.or(Some(number)),
            }
        }
    }
    if batches.is_empty() && val.is_none() {
        return Ok(None);
    }
    let names = folders.iter().map(|folder| folder.join(NAMES)).find(|path| path.is_file());
    Ok(Some(Found { root: root.into(), train: batches, val, names }))
}

/// The pickle or .npz `name` in a folder; the pickle where there are both.
fn file(folder: &Path, name: &str) -> Option<PathBuf> {
    [name.to_string(), format!("{name}.npz")].map(|name| folder.join(name)).into_iter().find(|path| path.is_file())
}

/// The file `name` in any of the folders, of which only one may have it.
fn one(root: &Path, folders: &[PathBuf], name: &str) -> Result<Option<PathBuf>> {
    let mut found = folders.iter().filter_map(|folder| file(folder, name));
    match (found.next(), found.next()) {
        (Some(first), Some(second)) => Err(Error::malformed(
            root,
            format!("one {name}"),
            format!("{} and {}", first.display(), second.display()),
            "give the folder of one size",
        )),
        (found, _) => Ok(found),
    }
}

impl Found {
    pub(crate) fn open(self, split: Split) -> Result<Records> {
        let files = match split {
            Split::Train => self.train,
            Split::Test => self.val.into_iter().collect(),
        };
        if files.is_empty() {
            return Err(match split {
                Split::Test => Error::NoTestPart { path: self.root, found: "no val_data".into() },
                Split::Train => Error::malformed(
                    self.root,
                    "train_data_batch_1 beside val_data",
                    "none",
                    "give the folder that holds both, or both Imagenet32_train and Imagenet32_val",
                ),
            });
        }
        let mut batches: Vec<Batch> = Vec::new();
        for path in &files {
            let batch = read(path)?;
            if let Some(first) = batches.first().filter(|first| first.side() != batch.side()) {
                let (ours, theirs) = (first.side(), batch.side());
                return Err(Error::malformed(
                    path,
                    format!("images of {ours} x {ours} as in {}", first.name()),
                    format!("{theirs} x {theirs}"),
                    "keep sizes in folders of their own",
                ));
            }
            batches.push(batch);
        }
        let classes = match &self.names {
            Some(path) => class_names(path)?,
            None => (1..=LAYOUT.classes).map(|class| class.to_string()).collect(),
        };
        let side = batches[0].side();
        let plural = if batches.len() == 1 { "" } else { "es" };
        let name = format!("ImageNet {side} x {side}, {} batch{plural}", batches.len());
        Ok(Records::new(name, split, self.root, classes, batches))
    }
}

fn read(path: &Path) -> Result<Batch> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    if path.extension().is_none() {
        let bytes = fs::read(path).map_err(reading(path))?;
        return Batch::from_pickle(path, &name, &bytes, &LAYOUT);
    }
    let file = File::open(path).map_err(reading(path))?;
    from_npz(file, &name).map_err(|found| {
        let expected = "an .npz of `data` (u8, [n, 3 * side * side]) and `labels` (n numbers from 1 to 1000)";
        Error::malformed(path, expected, found, "take the data as they were published")
    })
}

pub(crate) fn from_npz(file: File, name: &str) -> std::result::Result<Batch, String> {
    let mut npz = Npz::open(file)?;
    let labels = npz.array(LAYOUT.labels)?.integers()?;
    let mut data = npz.array("data")?;
    let [rows, row_bytes] = data.shape[..] else { return Err(format!("`data` of the shape {:?}", data.shape)) };
    if !data.is_bytes() {
        return Err("`data` that are no bytes".into());
    }
    if rows != labels.len() || rows == 0 {
        return Err(format!("{rows} images and {} labels", labels.len()));
    }
    let side = LAYOUT.side(row_bytes).map_err(|expected| format!("{row_bytes} bytes each, not {expected}"))?;
    let mut batch = Batch::new(name, side);
    batch.reserve(rows);
    let mut planes = vec![0; row_bytes];
    for (record, label) in labels.into_iter().enumerate() {
        let class = LAYOUT.class(label).ok_or_else(|| format!("the label {label} in record {record}"))?;
        data.fill(&mut planes)?;
        batch.push(class, &planes);
    }
    data.finish()?;
    Ok(batch)
}

/// Names of the classes: number and words, as words alone are not unique (there are two cranes).
fn class_names(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).map_err(reading(path))?;
    let mut names = vec![String::new(); LAYOUT.classes];
    let wrong = |found: String| {
        Error::malformed(
            path,
            "a line `n02119789 1 kit_fox` for each class from 1 to 1000",
            found,
            "take the file that comes with the data, or remove it",
        )
    };
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let mut words = text.split_whitespace();
        let parts = (words.next(), words.next().and_then(|id| id.parse().ok()), words.next());
        let (Some(synset), Some(class), Some(word)) = (parts.0, parts.1.and_then(|id| LAYOUT.class(id)), parts.2)
        else {
            return Err(wrong(format!("`{text}` on line {line}")));
        };
        let name = &mut names[usize::from(class)];
        if !name.is_empty() {
            return Err(wrong(format!("class {} again on line {line}", class + 1)));
        }
        *name = format!("{synset} {word}");
    }
    match names.iter().position(String::is_empty) {
        Some(class) => Err(wrong(format!("none for {}", class + 1))),
        None => Ok(names),
    }
}
