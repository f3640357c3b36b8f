//! Doors for the targets in `fuzz/`: what a parser of this crate makes of any bytes, without a look at the disk.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::cifar::from_tiny;
use crate::dataset::{Dataset, Need, Split};
use crate::downsampled::from_npz;
use crate::folder::Files;
use crate::foreign::Foreign;
use crate::jpeg;
use crate::labels::{LabelBudget, named};
use crate::picture::Image;
use crate::records::{Batch, Layout};
use crate::shards::Shards;
use crate::synthetic::{Options, Synthetic};
use crate::tar_index;
use crate::testing::{Plain, seeded};
use crate::val_labels::Flat;

/// A `tar.gz` of an edition of CIFAR that is small enough: two training batches of four images, a test batch of two.
pub fn cifar_gzip(archive: &[u8]) {
    for split in [Split::Train, Split::Test] {
        if let Ok(data) = from_tiny(archive, split) {
            all_are_sound(&data);
            (0..data.len()).for_each(|index| drop(data.read(index).expect("in memory")));
        }
    }
}

/// The same, of which only the tar is given: no mutation would survive the checksum of the gzip.
pub fn cifar_tar(tar: &[u8]) {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::none());
    gzip.write_all(tar).expect("in memory");
    cifar_gzip(&gzip.finish().expect("in memory"));
}

/// The index of a tar of images.
pub fn tar_folder(path: &Path) {
    for (split, need) in [(Split::Train, Need::Images), (Split::Train, Need::Labels), (Split::Test, Need::Labels)] {
        let file = File::open(path).expect("the target wrote it");
        let Ok(index) = tar_index::index(path, &file) else { return };
        if let Ok(data) = Files::from_tar(path, file, &index, split, need) {
            all_are_sound(&data);
        }
    }
}

/// A shard of samples.
pub fn webdataset(path: &Path) {
    for need in [Need::Images, Need::Labels] {
        if let Ok(data) = Shards::open(path, vec![path.into()], Split::Train, need) {
            all_are_sound(&data);
        }
    }
}

/// A pickled batch, of images of 2 x 2 pixels.
pub fn pickle(bytes: &[u8]) {
    const LAYOUT: Layout = Layout { labels: "labels", first_label: 1, classes: 10, sides: &[2] };
    if let Ok(batch) = Batch::from_pickle(Path::new("batch"), "batch", bytes, &LAYOUT) {
        assert!(batch.len() > 0 && batch.side() == 2);
    }
}

/// An .npz of the downsampled ImageNet.
pub fn npz(path: &Path) {
    if let Ok(batch) = from_npz(File::open(path).expect("the target wrote it"), "batch") {
        assert!(batch.len() > 0);
    }
}

/// A file of labels beside images without class folders, under each of its names.
pub fn val_labels(text: &[u8]) {
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (classes, images) = (names(&["cat", "dog"]), names(&["1.jpg", "2.jpg"]));
    for name in ["val.txt", "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"] {
        let read = |path: &Path| Ok((path == Path::new(name)).then(|| text.to_vec()));
        let flat =
            Flat { root: Path::new("data"), part: Path::new("val"), classes: &classes, images: &images, read: &read };
        if let Ok(Some(labels)) = flat.labels() {
            assert!(labels.len() == images.len() && labels.iter().all(|&label| (label as usize) < classes.len()));
        }
    }
}

/// An image file. What of it is our own must not panic; the decoders may, as in a run.
pub fn image(bytes: &[u8]) {
    let _ = Foreign::recognise(bytes).map(|foreign| foreign.to_string());
    if bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        // No more than an input of this size can fill: what is larger is left to the decoder's own limits.
        let few = |height: usize, width: usize| (height * width < 1 << 24).then_some(()).ok_or_else(String::new);
        let _ = jpeg::walk(bytes, few);
    }
    if let Ok(image) = Image::decode(bytes) {
        assert_eq!(image.pixels.len(), image.height * image.width * 3);
        assert!(!image.pixels.is_empty());
    }
}

/// A label budget, and a list of names of images.
pub fn labels(text: &str) {
    let data = Plain::of_classes(&[3, 5, 1]);
    if let Ok(budget) = text.parse::<LabelBudget>() {
        assert_eq!(budget.to_string().parse::<LabelBudget>().expect("prints what it reads"), budget);
        if !matches!(budget, LabelBudget::Named(_)) {
            chosen_are_sound(&data, budget.select(&data, &seeded).unwrap_or_default());
        }
    }
    chosen_are_sound(&data, named(&data, Path::new("list.txt"), text.into()).unwrap_or_default());
}

/// Options of the synthetic world.
pub fn synthetic(text: &str) {
    let Ok(options) = text.parse::<Options>() else { return };
    let data = Synthetic::new(options, Split::Test, &seeded);
    assert!(!data.is_empty());
    for index in [0, data.len() - 1] {
        assert!((data.label(index).expect("all have one") as usize) < data.classes().len(), "{}", data.describe());
    }
}

fn all_are_sound(data: &dyn Dataset) {
    assert!(!data.is_empty());
    let mut keys = HashSet::new();
    for index in 0..data.len() {
        assert!(data.label(index).is_none_or(|label| (label as usize) < data.classes().len()));
        let key = data.key(index);
        assert!(!key.split('/').any(|part| part == ".."));
        assert!(!key.chars().any(char::is_control), "{key:?} in a list");
        assert!(keys.insert(key), "two images of one name");
    }
    let classes: HashSet<_> = data.classes().iter().collect();
    assert_eq!(classes.len(), data.classes().len(), "two classes of one name");
}

fn chosen_are_sound(data: &Plain, chosen: Vec<usize>) {
    assert!(chosen.is_sorted_by(|a, b| a < b) && chosen.iter().all(|&index| index < data.len()), "{chosen:?}");
}
