//! What a dataset is, and how one is found at a path.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::audit::Misnamed;
use crate::draws::Seeded;
use crate::error::{Error, Result, reading};
use crate::names;
use crate::picture::Image;
use crate::tree::some;
use crate::{cifar, downsampled, folder, shards, synthetic, tar_index};

/// Which part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The images to train on.
    Train,
    /// The images held out.
    Test,
}

/// What the caller needs of a dataset beside its images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: pretraining. Any folder of images will do, at any depth.
    Images,
    /// A label for every image, to train on: the rules of torchvision's `ImageFolder` hold strictly.
    Labels,
    /// A label for every image, to measure by: a class may be without images.
    Scoring,
}

/// Sizes of the images of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Geometry {
    /// All images are `height` x `width`.
    Fixed {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Images differ, or nobody looked.
    Variable,
}

/// Images with an order that never changes, and perhaps labels.
pub trait Dataset: Send + Sync {
    /// Number of images, at least 1 and less than 2^32.
    fn len(&self) -> usize;

    /// Whether there are none: never, [`open`] refuses such data.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One line for people: kind, split, number of images and classes, where from.
    fn describe(&self) -> String;

    /// Names of the classes in label order; empty when there are none.
    fn classes(&self) -> &[String];

    /// Class of image `index` (less than `classes().len()`), if it has one.
    fn label(&self, index: usize) -> Option<u32>;

    /// Sizes of the images.
    fn geometry(&self) -> Geometry;

    /// Stable name of image `index`: its path relative to the data, with `/`, or
    /// `data_batch_1.bin:123`.
    fn key(&self, index: usize) -> String;

    /// Image `index`. Every error concerns this image alone: the loader skips it and goes on.
    fn read(&self, index: usize) -> Result<Image>;

    /// What is wrong with the name of image `index`, where it is a file whose extension stands for
    /// another format than its content has.
    fn misnamed(&self, _index: usize) -> Option<Misnamed> {
        None
    }

    /// Whether the data as a whole can still be read: asked when an image cannot, as a disk that went away is not a
    /// matter of bad images.
    ///
    /// # Errors
    /// [`Error::Read`] when they cannot.
    fn check_there(&self) -> Result<()> {
        Ok(())
    }

    /// Copies image `index` to `pixels`, [height, width, 3], when the geometry is fixed: the fast
    /// path of datasets in memory.
    fn read_into(&self, index: usize, pixels: &mut [u8]) -> Result<()> {
        let image = self.read(index)?;
        if image.pixels.len() != pixels.len() {
            return Err(Error::BadImage {
                key: self.key(index),
                reason: format!("{} x {} pixels, unlike the others", image.height, image.width),
            });
        }
        pixels.copy_from_slice(&image.pixels);
        Ok(())
    }
}

/// Opens the data at `path`. The kind is recognised by content:
/// - `synthetic:` or `synthetic:train=5000,test=1000,size=32,classes=10,seed=0`: the seeded
///   procedural world, whose source of randomness comes from `seeded`;
/// - CIFAR-10 and CIFAR-100, binary and Python editions: the tar.gz, a tar, or the unpacked folder;
/// - ImageNet of 8, 16, 32 or 64 pixels (Chrabaszcz et al. 2017): the folder of
///   `train_data_batch_1`, ... and `val_data`, pickles or .npz, whole in memory (32 x 32: 3.9 GB);
/// - a folder of images, or a plain tar of one: torchvision's `ImageFolder` rules, with `train/`
///   and `val/` (or `test/`) if they are there, under any of the names that people give them
///   (`Train`, `validation`, `test_set`), and in a folder around them. Without `train/`, all of it is
///   `Train` and there is no `Test`, except that a folder that is itself called `val` or `test` is
///   its own test. A `val/` without class folders, as ImageNet's, is labelled by a file inside it or beside it:
///   `val.txt` (`file class`), `LOC_val_solution.csv` or `imagenet_2012_validation_synset_labels.txt`;
/// - WebDataset: a tar with `.cls` members, a folder of nothing but tars (or folders of such), or a
///   pattern such as `shards/train-{000000..000146}.tar` or `shards/{train,val}/{00..99}.tar`. Shards
///   with `val` (or `test`) in their names, or in that of their folder, are `Test`.
///
/// # Errors
/// [`Error::Usage`] for a wrong `synthetic:` option, [`Error::Read`] and [`Error::Malformed`] for
/// everything that is wrong with the data.
pub fn open(path: &Path, split: Split, need: Need, seeded: Seeded<'_>) -> Result<Arc<dyn Dataset>> {
    if let Some(options) = path.to_str().and_then(|text| text.strip_prefix("synthetic:")) {
        return Ok(Arc::new(synthetic::Synthetic::new(options.parse()?, split, seeded)));
    }
    let about = match (std::fs::metadata(path), path.to_str()) {
        (Ok(about), _) => about,
        (Err(error), pattern) => match pattern.map(shards::expand).transpose()?.flatten() {
            Some(shards) => return Ok(Arc::new(shards::Shards::open(path, shards, split, need)?)),
            None => return Err(missing(path, error)),
        },
    };
    if about.is_dir() {
        if let Some(found) = cifar::in_folder(path) {
            return Ok(Arc::new(cifar::from_folder(&found, split)?));
        }
        if let Some(found) = downsampled::in_folder(path)? {
            return Ok(Arc::new(found.open(split)?));
        }
        if let Some(shards) = shards::in_folder(path)? {
            return Ok(Arc::new(shards::Shards::open(path, shards, split, need)?));
        }
        return Ok(Arc::new(folder::Files::from_folder(path, split, need)?));
    }
    match cifar::Container::of(path)? {
        Some(cifar::Container::TarGz) => Ok(Arc::new(cifar::from_tar_gz(path, split)?)),
        Some(cifar::Container::Tar) => {
            let file = File::open(path).map_err(reading(path))?;
            let index = tar_index::index(path, &file)?;
            if cifar::is_in_tar(&index) {
                return Ok(Arc::new(cifar::from_tar(path, &file, &index, split)?));
            }
            if shards::is_shard(&index) {
                return Ok(Arc::new(shards::Shards::open(path, vec![path.into()], split, need)?));
            }
            Ok(Arc::new(folder::Files::from_tar(path, file, &index, split, need)?))
        }
        None => Err(Error::malformed(
            path,
            "a folder of images, a CIFAR archive (tar.gz) or a tar of images",
            format!("a file of {} bytes that is neither", about.len()),
            "give the folder that holds the images",
        )),
    }
}

