//! Doors for the targets in `fuzz/`: what a parser of this crate makes of any bytes, without a look at the disk.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::cifar::Cifar;
use crate::dataset::{Dataset, Need, Split};
use crate::folder::Files;
use crate::labels::{LabelBudget, named};
use crate::picture::Image;
use crate::synthetic::{Options, Synthetic};
use crate::testing::{Plain, seeded};

/// A `tar.gz` of an edition of CIFAR that is small enough: two training batches of four images, a test batch of two.
pub fn cifar_gzip(archive: &[u8]) {
    for split in [Split::Train, Split::Test] {
        if let Ok(data) = Cifar::from_tiny(archive, split) {
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
        if let Ok(data) = Files::from_tar(path, split, need) {
            all_are_sound(&data);
        }
    }
}

/// An image file.
pub fn image(bytes: &[u8]) {
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
    chosen_are_sound(&data, named(&data, Path::new("list.txt"), text).unwrap_or_default());
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
    for index in 0..data.len() {
        assert!(data.label(index).is_none_or(|label| (label as usize) < data.classes().len()));
        assert!(!data.key(index).split('/').any(|part| part == ".."));
    }
}

fn chosen_are_sound(data: &Plain, chosen: Vec<usize>) {
    assert!(chosen.is_sorted_by(|a, b| a < b) && chosen.iter().all(|&index| index < data.len()), "{chosen:?}");
}