/// The error of a path that cannot be read; if nothing is there, says how far the path leads.
fn missing(path: &Path, error: std::io::Error) -> Error {
    if error.kind() != std::io::ErrorKind::NotFound {
        return reading(path)(error);
    }
    let there = path.ancestors().skip(1).find(|parent| !parent.as_os_str().is_empty() && parent.exists());
    let found = there.map_or("nothing".into(), |parent| format!("nothing ({} exists)", parent.display()));
    Error::malformed(path, "a file or folder of images", found, "check the path")
}

/// A dataset whose labels are places in the classes of another.
pub struct Matched {
    /// The images.
    pub dataset: Arc<dyn Dataset>,
    /// Classes of which it has no image.
    pub missing: Vec<String>,
}

impl Matched {
    /// Which classes there is nothing of, for people; `None` where there are all.
    pub fn missing_text(&self) -> Option<String> {
        let all = self.dataset.classes().len();
        match self.missing.len() {
            0 => None,
            count => Some(format!("no image of {count} of the {all} classes ({})", some(&self.missing))),
        }
    }
}

/// Gives the images of `dataset` their labels among `classes`, those of `whose`. Classes are matched by name; it may
/// have images of a part of them.
///
/// # Errors
/// [`Error::Malformed`] for a class that is none of them, which says so where it is one of them spelled in another way.
pub fn match_classes(dataset: Arc<dyn Dataset>, classes: &[String], whose: &str) -> Result<Matched> {
    let theirs = dataset.classes();
    let places: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let unknown: Vec<String> = theirs.iter().filter(|name| !places.contains_key(name.as_str())).cloned().collect();
    if !unknown.is_empty() {
        let like: HashMap<String, &String> = classes.iter().map(|name| (names::alike(name), name)).collect();
        let spelled: Vec<String> = unknown
            .iter()
            .filter_map(|name| {
                let other = like.get(&names::alike(name))?;
                let (one, two) = (names::spelled(name), names::spelled(other));
                Some(format!("{one} is {two} with other {}", names::difference(name, other)))
            })
            .collect();
        let absent: Vec<String> = classes.iter().filter(|name| !theirs.contains(name)).cloned().collect();
        let mut found = format!("{} classes; none of those: {}", theirs.len(), some(&unknown));
        if !absent.is_empty() {
            found = format!("{found}; absent: {}", some(&absent));
        }
        if !spelled.is_empty() {
            found = format!("{found}; {}", some(&spelled));
        }
        return Err(Error::malformed(
            dataset.describe(),
            format!("the {} classes of {whose} ({}), or a part of them", classes.len(), some(classes)),
            found,
            if spelled.is_empty() { "give data with the same class folders" } else { "rename the class folders" },
        ));
    }
    let mut counts = vec![0usize; classes.len()];
    let labels: Vec<u32> = theirs.iter().map(|name| places[name.as_str()]).collect();
    (0..dataset.len())
        .filter_map(|index| dataset.label(index))
        .for_each(|label| counts[labels[label as usize] as usize] += 1);
    let missing = classes.iter().zip(counts).filter(|(_, count)| *count == 0).map(|(name, _)| name.clone()).collect();
    if theirs == classes {
        return Ok(Matched { dataset, missing });
    }
    Ok(Matched { dataset: Arc::new(Relabelled { dataset, classes: classes.to_vec(), labels }), missing })
}

/// Images whose labels are those of other data.
struct Relabelled {
    dataset: Arc<dyn Dataset>,
    classes: Vec<String>,
    /// Of the dataset's own labels.
    labels: Vec<u32>,
}

impl Dataset for Relabelled {
    fn len(&self) -> usize {
        self.dataset.len()
    }

    fn describe(&self) -> String {
        self.dataset.describe()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.dataset.label(index).map(|label| self.labels[label as usize])
    }

    fn geometry(&self) -> Geometry {
        self.dataset.geometry()
    }

    fn key(&self, index: usize) -> String {
        self.dataset.key(index)
    }

    fn read(&self, index: usize) -> Result<Image> {
        self.dataset.read(index)
    }

    fn misnamed(&self, index: usize) -> Option<Misnamed> {
        self.dataset.misnamed(index)
    }

    fn check_there(&self) -> Result<()> {
        self.dataset.check_there()
    }

    fn read_into(&self, index: usize, pixels: &mut [u8]) -> Result<()> {
        self.dataset.read_into(index, pixels)
    }
}
